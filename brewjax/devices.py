"""What a process settles about devices before JAX is imported."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import sys
from pathlib import Path

from brewjax.paths import user_cache

GOOGLE = "0x1ae0"  # a vendor on the PCI bus: of TPUs, and of Google Cloud's disks and network cards
DISK, NETWORK = "0x01", "0x02"  # classes of PCI devices
MAX_CACHE_BYTES = 4 << 30  # of compiled programs; the least recently used go first


def use_huge_pages() -> None:
    """Starts this process again, once, with a malloc of glibc that takes large memory in huge pages.

    XLA on a CPU takes the memory of each step anew. In pages of 4 KiB a training step of the demo's model waits for
    24,000 of them, which is a quarter of its processor time. glibc reads the setting when a process starts and never
    again; an environment that has GLIBC_TUNABLES keeps it.
    """
    if "GLIBC_TUNABLES" in os.environ or platform.libc_ver()[0] != "glibc":
        return
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def device_per_core() -> None:
    """On a CPU, the rows of a batch or the tokens of a row are then computed side by side, where one device would run
    the many small operations of blockwise attention on a single core."""
    cores = os.cpu_count() or 1
    os.environ.setdefault("JAX_NUM_CPU_DEVICES", str(min(4, 1 << (cores.bit_length() - 1))))


def hide_useless_libtpu(root: Path = Path("/")) -> None:
    """Where there is no TPU, keeps JAX from loading the package `libtpu`, which then complains for a page.

    That package is also the compiler for TPUs that are not there (`brewjax compile`, which does not call this). Nothing
    changes where the environment asks for a TPU, or for a libtpu of its own.

    Args:
      root: where the file systems /dev and /sys are.
    """
    tpu_requested = "tpu" in os.environ.get("JAX_PLATFORMS", "") or {"JAX_FORCE_TPU_INIT", "TPU_LIBRARY_PATH"} & {
        *os.environ
    }
    if not tpu_requested and not has_tpu(root) and "libtpu" not in sys.modules:
        sys.modules["libtpu"] = None  # type: ignore[assignment]  # `import libtpu` then fails, as if it were not there
        logging.getLogger("jax._src.xla_bridge").setLevel(logging.WARNING)  # that it has no libtpu.so is no news


def has_tpu(root: Path = Path("/")) -> bool:
    """Whether this machine may have a TPU: a device file of one, or an accelerator of Google's on the PCI bus."""
    if [*root.glob("dev/accel*"), *root.glob("dev/vfio/[0-9]*")]:
        return True
    for vendor in root.glob("sys/bus/pci/devices/*/vendor"):
        kind = vendor.parent / "class"
        if vendor.read_text().strip() == GOOGLE and not kind.read_text().startswith((DISK, NETWORK)):
            return True
    return False


def cache_compilations() -> None:
    """Lets JAX keep compiled programs in the user's cache folder, where later processes find them.

    JAX keys them by program, compiler and options; the folder's name adds the processor, whose instructions a program
    for a CPU may use, for home folders that several machines share. An entry that cannot be read is compiled again. To
    be called before JAX is imported; JAX's own environment variables take precedence
    (JAX_ENABLE_COMPILATION_CACHE=false turns it off).
    """
    for name, value in {
        "JAX_COMPILATION_CACHE_DIR": user_cache() / "xla" / _processor(),
        "JAX_COMPILATION_CACHE_MAX_SIZE": MAX_CACHE_BYTES,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": 0,
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": 0,
    }.items():
        os.environ.setdefault(name, str(value))


def _processor(info: Path = Path("/proc/cpuinfo")) -> str:
    """A name for this machine's kind of processor, by the instructions that it has."""
    lines = info.read_text().splitlines() if info.is_file() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return f"{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:8]}"
