from __future__ import annotations

import os
import subprocess
import sys

import pytest

from brewjax.devices import _processor, cache_compilations, has_tpu, hide_useless_libtpu


@pytest.fixture
def no_libtpu_yet(monkeypatch):
    """As a process begins: nothing imported, nothing asked for."""
    monkeypatch.delitem(sys.modules, "libtpu", raising=False)
    for name in ("JAX_PLATFORMS", "JAX_FORCE_TPU_INIT", "TPU_LIBRARY_PATH"):
        monkeypatch.delenv(name, raising=False)
    yield
    sys.modules.pop("libtpu", None)


def pci(root, vendor: str, kind: str) -> None:
    device = root / "sys/bus/pci/devices/0000:00:05.0"
    device.mkdir(parents=True)
    (device / "vendor").write_text(vendor + "\n")
    (device / "class").write_text(kind + "\n")


@pytest.mark.parametrize(
    ("vendor", "kind", "expected"),
    [
        ("0x1ae0", "0x120000", True),
        ("0x1ae0", "0xff0000", True),
        ("0x1ae0", "0x020000", False),  # Google Cloud's network card,
        ("0x1ae0", "0x010802", False),  # and disk
        ("0x10de", "0x030200", False),
    ],
)
def test_a_tpu_is_known_by_its_place_on_the_bus(tmp_path, vendor, kind, expected):
    pci(tmp_path, vendor, kind)
    assert has_tpu(tmp_path) == expected


@pytest.mark.parametrize("device", ["dev/accel0", "dev/vfio/0"])
def test_a_tpu_is_known_by_its_device_file(tmp_path, device):
    assert not has_tpu(tmp_path)
    (tmp_path / device).parent.mkdir(parents=True)
    (tmp_path / device).touch()
    assert has_tpu(tmp_path)


def test_without_a_tpu_libtpu_is_not_there(tmp_path, no_libtpu_yet):
    hide_useless_libtpu(tmp_path)
    with pytest.raises(ImportError):
        import libtpu  # noqa: F401


@pytest.mark.parametrize(
    "variables", [{"JAX_PLATFORMS": "tpu,cpu"}, {"JAX_FORCE_TPU_INIT": "1"}, {"TPU_LIBRARY_PATH": ""}]
)
def test_who_asks_for_a_tpu_gets_it(tmp_path, no_libtpu_yet, monkeypatch, variables):
    monkeypatch.setattr(os, "environ", {**os.environ, **variables})
    hide_useless_libtpu(tmp_path)
    assert "libtpu" not in sys.modules


def test_on_a_machine_with_a_tpu_nothing_changes(tmp_path, no_libtpu_yet):
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/accel0").touch()
    hide_useless_libtpu(tmp_path)
    assert "libtpu" not in sys.modules


def test_compiled_programs_are_kept_unless_the_environment_says_where(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "environ", {"XDG_CACHE_HOME": str(tmp_path)})
    cache_compilations()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"].startswith(str(tmp_path / "brewjax" / "xla"))
    monkeypatch.setattr(os, "environ", {"XDG_CACHE_HOME": str(tmp_path), "JAX_COMPILATION_CACHE_DIR": "elsewhere"})
    cache_compilations()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "elsewhere"


def test_processors_with_other_instructions_share_no_programs(tmp_path):
    names = []
    for number, flags in enumerate(("flags : avx2", "flags : avx2 avx512f", "flags : avx2")):
        info = tmp_path / str(number)
        info.write_text(f"processor : 0\n{flags}\n")
        names.append(_processor(info))
    assert names[0] == names[2] != names[1]


def test_a_damaged_compiled_program_is_compiled_again(tmp_path):
    code = "import jax; print(jax.jit(lambda x: (x @ x.T).sum())(jax.numpy.ones((64, 64))))"
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }
    printed = []
    for _ in range(2):
        command = [sys.executable, "-W", "ignore", "-c", code]
        printed.append(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
        entries = [path for path in tmp_path.rglob("*") if path.name.endswith("-cache")]
        assert entries
        for path in entries:
            path.write_bytes(path.read_bytes()[:50])
    assert printed[0] == printed[1] == "262144.0\n"


def test_a_process_starts_again_with_huge_pages_unless_the_environment_has_its_own_settings():
    code = "import os, sys; from brewjax.devices import use_huge_pages; print('started'); use_huge_pages(); "
    code += "print(os.environ['GLIBC_TUNABLES'], *sys.argv[1:])"
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    for settings, expected in [
        ({}, ["started", "started", "glibc.malloc.hugetlb=1 run it's.yaml"]),
        ({"GLIBC_TUNABLES": "glibc.malloc.check=0"}, ["started", "glibc.malloc.check=0 run it's.yaml"]),
    ]:
        command = [sys.executable, "-c", code, "run", "it's.yaml"]
        result = subprocess.run(command, env=environment | settings, capture_output=True, text=True, check=True)
        assert result.stdout.splitlines() == expected
