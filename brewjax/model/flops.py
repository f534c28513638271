"""Floating point operations of a model."""

from __future__ import annotations

from brewjax.model.config import ModelConfig


def model_flops(model: ModelConfig, rows: int, tokens: int, past: int = 0) -> tuple[float, float]:
    """FLOPs of one forward pass: two for each parameter that a token is multiplied with.

    The output head is left out: only tokens with a target, or with labels to score, go through it.

    Args:
      model: the shape of the decoder.
      rows, tokens: of the batch.
      past: cached tokens of a row.

    Returns:
      FLOPs outside kernels, and in kernels. In kernels are attention, as if every token attended to all before it (an
      upper limit), and a mixture's experts.
    """
    D, H, K, E, F = model.d_model, model.heads, model.kv_heads, model.head_dim, model.d_ff
    projections, mlp = D * E * (H + 2 * K) + H * E * D, 3 * D * F
    attention = 2 * H * E * tokens * (tokens / 2 + past)
    layers = 2 * model.layers * rows
    if model.experts:
        return layers * projections * tokens, layers * (attention + model.experts.num_experts_per_tok * mlp * tokens)
    return layers * (projections + mlp) * tokens, layers * attention
