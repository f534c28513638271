"""The same loss and gradients on any mesh. Run as a script, this file computes them on 8 virtual devices."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from jax.experimental import topologies
from jax.experimental.mesh_utils import create_hybrid_device_mesh
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from brewjax.aot.topology import topology
from brewjax.data.records.loader import TokenBatch
from brewjax.data.text.encode import NO_TARGET
from brewjax.model.config import ExpertsConfig, ModelConfig
from brewjax.model.huggingface import read_config, read_params
from brewjax.model.params import Params, abstract_params, bind
from brewjax.model.sharding import BATCH_AXES, FSDP_TENSOR, MESH_AXES, MeshConfig, Sharding
from brewjax.model.upcycle import upcycle
from brewjax.train.lora import LoraConfig
from brewjax.train.objectives import supervised
from brewjax.train.optimizer import OptimizerConfig
from tests.tiny import MODEL, adapters, pack, params, prompt

ROOT = Path(__file__).parents[2]
LENGTH = 64
MESHES = {
    "data=8": MeshConfig(),
    "data=2 fsdp=2 tensor=2": MeshConfig(fsdp=2, tensor=2),
    "fsdp=8": MeshConfig(fsdp=8),
    "fsdp=2 context=2 tensor=2": MeshConfig(fsdp=2, context=2, tensor=2),
    "context=8": MeshConfig(context=8),
    "two slices, data=4 tensor=2": MeshConfig(tensor=2, slices=2),
    "four slices, data=2 fsdp=4": MeshConfig(fsdp=4, slices=4),
}
EXPERTS = MODEL.model_copy(
    update={
        "layers": 1,
        "d_ff": 12,
        "qkv_bias": True,
        "qk_norm": True,
        "experts": ExpertsConfig(num_experts=4, router_aux_loss_coef=0.1),
    }
)
EXPERT_MESHES = {
    "experts, fsdp=2 expert=2 tensor=2": MeshConfig(fsdp=2, expert=2, tensor=2),
    "experts, data=2 expert=4": MeshConfig(expert=4),
    "experts, expert=4 context=2": MeshConfig(expert=4, context=2),
}
LORA = LoraConfig(rank=3)
LORA_MESHES = {
    "adapters, data=2 fsdp=2 tensor=2": (MODEL, MeshConfig(fsdp=2, tensor=2)),
    "adapters, data=2 context=2 tensor=2": (MODEL, MeshConfig(context=2, tensor=2)),
    "adapters of experts, fsdp=2 expert=2 tensor=2": (EXPERTS, MeshConfig(fsdp=2, expert=2, tensor=2)),
}
RUNS = {name: (MODEL, None, mesh) for name, mesh in MESHES.items()}
RUNS |= {name: (EXPERTS, None, mesh) for name, mesh in EXPERT_MESHES.items()}
RUNS |= {name: (model, LORA, mesh) for name, (model, mesh) in LORA_MESHES.items()}


def batch() -> TokenBatch:
    """Eight rows with different numbers of targets, the last with none."""
    rows = []
    for number in range(8):
        random = np.random.default_rng(number)
        prompts = [prompt(random, questions=[2] * (1 + number % 3), layout=layout) for layout in ("dense", "star")]
        tokens, positions, token_labels = pack(prompts, LENGTH)
        targets = np.concatenate([encoded.arrays["targets"] for encoded in prompts])
        targets = np.pad(targets, (0, LENGTH - len(targets)), constant_values=NO_TARGET)
        weights, zeros = (targets != NO_TARGET).astype(np.float32), np.zeros_like(tokens)
        rows.append(TokenBatch(tokens, positions, token_labels, targets, weights, zeros, zeros))
    rows[-1].targets[:], rows[-1].weights[:] = NO_TARGET, 0
    return jax.tree.map(lambda *row: np.stack(row), *rows)


def loss_and_gradients(model: ModelConfig, lora: LoraConfig | None, mesh: Mesh) -> dict[str, np.ndarray]:
    """By path of the parameter, or of the adapter; gathered."""

    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(learnt, base, batch):
        decoder = lora.bind(model, base, learnt) if lora else bind(model, learnt)
        loss, _ = supervised(decoder, batch, {})
        return loss

    abstract, weights = abstract_params(model, mesh), params(model)
    of_base = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, lora.abstract(abstract)) if lora else of_base
    by_rows = NamedSharding(mesh, jax.P(BATCH_AXES, None))
    with jax.set_mesh(mesh):
        (loss, count), gradients = jax.jit(loss)(
            jax.device_put(adapters(lora, model) if lora else weights, shardings),
            jax.device_put(weights, of_base) if lora else None,
            jax.device_put(batch(), by_rows),
        )
    for shard, gradient in zip(jax.tree.leaves(shardings), jax.tree.leaves(gradients), strict=True):
        assert gradient.sharding.is_equivalent_to(shard, gradient.ndim)
    leaves, _ = jax.tree_util.tree_flatten_with_path(gradients)
    return {"loss": loss, "count": count} | {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def muon_update(mesh: Mesh) -> dict[str, np.ndarray]:
    """By path of the parameter: what Muon changes in a first step, whose gradients are the weights themselves."""
    optimizer = OptimizerConfig(method="muon", learning_rate=0.1, warmup=0, weight_decay=0.0).build(10)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_params(MODEL, mesh))
    with jax.set_mesh(mesh):
        weights = jax.device_put(params(MODEL), shardings)
        updates, _ = jax.jit(lambda p: optimizer.update(p, optimizer.init(p), p))(weights)
        moved = jax.jit(optax.apply_updates)(weights, updates)
    for before, after in zip(jax.tree.leaves(weights), jax.tree.leaves(moved), strict=True):
        assert after.sharding.is_equivalent_to(before.sharding, after.ndim)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(updates)}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> dict[str, np.ndarray]:
    """By mesh and path."""
    out = tmp_path_factory.mktemp("sharded") / "out.npz"
    flags = {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    subprocess.run(
        [sys.executable, "-m", "tests.model.test_sharding", out], cwd=ROOT, env=os.environ | flags, check=True
    )
    with np.load(out) as stored:
        return dict(stored)


@functools.cache
def expected(model: ModelConfig, lora: LoraConfig | None) -> dict[str, np.ndarray]:
    return loss_and_gradients(model, lora, one_device())


def one_device() -> Mesh:
    axes = len(MESH_AXES)
    return jax.make_mesh((1,) * axes, MESH_AXES, (jax.sharding.AxisType.Explicit,) * axes, devices=jax.devices()[:1])


@pytest.mark.long
@pytest.mark.parametrize("name", RUNS)
def test_loss_and_gradients_are_those_of_one_device(name, sharded):
    alone = expected(*RUNS[name][:2])
    assert alone["count"] > 10
    for path, values in alone.items():
        largest = max(1, np.abs(values).max())  # gradients of adapters are larger than 1, and so is their rounding
        np.testing.assert_allclose(sharded[f"{name}/{path}"], values, rtol=1e-5, atol=1e-5 * largest, err_msg=path)


@pytest.mark.long
def test_muon_is_the_same_on_any_mesh(sharded):
    for path, values in muon_update(one_device()).items():
        assert values.any()
        for name in ("muon_update", "muon_update, layers split"):
            np.testing.assert_allclose(sharded[f"{name}/{path}"], values, rtol=1e-3, atol=1e-5, err_msg=path)


def read_golden(mesh: Mesh) -> dict[str, np.ndarray]:
    """A mixture of experts read onto a mesh, by path of the parameter."""
    folder = Path(__file__).with_name("goldens") / "mixtral"
    config = read_config(folder, "mixtral")
    return gathered(config, read_params(folder, config, mesh), mesh)


def upcycled(mesh: Mesh) -> dict[str, np.ndarray]:
    """The tiny model as a mixture of experts, by path of the parameter."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_params(MODEL, mesh))
    model, weights = upcycle(MODEL, jax.device_put(params(), shardings), ExpertsConfig(num_experts=4), mesh)
    return gathered(model, weights, mesh)


def gathered(model: ModelConfig, weights: Params, mesh: Mesh) -> dict[str, np.ndarray]:
    for leaf, expected in zip(jax.tree.leaves(weights), jax.tree.leaves(abstract_params(model, mesh)), strict=True):
        assert leaf.sharding == expected.sharding
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(weights)}


@pytest.mark.long
@pytest.mark.parametrize("made", [read_golden, upcycled])
def test_a_model_is_read_and_upcycled_on_any_mesh(made, sharded):
    for path, values in made(one_device()).items():
        np.testing.assert_array_equal(sharded[f"{made.__name__}/{path}"], values)


def test_a_mesh_uses_every_device():
    with pytest.raises(ValueError, match=r"data=3 fsdp=1 expert=1 context=1 tensor=1 does not make use of \d+ devices"):
        MeshConfig(data=3).build()


@pytest.fixture(scope="module")
def two_slices() -> list[jax.Device]:
    """Two slices of 2x2 chips, to lay meshes over."""
    topology("v5e-2x2")  # sets what libtpu reads when it is loaded
    return list(topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2", num_slices=2).devices)


@pytest.mark.parametrize(
    ("config", "within", "across"),
    [
        (MeshConfig(tensor=4), (1, 1, 1, 1, 4), (2, 1, 1, 1, 1)),
        (MeshConfig(fsdp=2, tensor=2), (1, 2, 1, 1, 2), (2, 1, 1, 1, 1)),
        (MeshConfig(fsdp=4, tensor=2), (1, 2, 1, 1, 2), (1, 2, 1, 1, 1)),
        (MeshConfig(slices=2), (4, 1, 1, 1, 1), (2, 1, 1, 1, 1)),
    ],
)
def test_only_data_or_else_fsdp_lies_across_slices(config, within, across, two_slices):
    expected = create_hybrid_device_mesh(within, across, two_slices, allow_split_physical_axes=True)
    assert (config.build(two_slices).devices == expected).all()
    assert (config.build(two_slices[::-1]).devices == expected).all()


@pytest.mark.parametrize(
    ("config", "devices", "message"),
    [
        (MeshConfig(tensor=8), 8, "over 2 slices of 4 devices: data x fsdp must be a multiple of 2"),
        (MeshConfig(slices=4), 8, "slices is 4, but the devices lie on 2 slices"),
        (MeshConfig(), 7, "slices must have as many devices each, and have 4, 3"),
        (MeshConfig(slices=3), 4, "4 devices cannot be 3 slices of equal size"),
    ],
)
def test_slices_that_do_not_divide_are_an_error(config, devices, message, two_slices):
    with pytest.raises(ValueError, match=message):
        config.build(two_slices[:devices])


@pytest.mark.parametrize("axis", ["fsdp", "expert", "context", "tensor", "slices"])
def test_a_mesh_axis_is_at_least_one(axis):
    with pytest.raises(ValueError, match=axis):
        MeshConfig(**{axis: 0})


def test_an_axis_without_a_rule_is_an_error():
    with pytest.raises(ValueError, match="no sharding rule for axis 'neuron'; rules: batch, length"):
        FSDP_TENSOR.spec("weight", "neuron")


def test_a_mesh_axis_is_used_once():
    with pytest.raises(ValueError, match="mesh axis 'tensor' is used twice"):
        Sharding({"heads": ("tensor",), "neurons": ("tensor",)}).spec("heads", "neurons")


def test_an_axis_that_does_not_divide_is_named():
    sizes = {axis: 1 for axis in MESH_AXES} | {"data": 2, "fsdp": 2, "tensor": 2}
    mesh = AbstractMesh(tuple(sizes.values()), MESH_AXES)
    with pytest.raises(ValueError, match="axis 'heads' of size 3 does not divide over 2 devices"):
        FSDP_TENSOR.named(mesh, (16, 3, 8), "weight", "heads", None)
    assert FSDP_TENSOR.named(mesh, (16, 4, 8), "weight", "heads", None).spec == jax.P(("fsdp",), ("tensor",), None)


def main(out: str) -> None:
    assert jax.device_count() == 8
    actual = {name: loss_and_gradients(model, lora, config.build()) for name, (model, lora, config) in RUNS.items()}
    mesh = EXPERT_MESHES["experts, fsdp=2 expert=2 tensor=2"].build()
    actual |= {made.__name__: made(mesh) for made in (read_golden, upcycled)}
    actual["muon_update"] = muon_update(MeshConfig(fsdp=2, tensor=2).build())
    actual["muon_update, layers split"] = muon_update(MeshConfig(fsdp=2).build(jax.devices()[: MODEL.layers]))
    np.savez(out, **{f"{name}/{path}": values for name, leaves in actual.items() for path, values in leaves.items()})


if __name__ == "__main__":
    main(sys.argv[1])
