"""Makes golden_llama.npz: weights, input ids and logits of tiny random Hugging Face Llamas, one with a tied head.

Not run by the tests, which do without torch. In an environment of its own:
    pip install torch==2.13.0 transformers==5.23.0 numpy && python tests/model/make_golden.py
"""

from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

# No two sizes are equal, and nothing is at its default, so that nothing fits by accident.
SIZES = {
    "vocab_size": 40,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 28,
    "rms_norm_eps": 1e-3,
}
ROPE_BASE = 500.0


def main() -> None:
    arrays = {}
    for name, tied in (("tied", True), ("untied", False)):
        torch.manual_seed(0)
        rope = {"rope_type": "default", "rope_theta": ROPE_BASE}
        config = LlamaConfig(**SIZES, tie_word_embeddings=tied, rope_parameters=rope, attn_implementation="eager")
        model = LlamaForCausalLM(config).eval()
        with torch.no_grad():
            for path, weight in model.named_parameters():
                noise = torch.randn_like(weight)
                weight.copy_(1 + 0.3 * noise if "norm" in path else 0.25 * noise)
            ids = torch.randint(SIZES["vocab_size"], (2, 24))
            logits = model(ids).logits
        for path, weight in model.named_parameters():
            arrays[f"{name}/{path}"] = weight.detach().numpy()
        arrays |= {f"{name}/ids": ids.numpy(), f"{name}/logits": logits.numpy()}
    np.savez_compressed(Path(__file__).parent / "golden_llama.npz", **arrays)


if __name__ == "__main__":
    main()
