"""What a process settles about devices before JAX is imported."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

GOOGLE = "0x1ae0"  # a vendor on the PCI bus: of TPUs, and of Google Cloud's disks and network cards
DISK, NETWORK = "0x01", "0x02"  # classes of PCI devices


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
