"""Host memory that an import takes, on a synthetic checkpoint of several gigabytes: near one tensor, not one model.

    python benchmarks/import_memory.py            # 3 GB of bfloat16 in ten files; needs as much disk, twice

On a CPU the device's memory is the host's, so the parameters themselves are subtracted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from brewjax.model.config import ModelConfig
from brewjax.model.families import config_to_hf, tensor_names
from brewjax.model.huggingface import CONFIG, INDEX
from brewjax.model.loading import Name
from brewjax.model.params import abstract_params, model_size
from brewjax.model.sharding import MeshConfig

MODEL = ModelConfig(
    name="synthetic", vocab_size=32_000, d_model=2048, layers=24, heads=32, kv_heads=8, head_dim=64, d_ff=8192,
    tie_head=False, param_dtype="bfloat16", compute_dtype="bfloat16",
)  # fmt: skip
FILE_BYTES = 300_000_000


def write_checkpoint(folder: Path) -> int:
    """A sharded checkpoint of random weights; returns the bytes of its largest tensor."""
    import jax

    random, names = np.random.default_rng(0), tensor_names(MODEL)
    values = random.standard_normal(1 << 20).astype(ml_dtypes.bfloat16)
    files: list[dict[str, np.ndarray]] = [{}]
    largest = 0
    weight_map = {}

    def flush() -> None:
        name = f"model-{len(files):05}.safetensors"
        save_file(files[-1], folder / name)
        weight_map.update(dict.fromkeys(files[-1], name))
        files.append({})

    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(MODEL, MeshConfig().build())):
        name: Name = names["/".join(key.key for key in path)]
        for _, tensor in name.tensors(leaf.shape):
            files[-1][tensor] = np.resize(values, name.their_shape(leaf.shape))
            largest = max(largest, files[-1][tensor].nbytes)
            if sum(array.nbytes for array in files[-1].values()) > FILE_BYTES:
                flush()
    flush()
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (folder / CONFIG).write_text(json.dumps(config_to_hf(MODEL)))
    return largest


def peak() -> int:
    """The most bytes that were ever resident in this process."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def measure(folder: Path, mode: str) -> None:
    """Run in a process of its own: prints the seconds and the peaks."""
    from brewjax.model import huggingface

    mesh = MeshConfig(fsdp=int(os.environ.get("JAX_NUM_CPU_DEVICES", 1))).build()
    before, start_time = peak(), time.perf_counter()
    config = huggingface.read_config(folder, "synthetic")
    params = huggingface.read_params(folder, config, mesh)
    read, seconds = peak(), time.perf_counter() - start_time
    if mode == "save":
        from brewjax.model.params import save_model

        save_model(folder / "saved", config, params)
    print(json.dumps({"before": before, "read": read, "saved": peak(), "seconds": seconds}))


def main() -> None:
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if sys.argv[1:] else None) as name:
        folder = Path(name)
        largest, total = write_checkpoint(folder), model_size(MODEL).weight_bytes
        print(f"checkpoint {total / 1e9:.2f} GB, largest tensor {largest / 1e6:.0f} MB")
        for devices in (1, 4):
            environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
            command = [sys.executable, __file__, "--measure", name, "save"]
            done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
            result = json.loads(done.stdout)
            read, saved = ((result[key] - result["before"] - total) / 1e6 for key in ("read", "saved"))
            print(
                f"{devices} devices: read in {result['seconds']:.1f} s, beyond the parameters {read:.0f} MB at most, "
                f"{saved:.0f} MB with the weights written as a bundle's (it began with {result['before'] / 1e6:.0f} MB)"
            )


if __name__ == "__main__":
    measure(Path(sys.argv[2]), sys.argv[3]) if sys.argv[1:2] == ["--measure"] else main()
