"""The training step on this CPU, side by side: ours, transformers + torch, Tunix and MaxText, same shapes and dtype.

    python -m benchmarks.train_race --torch TORCH/bin/python --tunix TUNIX/bin/python --maxtext MAXTEXT/bin/python

Each is a process in an environment of its own (`pip install torch transformers`; `google-tunix`; `maxtext[runner]`,
Python 3.12), compiled and warm before the race, and they take turns, so that what else the machine does falls on all.
A turn is one step of AdamW behind clipping, from random tokens on the host to the loss, on a Llama of random weights in
float32 that learns to predict every next token.

    ours     the step of `brewjax run`, a device for each core
    torch    what transformers' Trainer does in a step: SDPA attention, fused AdamW
    tunix    `PeftTrainer`'s step, all weights trained, nothing rematerialised
    maxtext  the step of its `train_loop`, nothing rematerialised
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROWS, LENGTH = 4, 512
VOCABULARY, WIDTH, LAYERS, HEADS, KV_HEADS, HEAD, NEURONS = 16_384, 512, 8, 8, 4, 64, 1536
RATE, DECAY, CLIP = 1e-3, 0.1, 1.0
CORES = os.cpu_count() or 1
WARM = 2  # rounds: the first compiles, and some the second too

Play = Callable[[list[list[int]]], float]  # tokens -> loss of the step


def ours() -> tuple[Play, int]:
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(CORES)}
    os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "float32"  # as the others
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding

    from brewjax.data.records.loader import TokenBatch
    from brewjax.data.text.encode import NO_TARGET
    from brewjax.model.config import ModelConfig
    from brewjax.model.params import init_params, num_parameters
    from brewjax.train.batches import BATCH_SPEC
    from brewjax.train.loop import TrainConfig, make_step
    from brewjax.train.objectives import supervised
    from brewjax.train.optimizer import OptimizerConfig
    from pallas_kernels.token_labels import ALL, TokenLabels

    sizes = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD, "d_ff": NEURONS, "tie_head": False}
    model = ModelConfig(name="race", vocab_size=VOCABULARY, d_model=WIDTH, layers=LAYERS, **sizes)
    adam = OptimizerConfig(learning_rate=RATE, warmup=0, schedule="constant", weight_decay=DECAY, clip=CLIP)
    config = TrainConfig(steps=1000, batch_size=ROWS, seq_len=LENGTH, optimizer=adam)
    mesh = config.mesh.build()
    jax.set_mesh(mesh)
    params = init_params(model, mesh, config.seed)
    parameters = num_parameters(params)
    opt_state = jax.jit(adam.build(config.steps).init)(params)
    state = {"params": params, "opt_state": opt_state, "step": jnp.zeros((), jnp.int32)}
    step = jax.jit(make_step(model, config, supervised), donate_argnums=0)
    del params, opt_state

    def play(rows: list[list[int]]) -> float:
        nonlocal state
        tokens = np.array(rows, np.int32)
        fill = lambda value: np.full_like(tokens, value)  # noqa: E731
        positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
        targets = np.concatenate([tokens[:, 1:], fill(NO_TARGET)[:, :1]], 1)
        token_labels, weights = TokenLabels(fill(1), fill(0), fill(ALL)), np.float32(targets != NO_TARGET)
        batch = TokenBatch(tokens, positions, token_labels, targets, weights, preference=fill(0), source=fill(0))
        placed = jax.device_put(jax.tree.map(lambda leaf: leaf[None], batch), NamedSharding(mesh, BATCH_SPEC))
        state, metrics = step(state, placed)
        return float(metrics["loss"])

    return play, parameters


def torch() -> tuple[Play, int]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(CORES)
    sizes = {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS}
    sizes |= {"hidden_size": WIDTH, "intermediate_size": NEURONS, "head_dim": HEAD, "vocab_size": VOCABULARY}
    config = LlamaConfig(**sizes, rms_norm_eps=1e-5, tie_word_embeddings=False, attn_implementation="sdpa")
    model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=DECAY, fused=True)

    def play(rows: list[list[int]]) -> float:
        tokens = torch.tensor(rows)
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return play, sum(parameter.numel() for parameter in model.parameters())


def tunix() -> tuple[Play, int]:
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    import numpy as np
    import optax
    from flax import nnx
    from tunix.models.llama3.model import Llama3, ModelConfig
    from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig, TrainingInput
    from tunix.sft.utils import build_positions_from_mask, make_causal_attn_mask

    config = ModelConfig(
        num_layers=LAYERS,
        vocab_size=VOCABULARY,
        embed_dim=WIDTH,
        hidden_dim=NEURONS,
        num_heads=HEADS,
        head_dim=HEAD,
        num_kv_heads=KV_HEADS,
        rope_theta=10_000,
        norm_eps=1e-5,
    )
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    optimizer = optax.chain(optax.clip_by_global_norm(CLIP), optax.adamw(RATE, 0.9, 0.95, weight_decay=DECAY))
    with mesh:
        model = Llama3(config, rngs=nnx.Rngs(0))
        trainer = PeftTrainer(model, optimizer, TrainingConfig(eval_every_n_steps=10**9, max_steps=1000))
        trainer = trainer.with_gen_model_input_fn(
            lambda batch: {
                "input_tokens": batch.input_tokens,
                "input_mask": batch.input_mask,
                "positions": build_positions_from_mask(batch.input_mask),
                "attention_mask": make_causal_attn_mask(batch.input_mask),
            }
        )
        step, _ = trainer.jit_train_and_eval_step()

    def play(rows: list[list[int]]) -> float:
        tokens = np.array(rows, np.int32)
        batch = TrainingInput(input_tokens=tokens, input_mask=np.ones_like(tokens, bool))
        with mesh:
            return float(step(batch)[0])

    return play, sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def maxtext() -> tuple[Play, int]:
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    import maxtext
    import numpy as np
    from flax import nnx
    from flax.core.spmd import logical_axis_rules
    from maxtext.trainers.pre_train.train import initialize, train_step
    from maxtext.utils import sharding
    from maxtext.utils.train_utils import jit_train_and_eval_step, setup_train_loop

    settings = {
        "run_name": "race",
        "hardware": "cpu",
        "skip_jax_distributed_system": True,
        "enable_checkpointing": False,
        "enable_tensorboard": False,
        "log_config": False,
        "base_output_directory": tempfile.mkdtemp(),
        "dataset_type": "synthetic",
        "vocab_size": VOCABULARY,
        "base_emb_dim": WIDTH,
        "base_num_decoder_layers": LAYERS,
        "base_num_query_heads": HEADS,
        "base_num_kv_heads": KV_HEADS,
        "head_dim": HEAD,
        "base_mlp_dim": NEURONS,
        "dtype": "float32",
        "attention": "dot_product",
        "remat_policy": "none",
        "scan_layers": False,
        "per_device_batch_size": ROWS,
        "max_target_length": LENGTH,
        "steps": 1000,
        "learning_rate": RATE,
        "warmup_steps_fraction": 0.0,
        "adam_weight_decay": DECAY,
        "gradient_clipping_threshold": CLIP,
    }
    base = Path(maxtext.__file__).parent / "configs" / "base.yml"
    config, recorder = initialize(["", str(base), *(f"{key}={value}" for key, value in settings.items())])
    _, _, shardings, _, mesh, *_, state = setup_train_loop(config, recorder)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(state.model, nnx.Param)))
    graph, state = nnx.split(state)
    of_params, shardings = sharding.maybe_update_params_sharding_with_opt(config, shardings)
    step, _ = jit_train_and_eval_step(
        config, graph, mesh, state, shardings, train_step, params_shardings=of_params
    )  # fmt: skip

    def play(rows: list[list[int]]) -> float:
        nonlocal state
        tokens = np.array(rows, np.int32)
        following, ones = np.roll(tokens, -1, 1), np.ones_like(tokens)
        positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
        weights = ones * (positions < LENGTH - 1)
        batch = {"inputs": tokens, "inputs_position": positions, "inputs_segmentation": ones}
        batch |= {"targets": following, "targets_position": positions, "targets_segmentation": weights}
        with jax.set_mesh(mesh), logical_axis_rules(config.logical_axis_rules):
            state, metrics = step(state, batch)
        return float(metrics["scalar"]["learning/loss"])

    return play, parameters


PLAYERS = {"ours": ours, "torch": torch, "tunix": tunix, "maxtext": maxtext}


def serve_turns(name: str) -> None:
    """A contestant: reads batches as JSON lines, writes the seconds, the loss and the peak memory of each step."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed is not an answer
    play, parameters = PLAYERS[name]()
    print(json.dumps({"parameters": parameters}), file=out, flush=True)
    for line in sys.stdin:
        rows = json.loads(line)
        start_time, busy = time.perf_counter(), time.process_time()
        loss = play(rows)
        turn = {"seconds": time.perf_counter() - start_time, "busy": time.process_time() - busy, "loss": loss}
        turn["gigabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        print(json.dumps(turn), file=out, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in list(PLAYERS)[1:]:
        parser.add_argument(f"--{name}", help=f"the Python that has {name}")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()

    import numpy as np
    from rich.console import Console
    from rich.table import Table

    players, parameters = {}, {}
    for name in PLAYERS:
        python = sys.executable if name == "ours" else getattr(arguments, name)
        if python is None:
            continue
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])} if name == "ours" else None
        command, pipe = [python, __file__, "--play", name], subprocess.PIPE
        player = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, env=environment
        )
        assert player.stdout
        if not (output := player.stdout.readline()):
            raise SystemExit(f"{name} did not start: {' '.join(command)}")
        players[name], parameters[name] = player, json.loads(output)["parameters"]

    rows = np.random.default_rng(0).integers(10, VOCABULARY, (ROWS, LENGTH)).tolist()  # the same, so that losses fall
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in players}
    for _ in range(WARM + arguments.rounds):
        for name, player in players.items():
            assert player.stdin
            assert player.stdout
            print(json.dumps(rows), file=player.stdin, flush=True)
            if not (output := player.stdout.readline()):
                raise SystemExit(f"{name} failed in step {len(turns[name]) + 1}")
            turns[name].append(json.loads(output))
    for player in players.values():
        player.communicate()

    shape = (
        f"{ROWS} x {LENGTH} tokens, {LAYERS} layers of {WIDTH}, {' / '.join({f'{n:,}' for n in parameters.values()})}"
    )
    title = f"{shape} parameters, float32, {CORES} cores: median of turns"
    table = Table(title=title)
    columns = ("", "step, s", "on all cores, s", "tokens/s", "x ours, time", "x ours, cores", "peak memory", "loss")
    for column in columns:
        table.add_column(column, justify="right")
    seconds, cores = (
        {name: np.array([turn[measure] for turn in turns[name][WARM:]]) for name in players}
        for measure in ("seconds", "busy")
    )
    for name, times in seconds.items():
        step, busy = float(np.median(times)), float(np.median(cores[name]))
        ratios = [f"{np.median(by_player[name] / by_player['ours']):.2f}" for by_player in (seconds, cores)]
        memory = f"{turns[name][-1]['gigabytes']:.2f} GB"
        losses = f"{turns[name][0]['loss']:.2f} to {turns[name][-1]['loss']:.2f}"
        table.add_row(name, f"{step:.2f}", f"{busy:.2f}", f"{ROWS * LENGTH / step:,.0f}", *ratios, memory, losses)
    Console(width=120).print(table)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--play"]:
        serve_turns(*sys.argv[2:])
    else:
        main()
