import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from brewjax.compress.prune import PruneConfig, prune
from brewjax.compress.quantize import QuantizeConfig, quantize, with_head
from brewjax.config import ConfigError
from brewjax.data.prompt import Prompt, Question
from brewjax.model.config import ExpertsConfig, HeadPrecision, ModelConfig, Quantization
from brewjax.model.families import config_to_hf
from brewjax.model.generate import Generator
from brewjax.model.loading import CheckpointError
from brewjax.model.params import count, size
from brewjax.scoring.bundle import Bundle, PromptConfig
from brewjax.scoring.passes import Bucket
from brewjax.scoring.scorer import Scorer
from tests.tiny import MODEL, params

LETTERS = list("abcdefghijklmnopqrstuvwxyz")
DENSE = MODEL.model_copy(update={"d_model": 32, "d_ff": 64, "vocab_size": 300, "qkv_bias": True, "qk_norm": True})
MIXTURE = DENSE.model_copy(update={"experts": ExpertsConfig(count=4)})
MODELS = {"dense": DENSE, "mixture": MIXTURE}
MATRICES = {
    "dense": ["query", "key", "value", "output", "gate", "up", "down"],
    "mixture": ["query", "key", "value", "output"],
}
CONFIGS = [
    QuantizeConfig(),
    QuantizeConfig(dtype="int8"),
    QuantizeConfig(scales="per_tensor", activations="per_tensor"),
    QuantizeConfig(dtype="int8", activations=None),
]
configs = pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.dtype}-{c.scales}-{c.activations}")


def make_prompt(seed: int, questions: int) -> Prompt:
    random = np.random.default_rng(seed)
    text = lambda letters: "".join(random.choice(LETTERS, letters))  # noqa: E731
    asked = tuple(Question(text(count)) for count in random.integers(1, 6, questions))
    return Prompt(text(6), tuple(text(count) for count in random.integers(1, 6, 4)), asked, ("Yes", "No"))


@pytest.fixture(scope="module", params=MODELS)
def saved(request, tokenizer, tmp_path_factory) -> Path:
    """A float bundle."""
    folder = tmp_path_factory.mktemp("bundles") / request.param
    Bundle(MODELS[request.param], spread(MODELS[request.param]), tokenizer, PromptConfig()).save(folder)
    return folder


def spread(model: ModelConfig) -> dict:
    """Random weights that add up to states of size one, for scores that differ and do not saturate."""
    weights = jax.tree.map(lambda leaf: np.array(leaf, np.float32), params(model))
    for layer in (weights["layers"], weights["layers"].get("experts", {})):
        for name in ("output", "down"):
            if name in layer:
                layer[name] /= 3
    return jax.tree.map(jnp.asarray, weights)


def score(bundle: Bundle, prompts: list[Prompt]) -> np.ndarray:
    return np.concatenate(scorer(bundle).score_many(prompts))[:, 0]


def scorer(bundle: Bundle) -> Scorer:
    return Scorer(bundle.model, bundle.params, bundle.tokenizer, "dense", (Bucket(512),))


# --- what is written


@configs
def test_every_value_is_within_half_a_step_of_what_it_was(saved, tmp_path, config):
    quantize(saved, tmp_path / "out", config)
    before, after = Bundle.load(saved), Bundle.load(tmp_path / "out")
    matrices = [(name, before.params["layers"], after.params["layers"]) for name in MATRICES[saved.name]]
    if saved.name == "mixture":
        pair = (before.params["layers"]["experts"], after.params["layers"]["experts"])
        matrices += [(name, *pair) for name in ("gate", "up", "down")]
    for name, whole, small in matrices:
        # The axes that are summed over, behind those of layers and experts.
        behind = 2 if "router" in whole else 1
        axes = (behind, behind + 1) if name == "output" else (behind,)
        weight, values = np.asarray(whole[name]), np.asarray(small[name]["values"]).astype(np.float32)
        scale = np.expand_dims(np.asarray(small[name]["scale"]), axes)
        most = np.abs(weight).max(axes, keepdims=True)
        if config.scales == "per_tensor":
            most = np.broadcast_to(np.abs(weight).max(tuple(range(behind, weight.ndim)), keepdims=True), most.shape)
        np.testing.assert_allclose(scale, most / (448 if config.dtype == "e4m3" else 127), rtol=1e-6)
        step = np.broadcast_to(scale, weight.shape) / 2
        if config.dtype == "e4m3":  # 3 bits of fraction; below 2^-6 a fixed step
            step = np.maximum(np.abs(weight) * 2**-4, scale * 2**-10)
        assert np.all(np.abs(values * scale - weight) <= step * (1 + 1e-5))
        del whole[name], small[name]
    jax.tree.map(np.testing.assert_array_equal, before.params, after.params)  # the rest is as it was


def test_a_checkpoint_is_as_small_as_its_numbers(saved, tmp_path):
    bundle = quantize(saved, tmp_path / "out", QuantizeConfig())
    before, after = size(MODELS[saved.name]), size(bundle.model)
    assert (after.parameters, after.active) == (before.parameters, before.active)
    assert after.weight_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(bundle.params))
    large = MODELS[saved.name].model_copy(update={"d_model": 1024, "d_ff": 4096, "layers": 8})
    quantized = large.model_copy(update={"quantized": Quantization()})
    assert size(quantized).weight_bytes / size(large).weight_bytes == pytest.approx(0.25, abs=0.01)
    on_disk = [
        sum(file.stat().st_size for file in (folder / "params").rglob("*")) for folder in (saved, tmp_path / "out")
    ]
    assert on_disk[1] < 0.6 * on_disk[0]  # of this one the embedding is a quarter


def test_quantizing_and_loading_never_hold_the_float_model(tmp_path, tokenizer):
    """In a process of its own, whose memory is measured. The model is 130 MB, its largest parameter 34 MB."""
    model = DENSE.model_copy(update={"d_model": 512, "d_ff": 2048, "layers": 8, "heads": 8, "head_dim": 64})
    bundle = Bundle(model, params(model), tokenizer, PromptConfig())
    bundle.save(tmp_path / "whole")
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(bundle.params))
    assert whole > 130e6
    del bundle
    done = subprocess.run(
        [sys.executable, __file__, tmp_path],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    quantizing, loading = json.loads(done.stdout.splitlines()[-1])
    assert loading < 0.6 * whole
    assert quantizing < 1.5 * whole


# --- what it says


@configs
def test_scores_are_near_those_of_the_float_model(saved, tmp_path, config):
    quantize(saved, tmp_path / "out", config)
    prompts = [make_prompt(seed, 12) for seed in range(6)]
    exact, near = (score(Bundle.load(folder), prompts) for folder in (saved, tmp_path / "out"))
    assert exact.std() > 0.03
    assert 0 < np.abs(near - exact).mean() < (0.03 if config.dtype == "int8" else 0.1)
    assert np.corrcoef(near, exact)[0, 1] > (0.99 if config.dtype == "int8" else 0.95)


@pytest.mark.parametrize("dtype", ["e4m3", "int8"])
def test_questions_score_together_as_one_by_one(saved, tmp_path, dtype):
    small = scorer(quantize(saved, tmp_path / "out", QuantizeConfig(dtype=dtype)))
    prompt = make_prompt(0, 12)
    together = small.score(prompt)
    alone = [dataclasses.replace(prompt, questions=(question,)) for question in prompt.questions]
    np.testing.assert_array_equal(together, [small.score(one)[0] for one in alone])


def test_text_is_generated(saved, tmp_path):
    bundle = quantize(saved, tmp_path / "out", QuantizeConfig())
    generator = Generator(bundle.model, bundle.params, slots=2, context=64)
    said = generator.generate([[3, 4, 5], [6, 7, 8, 9]], 5)
    assert [len(one) for one in said] == [5, 5]


# --- the head


def test_heads_of_less_than_float32_move_scores_and_make_ties(tokenizer):
    bundle = Bundle(DENSE, spread(DENSE), tokenizer, PromptConfig())
    prompts = [make_prompt(seed, 40) for seed in range(10)]
    found = {
        (product, logits): score(with_head(bundle, HeadPrecision(product=product, logits=logits)), prompts)
        for product in ("float32", "bfloat16", "e4m3")
        for logits in ("float32", "bfloat16")
    }
    exact = found["float32", "float32"]
    np.testing.assert_array_equal(exact, score(bundle, prompts))
    moved = {name: np.abs(scores - exact).mean() for name, scores in found.items()}
    different = {name: len(np.unique(scores)) for name, scores in found.items()}
    assert 0 < moved["bfloat16", "float32"] < moved["e4m3", "float32"] < 0.1
    # The rounding of the logits makes the ties, not that of the product.
    assert different["bfloat16", "float32"] > 0.9 * different["float32", "float32"]
    assert different["bfloat16", "bfloat16"] < 0.9 * different["float32", "float32"]


def test_all_that_reads_logits_has_the_precision_of_the_head(tokenizer):
    from brewjax.model.params import bind

    hidden = np.random.default_rng(0).standard_normal((3, 32)).astype(np.float32)
    model = DENSE.model_copy(update={"head": HeadPrecision(product="bfloat16", logits="bfloat16")})
    weights = spread(DENSE)
    logits = np.asarray(bind(model, weights).logits(hidden))
    rounded = lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)  # noqa: E731
    expected = rounded(hidden) @ rounded(weights["embedding"]).T
    np.testing.assert_array_equal(logits, rounded(logits))
    np.testing.assert_allclose(logits, expected, rtol=2**-8, atol=1e-6)


# --- what is refused


def test_what_is_quantised_is_not_quantised_pruned_or_exported(saved, tmp_path, prompts):
    bundle = quantize(saved, tmp_path / "out", QuantizeConfig())
    assert count(bundle.params) > count(Bundle.load(saved).params)  # the scales
    with pytest.raises(ConfigError, match="quantized: is quantised already"):
        quantize(tmp_path / "out", tmp_path / "again", QuantizeConfig())
    with pytest.raises(ConfigError, match="quantized: a quantised model is for serving; prune"):
        prune(bundle, prompts, PruneConfig(d_ff=16))
    with pytest.raises(CheckpointError, match="model 'tiny' is quantised; export the model that it was made from"):
        config_to_hf(bundle.model)
    with pytest.raises(ValueError, match="out exists"):
        quantize(saved, tmp_path / "out", QuantizeConfig())


def test_a_bundle_without_weights_leaves_nothing_behind(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "source")
    shutil.rmtree(tmp_path / "source" / "params")
    with pytest.raises(ValueError, match="no complete weights there"):
        quantize(tmp_path / "source", tmp_path / "out", QuantizeConfig())
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def main(folder: Path) -> None:
    """Prints by how many bytes quantising, and loading, raised the most that was ever resident."""

    def peak() -> int:
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

    if not (folder / "small").exists():
        quantize(folder / "whole", folder / "small", QuantizeConfig())
        start = peak()
    print(json.dumps([start, peak()]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
