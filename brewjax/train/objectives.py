"""Objectives: pure functions of a decoder and a batch. Each returns (sum of losses, number of targets)."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float

from brewjax.data.loader import TokenBatch
from brewjax.model.decoder import Decoder
from pallas_kernels.cross_entropy import linear_cross_entropy


def supervised(decoder: Decoder, batch: TokenBatch) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Cross-entropy of the label words: -log P(word | everything the question sees), natural log.

    A mixture of experts adds its load-balancing loss, once per target.
    """
    hidden, balance = decoder.with_balance(batch.tokens, batch.positions, batch.segments)
    rows = decoder.sharding.spec("batch", "length")
    axes = (*decoder.sharding.rules["batch"], *decoder.sharding.rules["length"])

    def local(hidden: Array, head: Array, targets: Array) -> tuple[Array, Array]:
        sums = linear_cross_entropy(hidden.reshape(-1, hidden.shape[-1]), head, targets.reshape(-1))
        return jax.lax.psum(sums, axes)

    loss, count = jax.shard_map(
        local,
        in_specs=(decoder.sharding.spec("batch", "length", "model"), jax.P(None, None), rows),
        out_specs=(jax.P(), jax.P()),
        check_vma=False,
    )(hidden, decoder.head.astype(hidden.dtype), decoder.sharding.reshard(batch.targets, "batch", "length"))
    return loss + balance * count, count
