"""Pruning: removes neurons, KV heads with their query heads, experts and layers of a trained model.

Axis letters: N inputs of a matrix, D its outputs, G groups of inputs, S inputs that are kept, F neurons
(docs/glossary.md, "Axis letters").
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pydantic
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment

from brewjax.bundle.bundle import Bundle
from brewjax.compress.calibrate import Statistics, calibrate
from brewjax.compress.least_squares import choose, damp, group_rows, lost_share, resolve
from brewjax.config import Config
from brewjax.data.text.encode import EncodedPrompt
from brewjax.model.config import ModelConfig
from brewjax.model.params import Params, abstract_params
from brewjax.model.sharding import MeshConfig

Arrays = dict[str, Any]  # one layer's weights on the host, nested as in `Params`


def _size(value: float) -> float:
    if value <= 0 or (value >= 1 and value != int(value)):
        raise ValueError("give the size to keep (1, 2, ..), or the share to keep, between 0 and 1")
    return value


Size = Annotated[int | float, pydantic.AfterValidator(_size)]


class PruneConfig(Config):
    """The sizes of the smaller model, and how its parts are chosen."""

    layers: Size | None = None
    """Layers to keep: a number, or a share between 0 and 1; null for all."""
    kv_heads: Size | None = None
    """KV heads to keep, each with its query heads: a number, or a share between 0 and 1; null for all."""
    d_ff: Size | None = None
    """Neurons to keep of each MLP or expert: a number, or a share between 0 and 1; null for all."""
    experts: Size | None = None
    """Experts to keep of each layer, those with the most load: a number, or a share between 0 and 1; null for all."""
    method: Literal["least_squares", "activation", "magnitude"] = "least_squares"
    """How heads and neurons are chosen. least_squares: OSSCAR, which also re-solves the remaining weights; activation:
    by the squares of what each adds to the residual stream; magnitude: by the squares of its weights, which chooses
    layers too. Otherwise layers are chosen by block influence: 1 - the cosine of the residual stream before and after
    the layer (ShortGPT, Men et al. 2024, arXiv 2403.03853)."""
    fold_experts: bool = False
    """Averages each removed expert, by load and with matched neurons, into the remaining expert with the nearest router
    column (after M-SMoE, Li et al. 2024, arXiv 2310.01334), instead of dropping it."""
    swaps: int = pydantic.Field(default=64, ge=0)
    """Exchanges of a kept for a removed group that are tried in each matrix, after greedy removal."""
    damping: float = pydantic.Field(default=0.01, gt=0)
    """Added to the diagonal of X^T X, as a share of its mean."""
    examples: int = pydantic.Field(default=1024, gt=0)
    """Most calibration prompts to compute X^T X from."""
    mesh: MeshConfig = MeshConfig()
    """The devices, along the mesh axes."""

    @pydantic.model_validator(mode="after")
    def _prunes(self) -> PruneConfig:
        if not self.has_target():
            raise ValueError("give at least one of layers, kv_heads, d_ff and experts")
        return self

    def has_target(self) -> bool:
        """Whether any size is set."""
        return any((self.layers, self.kv_heads, self.d_ff, self.experts))

    def target(self, model: ModelConfig) -> ModelConfig:
        """Computes the sizes that remain.

        Args:
          model: to prune.

        Returns:
          The smaller model.

        Raises:
          ConfigError: `model` has less than a size, or is quantised.
        """
        if model.quantized:
            raise model.error("a quantised model is for serving; prune the one that it was made from", "quantized")

        def left(key: str, has: int) -> int:
            size = getattr(self, key)
            if size is None:
                return has
            if size > has:
                raise self.error(f"{size:g} are more than the {has} that model '{model.name}' has", key)
            return int(size) if size >= 1 else max(round(size * has), 1)

        if self.experts and not model.experts:
            raise self.error(f"model '{model.name}' is no mixture of experts", "experts")
        kv_heads = left("kv_heads", model.kv_heads)
        sizes: dict[str, Any] = {
            "layers": left("layers", model.layers),
            "kv_heads": kv_heads,
            "heads": kv_heads * (model.heads // model.kv_heads),
            "d_ff": left("d_ff", model.d_ff),
        }
        if mixture := model.experts:
            count = left("experts", mixture.num_experts)
            per_token = min(mixture.num_experts_per_tok, count)
            sizes["experts"] = mixture.model_copy(update={"num_experts": count, "num_experts_per_tok": per_token})
        return model.model_copy(update=sizes)


class LayerReport(NamedTuple):
    """Effect of pruning on one layer of the big model.

    Attributes:
      layer: index of the layer.
      attention, mlp: share of the squared output of heads and of neurons that is lost on the calibration prompts (see
        `least_squares.lost_share`); for a mixture the mean over the experts that stay.
      influence: score by which layers are chosen; the lowest are removed first.
    """

    layer: int
    attention: float
    mlp: float
    influence: float


def prune(
    bundle: Bundle,
    prompts: Iterable[EncodedPrompt],
    config: PruneConfig,
    on_layer: Callable[[LayerReport], None] = lambda report: None,
) -> Bundle:
    """Prunes the model of a bundle.

    Every matrix is re-solved for its inputs in the unpruned model, so one pass over the prompts serves all. Several
    processes solve different layers at the same time.

    Args:
      bundle: the model to prune.
      prompts: calibration prompts; at most `config.examples` are read.
      config: sizes and method.
      on_layer: called with the report of each layer.

    Returns:
      The bundle with the smaller model, an ordinary one.

    Raises:
      ConfigError: if the model has less than a size, or is quantised.
      ValueError: if there are no prompts.
    """
    examples = list(itertools.islice(prompts, config.examples))
    if not examples:
        raise ValueError("no prompts to calibrate on")
    big, small, mesh = bundle.model, config.target(bundle.model), config.mesh.build()
    params = jax.device_put(bundle.params, jax.tree.map(lambda leaf: leaf.sharding, abstract_params(big, mesh)))
    abstract, num_processes = abstract_params(small, mesh), jax.process_count()
    calibrated, layers, influences = calibrate(big, params, examples, mesh), [], []
    for first in range(0, big.layers, num_processes):
        numbers, local_layer = range(first, min(first + num_processes, big.layers)), first + jax.process_index()
        for layer_index, statistics in zip(numbers, calibrated, strict=False):
            weights = _layer(params, layer_index)  # by all processes together
            if layer_index == local_layer:
                local_inputs = weights, statistics
        solved = (
            _prune_layer(local_layer, *local_inputs, big, small, config)
            if local_layer in numbers
            else _placeholder_layer(abstract)
        )
        for layer_index in numbers:
            weights, report = multihost_utils.broadcast_one_to_all(solved, layer_index == local_layer)
            layers.append(_place_layer(weights, abstract))
            influences.append(report.influence)
            on_layer(report)
    kept_layers = np.sort(np.argsort(-np.array(influences), kind="stable")[: small.layers])
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract["layers"])
    with jax.set_mesh(mesh):
        stacked = jax.jit(_stack, out_shardings=shardings)([layers[layer_index] for layer_index in kept_layers])
    return dataclasses.replace(bundle, model=small, params={**params, "layers": stacked}, mesh=config.mesh)


def _layer(params: Params, number: int) -> Arrays:
    layer = jax.tree.map(lambda stack: stack[number], params["layers"])
    return multihost_utils.process_allgather(layer, tiled=True)


def _placeholder_layer(abstract: Params) -> tuple[Arrays, LayerReport]:
    """Zeros of the right shapes: what a process broadcasts for a layer that it did not solve."""
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape[1:], leaf.dtype), abstract["layers"])
    return zeros, LayerReport(0, 0.0, 0.0, 0.0)


def _place_layer(weights: Arrays, abstract: Params) -> Params:
    """A layer on the devices, sharded as in the smaller model."""

    def place(array: np.ndarray, stack: jax.ShapeDtypeStruct) -> jax.Array:
        sharding = NamedSharding(stack.sharding.mesh, jax.P(*stack.sharding.spec[1:]))
        return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)

    return jax.tree.map(place, weights, abstract["layers"])


def _stack(layers: list[Params]) -> Params:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


def _prune_layer(
    number: int, weights: Arrays, statistics: Statistics, big: ModelConfig, small: ModelConfig, config: PruneConfig
) -> tuple[Arrays, LayerReport]:
    influence = _influence(weights, statistics, config)
    weights, attention = _prune_heads(weights, statistics, small.kv_heads, big, config)
    weights, mlp = _prune_mlp(weights, statistics, small, config)
    return weights, LayerReport(number, attention, mlp, influence)


def _influence(weights: Arrays, statistics: Statistics, config: PruneConfig) -> float:
    if config.method == "magnitude":
        return float(sum(_square(leaf) for leaf in jax.tree.leaves(weights)))
    return float(1 - statistics.cosine / statistics.tokens)


def _square(x: np.ndarray) -> float:
    return float(np.sum(np.square(x, dtype=np.float64)))


def _prune_heads(
    weights: Arrays, statistics: Statistics, keep: int, model: ModelConfig, config: PruneConfig
) -> tuple[Arrays, float]:
    """The layer with `keep` KV heads, and the share of its attention's squared output that is lost."""
    D, K, H = model.d_model, model.kv_heads, model.heads
    if keep == K:
        return weights, 0.0
    output = weights["output"].reshape(-1, D).astype(np.float64)
    group_weights = {
        name: np.moveaxis(weights[name].astype(np.float64), 1, 0).reshape(K, -1) for name in ("query", "key", "value")
    }
    squares = sum(np.sum(w**2, 1) for w in group_weights.values()) + np.sum(output.reshape(K, -1) ** 2, 1)
    kept_groups, remaining, share = _keep(output, statistics.heads, squares, keep, config)
    query_heads = group_rows(kept_groups, H // K)
    smaller = dict(weights, output=remaining.reshape(-1, model.head_dim, D).astype(weights["output"].dtype))
    for name, heads in (("query", query_heads), ("key", kept_groups), ("value", kept_groups)):
        smaller[name] = weights[name][:, heads]
        if (bias := f"{name}_bias") in weights:
            smaller[bias] = weights[bias][heads]
    return smaller, share


def _prune_mlp(
    weights: Arrays, statistics: Statistics, small: ModelConfig, config: PruneConfig
) -> tuple[Arrays, float]:
    """The layer with fewer experts and neurons, and the share of the remaining experts' squared output that is lost."""
    if not small.experts:
        smaller, share = _prune_neurons(weights, statistics.neurons[0], small.d_ff, config)
        return smaller, share
    experts, grams = _prune_experts(weights["experts"], statistics, small.experts.num_experts, config.fold_experts)
    pairs = [
        _prune_neurons({name: experts[name][expert] for name in ("gate", "up", "down")}, gram, small.d_ff, config)
        for expert, gram in enumerate(grams)
    ]
    stacked = jax.tree.map(lambda *pruned: np.stack(pruned), *(pruned for pruned, _ in pairs))
    return dict(weights, experts=experts | stacked), float(np.mean([share for _, share in pairs]))


def _prune_neurons(mlp: Arrays, gram: Float[np.ndarray, "F F"], keep: int, config: PruneConfig) -> tuple[Arrays, float]:
    """An MLP's matrices with `keep` neurons (other weights unchanged), and the share of its output that is lost."""
    gate, up, down = (mlp[name].astype(np.float64) for name in ("gate", "up", "down"))
    if keep == len(down):
        return mlp, 0.0
    squares = np.sum(gate**2, 0) + np.sum(up**2, 0) + np.sum(down**2, 1)
    kept_neurons, remaining, share = _keep(down, gram, squares, keep, config)
    down = remaining.astype(mlp["down"].dtype)
    return dict(mlp, gate=mlp["gate"][:, kept_neurons], up=mlp["up"][:, kept_neurons], down=down), share


def _keep(
    weight: Float[np.ndarray, "N D"],
    gram: Float[np.ndarray, "N N"],
    squares: Float[np.ndarray, " G"],
    keep: int,
    config: PruneConfig,
) -> tuple[Int[np.ndarray, " keep"], Float[np.ndarray, "S D"], float]:
    """Chooses the groups of a matrix's rows to keep, by the config's method.

    Args:
      weight: the matrix.
      gram: X^T X of its inputs.
      squares: sum of squares of all the weights that belong to each group.
      keep: groups to keep.

    Returns:
      The groups in order; the rows that remain, re-solved by least_squares; the share of the output that is lost.
    """
    H, size = damp(gram, config.damping), len(weight) // len(squares)
    if config.method == "least_squares":
        kept_groups = choose(H, weight, size, keep, config.swaps)
        rows = group_rows(kept_groups, size)
        remaining = resolve(H, weight, rows)
    else:
        scores = squares if config.method == "magnitude" else _output_squares(gram, weight, size)
        kept_groups = np.sort(np.argsort(-scores, kind="stable")[:keep])
        rows = group_rows(kept_groups, size)
        remaining = weight[rows]
    return kept_groups, remaining, lost_share(gram, weight, rows, remaining)


def _output_squares(
    gram: Float[np.ndarray, "N N"], weight: Float[np.ndarray, "N D"], size: int
) -> Float[np.ndarray, " G"]:
    """The squared output of each group of rows, summed over all tokens."""
    groups = np.arange(len(weight) // size)
    blocks = gram.reshape(len(groups), size, len(groups), size)[groups, :, groups]
    rows = weight.reshape(len(groups), size, -1)
    return np.einsum("gid,gij,gjd->g", rows, blocks, rows)


def _prune_experts(
    experts: Arrays, statistics: Statistics, keep: int, fold: bool
) -> tuple[Arrays, Float[np.ndarray, "keep F F"]]:
    """The `keep` experts with the most load, and X^T X of each."""
    load, grams = statistics.load, statistics.neurons
    order = np.argsort(-load, kind="stable")
    kept_experts = np.sort(order[:keep])
    fewer = {name: (w[:, kept_experts] if name == "router" else w[kept_experts]) for name, w in experts.items()}
    if not fold or keep == len(load):
        return fewer, grams[kept_experts]
    router = experts["router"].astype(np.float64)
    router /= np.maximum(np.linalg.norm(router, axis=0), 1e-30)
    members: dict[int, list[int]] = {int(expert): [int(expert)] for expert in kept_experts}
    for dropped in order[keep:]:
        nearest = kept_experts[np.argmax(router[:, dropped] @ router[:, kept_experts])]
        members[int(nearest)].append(int(dropped))
    folded = []
    for index, group in enumerate(members.values()):
        shares = (load[group] + 1e-30) / np.sum(load[group] + 1e-30)
        neurons = [_match_neurons(experts, expert, group[0]) for expert in group]
        for name, axis in (("gate", 1), ("up", 1), ("down", 0)):
            aligned = [
                np.take(experts[name][expert], order, axis) for expert, order in zip(group, neurons, strict=True)
            ]
            fewer[name][index] = np.einsum("n,nij->ij", shares, np.asarray(aligned, np.float64))
        fewer["router"][:, index] = experts["router"][:, group].astype(np.float64) @ shares
        folded.append(sum(grams[expert][np.ix_(order, order)] for expert, order in zip(group, neurons, strict=True)))
    return fewer, np.stack(folded)


def _match_neurons(experts: Arrays, expert: int, target: int) -> Int[np.ndarray, " F"]:
    """The order of one expert's neurons in which they are most like those of the target expert."""
    similarity = sum(
        (w[target].T if name != "down" else w[target]).astype(np.float64)
        @ (w[expert] if name != "down" else w[expert].T).astype(np.float64)
        for name, w in ((name, experts[name]) for name in ("gate", "up", "down"))
    )
    return linear_sum_assignment(similarity, maximize=True)[1]
