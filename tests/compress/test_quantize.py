import dataclasses
import functools
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from brewjax import distributed
from brewjax.bundle.bundle import Bundle, PromptConfig
from brewjax.compress.calibrate import calibrate
from brewjax.compress.prune import PruneConfig, prune
from brewjax.compress.quantize import QuantizeConfig, quantize, with_head
from brewjax.config import ConfigError
from brewjax.data.text.prompt import Prompt, Question
from brewjax.model.config import ExpertsConfig, HeadPrecision, ModelConfig, Quantization
from brewjax.model.families import config_to_hf
from brewjax.model.generate import Generator
from brewjax.model.loading import CheckpointError
from brewjax.model.params import Params, abstract_params, bind, model_size, num_parameters, read_params
from brewjax.model.sharding import BATCH_AXES, MeshConfig
from brewjax.scoring.passes import Bucket
from brewjax.scoring.scorer import Scorer, normalize_over_labels, score_labels
from pallas_kernels import label_scores
from tests.processes import ROOT, finish, start
from tests.tiny import MODEL, params

LETTERS = list("abcdefghijklmnopqrstuvwxyz")
DENSE = MODEL.model_copy(update={"d_model": 32, "d_ff": 64, "vocab_size": 300, "qkv_bias": True, "qk_norm": True})
MIXTURE = DENSE.model_copy(update={"experts": ExpertsConfig(num_experts=4)})
MODELS = {"dense": DENSE, "mixture": MIXTURE}
MATRICES = {
    "dense": ["query", "key", "value", "output", "gate", "up", "down"],
    "mixture": ["query", "key", "value", "output"],
}
CONFIGS = [
    QuantizeConfig(),
    QuantizeConfig(scales="per_tensor", activations="per_tensor"),
    QuantizeConfig(dtype="int8", activations=None),
]
configs = pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.dtype}-{c.scales}-{c.activations}")


def make_prompt(seed: int, num_questions: int) -> Prompt:
    random = np.random.default_rng(seed)
    text = lambda letters: "".join(random.choice(LETTERS, letters))  # noqa: E731
    questions = tuple(Question(text(count)) for count in random.integers(1, 6, num_questions))
    return Prompt(text(6), tuple(text(count) for count in random.integers(1, 6, 4)), questions, ("Yes", "No"))


@pytest.fixture(scope="module", params=MODELS)
def saved(request, tokenizer, tmp_path_factory) -> Path:
    """A float bundle."""
    folder = tmp_path_factory.mktemp("bundles") / request.param
    Bundle(MODELS[request.param], spread(MODELS[request.param]), tokenizer, PromptConfig()).save(folder)
    return folder


@pytest.fixture(scope="module")
def small(saved, tmp_path_factory) -> Callable[[QuantizeConfig], Bundle]:
    """It quantised, written and loaded."""
    folder = tmp_path_factory.mktemp("small")

    @functools.cache
    def make(config: QuantizeConfig) -> Bundle:
        out = folder / str(len(list(folder.iterdir())))
        quantize(saved, config).save(out)
        return Bundle.load(out)

    return make


def spread(model: ModelConfig) -> dict:
    """Random weights that add up to states of size one, for scores that differ and do not saturate."""
    weights = jax.tree.map(lambda leaf: np.array(leaf, np.float32), params(model))
    for layer in (weights["layers"], weights["layers"].get("experts", {})):
        for name in ("output", "down"):
            if name in layer:
                layer[name] /= 3
    return jax.tree.map(jnp.asarray, weights)


def score(bundle: Bundle, prompts: list[Prompt], mesh: MeshConfig | None = None) -> np.ndarray:
    return np.concatenate(scorer(bundle, mesh).score_many(prompts))[:, 0]


def scorer(bundle: Bundle, mesh: MeshConfig | None = None) -> Scorer:
    built = (mesh or MeshConfig()).build()
    return Scorer(bundle.model, bundle.params, bundle.tokenizer, "dense", (Bucket(256),), built)


PROMPTS = [make_prompt(seed, 12) for seed in range(6)]


# --- what is written


@configs
def test_every_value_is_within_half_a_step_of_what_it_was(saved, small, config):
    before, after = (jax.tree.map(np.asarray, bundle.params) for bundle in (Bundle.load(saved), small(config)))
    matrices = [(name, before["layers"], after["layers"]) for name in MATRICES[saved.name]]
    if saved.name == "mixture":
        pair = (before["layers"]["experts"], after["layers"]["experts"])
        matrices += [(name, *pair) for name in ("gate", "up", "down")]
    for name, whole, small in matrices:
        # The axes that are summed over, behind those of layers and experts.
        behind = 2 if "router" in whole else 1
        axes = (behind, behind + 1) if name == "output" else (behind,)
        weight, values = np.asarray(whole[name]), np.asarray(small[name]["values"]).astype(np.float32)
        scale = np.expand_dims(np.asarray(small[name]["scale"]), axes)
        max_abs = np.abs(weight).max(axes, keepdims=True)
        if config.scales == "per_tensor":
            max_abs = np.broadcast_to(
                np.abs(weight).max(tuple(range(behind, weight.ndim)), keepdims=True), max_abs.shape
            )
        np.testing.assert_allclose(scale, max_abs / (448 if config.dtype == "e4m3" else 127), rtol=1e-6)
        step = np.broadcast_to(scale, weight.shape) / 2
        if config.dtype == "e4m3":  # 3 bits of fraction; below 2^-6 a fixed step
            step = np.maximum(np.abs(weight) * 2**-4, scale * 2**-10)
        assert np.all(np.abs(values * scale - weight) <= step * (1 + 1e-5))
        del whole[name], small[name]
    jax.tree.map(np.testing.assert_array_equal, before, after)  # the rest is as it was


def test_sizes_are_those_of_the_same_model_in_fewer_bytes(saved, small):
    bundle, model = small(QuantizeConfig()), MODELS[saved.name]
    before, after = model_size(model), model_size(bundle.model)
    assert (after.parameters, after.active) == (before.parameters, before.active)
    assert after.weight_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(bundle.params))
    large = model.model_copy(update={"d_model": 1024, "d_ff": 4096, "layers": 8})
    quantized = large.model_copy(update={"quantized": Quantization()})
    assert model_size(quantized).weight_bytes / model_size(large).weight_bytes == pytest.approx(0.25, abs=0.01)


def test_quantizing_holds_one_float_parameter_at_a_time(saved, monkeypatch):
    held = []

    def live() -> int:
        return sum(array.nbytes for array in jax.live_arrays())

    def reading(folder: Path, abstract: Params) -> Params:
        read = read_params(folder, abstract)
        held.append((live() - before, max(leaf.nbytes for leaf in jax.tree.leaves(read) if leaf is not ...)))
        return read

    monkeypatch.setattr("brewjax.compress.quantize.read_params", reading)
    before = live()
    bundle = quantize(saved, QuantizeConfig())
    assert len(held) == len(jax.tree.leaves(abstract_params(MODELS[saved.name], MeshConfig().build())))
    assert all(bytes_now <= of_leaf + model_size(bundle.model).weight_bytes for bytes_now, of_leaf in held)


def test_loading_never_holds_the_float_model(tmp_path, tokenizer):
    """In a process of its own, whose memory is measured. The float model is 120 MB."""
    model = DENSE.model_copy(update={"d_model": 512, "d_ff": 2048, "layers": 8, "heads": 8, "head_dim": 64})
    bundle = Bundle(model, params(model), tokenizer, PromptConfig())
    bundle.save(tmp_path / "whole")
    quantize(tmp_path / "whole", QuantizeConfig()).save(tmp_path / "small")
    on_disk = [sum(file.stat().st_size for file in (tmp_path / name).rglob("*")) for name in ("whole", "small")]
    assert on_disk[1] < 0.3 * on_disk[0]
    command = [sys.executable, "-m", "tests.compress.test_quantize", "load", tmp_path / "small"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert model_size(model).weight_bytes > 120e6
    assert int(done.stdout.splitlines()[-1]) < 0.8 * model_size(model).weight_bytes  # a quarter, and what reading takes


# --- what it says


@configs
def test_scores_are_near_those_of_the_float_model(saved, small, config):
    exact, near = (score(bundle, PROMPTS) for bundle in (Bundle.load(saved), small(config)))
    assert exact.std() > 0.05
    assert 0 < np.abs(near - exact).mean() < (0.01 if config.dtype == "int8" else 0.03)
    assert np.corrcoef(near, exact)[0, 1] > (0.99 if config.dtype == "int8" else 0.95)


def apart(bundle: Bundle) -> float:
    """How far scores of questions asked together are from those asked one by one."""
    bundle_scorer, prompt = scorer(bundle), make_prompt(0, 12)
    alone = [dataclasses.replace(prompt, questions=(question,)) for question in prompt.questions]
    return np.abs(bundle_scorer.score(prompt) - np.concatenate([bundle_scorer.score(single) for single in alone])).max()


@pytest.mark.parametrize("dtype", ["e4m3", "int8"])
def test_questions_score_together_as_one_by_one(small, dtype):
    assert apart(small(QuantizeConfig(dtype=dtype))) < 1e-6


def test_with_one_scale_for_all_tokens_they_do_not(small):
    assert apart(small(QuantizeConfig(scales="per_tensor", activations="per_tensor"))) > 1e-4


def test_text_is_generated(small):
    bundle = small(QuantizeConfig())
    generator = Generator(bundle.model, bundle.params, slots=2, context=64)
    generated = generator.generate([[3, 4, 5], [6, 7, 8, 9]], 5)
    assert [len(tokens) for tokens in generated] == [5, 5]


# --- on a mesh


@pytest.fixture(scope="module")
def sharded(saved, tmp_path_factory) -> dict[str, np.ndarray]:
    """What 8 devices of two processes find."""
    folder = tmp_path_factory.mktemp("sharded")
    out = folder / "out.npz"
    finish(folder, start("tests.compress.test_quantize", "mesh", saved, out, folder=folder, processes=2, devices=4))
    with np.load(out) as stored:
        return dict(stored)


@pytest.mark.long
def test_a_mesh_quantises_loads_and_scores_as_one_device(saved, small, sharded):
    bundle = small(QuantizeConfig())
    for path, leaf in jax.tree_util.tree_leaves_with_path(bundle.params):
        np.testing.assert_array_equal(sharded[jax.tree_util.keystr(path)], np.asarray(leaf, np.float32))
    # A sum in another order may round an activation the other way.
    np.testing.assert_allclose(sharded["scores"], score(bundle, PROMPTS), atol=2e-3)


@pytest.mark.long
def test_a_mesh_calibrates_as_one_device(saved, sharded):
    bundle = Bundle.load(saved)
    encoded = [bundle.encode(prompt) for prompt in PROMPTS]
    for number, statistics in enumerate(calibrate(bundle.model, bundle.params, encoded, MeshConfig().build())):
        for name, sums in statistics._asdict().items():
            actual = sharded[f"{number}/{name}"]
            np.testing.assert_allclose(actual, sums, rtol=1e-4, atol=1e-5 * np.abs(sums).max())
    pruned = prune(bundle, encoded, PruneConfig(d_ff=40))
    for path, leaf in jax.tree_util.tree_leaves_with_path(pruned.params):
        np.testing.assert_allclose(sharded[f"pruned {jax.tree_util.keystr(path)}"], leaf, rtol=1e-3, atol=1e-4)


# --- the head


def test_heads_of_less_than_float32_move_scores_and_make_ties(tokenizer):
    """Of states such as the last norm gives, as the `Scorer` scores them."""
    bundle = Bundle(DENSE, spread(DENSE), tokenizer, PromptConfig())
    mesh, actual = MeshConfig().build(), {}
    states, labels = np.random.default_rng(0).standard_normal((1, 4000, 32), np.float32), np.array([[5, 6]])
    states, labels = (
        jax.device_put(x, NamedSharding(mesh, jax.P(BATCH_AXES, *[None] * (x.ndim - 1)))) for x in (states, labels)
    )
    for product in ("float32", "bfloat16", "e4m3"):
        for logits in ("float32", "bfloat16"):
            model = with_head(bundle, HeadPrecision(product=product, logits=logits)).model
            with jax.set_mesh(mesh):
                log_probs = jax.jit(score_labels, static_argnums=(0, 4))(model, bundle.params, states, labels, "labels")
            actual[product, logits] = normalize_over_labels(np.asarray(log_probs)[0])[:, 0]
    exact = actual["float32", "float32"]
    moved = {name: np.abs(scores - exact).mean() for name, scores in actual.items()}
    different = {name: len(np.unique(scores)) for name, scores in actual.items()}
    assert 0 < moved["bfloat16", "float32"] < moved["e4m3", "float32"] < 0.1
    # The rounding of the logits makes the ties, not that of the product.
    for product in ("float32", "bfloat16", "e4m3"):
        assert different[product, "float32"] > 0.95 * len(exact)
        assert different[product, "bfloat16"] < 0.85 * len(exact)


@pytest.mark.parametrize(("parts", "passes"), [(1, 1), (2, 3), (3, 6)])
def test_parts_of_the_head_decide_the_passes_of_the_log_sum(monkeypatch, parts, passes):
    monkeypatch.setattr(label_scores, "choose_implementation", lambda hidden, head: "tpu-interpreted")
    model = DENSE.model_copy(update={"head": HeadPrecision(parts=parts)})
    mesh = MeshConfig().build(jax.devices()[:1])
    hidden, labels = (
        jax.device_put(x, NamedSharding(mesh, jax.P(BATCH_AXES, *[None] * (x.ndim - 1))))
        for x in (np.zeros((1, 4, 32), np.float32), np.array([[5, 6]]))
    )
    with jax.set_mesh(mesh):
        program = jax.make_jaxpr(score_labels, static_argnums=(0, 4))(
            model, spread(DENSE), hidden, labels, "vocabulary"
        )
    assert str(program).count("dot_general") == 1 + passes  # one for the labels' own logits


def test_all_that_reads_logits_has_the_precision_of_the_head():
    hidden = np.random.default_rng(0).standard_normal((3, 32)).astype(np.float32)
    model = DENSE.model_copy(update={"head": HeadPrecision(product="bfloat16", logits="bfloat16")})
    weights = spread(DENSE)
    logits = np.asarray(bind(model, weights).logits(hidden))
    rounded = lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)  # noqa: E731
    expected = rounded(hidden) @ rounded(weights["embedding"]).T
    np.testing.assert_array_equal(logits, rounded(logits))
    np.testing.assert_allclose(logits, expected, rtol=2**-8, atol=1e-6)


# --- what is refused


def test_what_is_quantised_is_not_quantised_pruned_or_exported(saved, tmp_path):
    bundle = quantize(saved, QuantizeConfig())
    bundle.save(tmp_path / "out")
    assert num_parameters(bundle.params) > num_parameters(Bundle.load(saved).params)  # the scales
    with pytest.raises(ConfigError, match="quantized: is quantised already"):
        quantize(tmp_path / "out", QuantizeConfig())
    with pytest.raises(ConfigError, match="quantized: a quantised model is for serving; prune"):
        PruneConfig(d_ff=16).target(bundle.model)
    with pytest.raises(CheckpointError, match="model 'tiny' is quantised; export the model that it was made from"):
        config_to_hf(bundle.model)


def test_a_bundle_without_weights(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "source", ignore=shutil.ignore_patterns("params"))
    with pytest.raises(ValueError, match="source/params: no complete weights there"):
        quantize(tmp_path / "source", QuantizeConfig())


def peak() -> int:
    """The most bytes that were ever resident."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def measure(folder: Path) -> None:
    """Prints by how many bytes loading a bundle raises the most that was ever resident."""
    jnp.zeros(1).block_until_ready()
    before = peak()
    Bundle.load(folder)
    print(peak() - before)


def on_mesh(source: Path, out: Path) -> None:
    assert jax.device_count() == 8
    mesh = MeshConfig(fsdp=2, tensor=2) if source.name == "dense" else MeshConfig(fsdp=2, expert=2, tensor=2)
    actual: dict = {}
    whole = Bundle.load(source, mesh)
    encoded = [whole.encode(prompt) for prompt in PROMPTS]
    for number, statistics in enumerate(calibrate(whole.model, whole.params, encoded, mesh.build())):
        actual |= {f"{number}/{name}": sums for name, sums in statistics._asdict().items()}
    pruned = prune(whole, encoded, PruneConfig(d_ff=40, mesh=mesh))
    actual |= {f"pruned {path}": values for path, values in gathered(pruned).items()}
    quantize(source, QuantizeConfig(mesh=mesh)).save(out.with_suffix(""))
    bundle = Bundle.load(out.with_suffix(""), mesh)
    actual |= gathered(bundle)
    actual["scores"] = score(bundle, PROMPTS, mesh)
    if distributed.is_process_zero():
        np.savez(out, **actual)


def gathered(bundle: Bundle) -> dict[str, np.ndarray]:
    """Parameters by their paths; they lie as they should."""
    actual = {}
    mesh = bundle.mesh.build()
    for (path, leaf), abstract in zip(
        jax.tree_util.tree_leaves_with_path(bundle.params),
        jax.tree.leaves(abstract_params(bundle.model, mesh)),
        strict=True,
    ):
        assert leaf.sharding == abstract.sharding
        actual[jax.tree_util.keystr(path)] = np.float32(multihost_utils.process_allgather(leaf, tiled=True))
    return actual


if __name__ == "__main__":
    if sys.argv[1] == "mesh":
        with distributed.distributed_runtime():
            on_mesh(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        measure(Path(sys.argv[2]))
