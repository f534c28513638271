"""What the arithmetic of the head does to the order of a model's items: a trained model's hidden states, scored again.

    python -m benchmarks.head_ties runs/demo/big/model data/movielens-100k configs/tasks/movielens/liked.yaml

Items of a prompt are ranked by the log-probability of the task's best answer, over the vocabulary or over the labels.
Against the order by float64, from the same float32 hidden states: pairs of a prompt that tie to the bit, pairs that are
ordered otherwise, those that do either of pairs closer than `CLOSE` in float64, and the AUC within the list. Pairs with
equal hidden states are left out.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from brewjax.bundle.bundle import Bundle
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tasks.examples import sample_examples
from brewjax.data.tasks.task import load_tasks
from brewjax.data.text.encode import EncodedPrompt
from brewjax.evaluate.metrics import gauc
from brewjax.evaluate.predict import encode_examples
from brewjax.model.params import bind
from brewjax.scoring.buckets import plan_passes
from brewjax.scoring.scorer import Scorer
from pallas_kernels.label_scores import label_log_probs

CLOSE = 0.01  # nats
LOOP = {"implementation": "xla"}
KERNEL = {"implementation": "tpu-interpreted"}
BFLOAT16 = {"logits_dtype": jnp.bfloat16}
# Name: the dtype of hidden states and head, arguments of `label_log_probs`, and whether it has a log-sum of its own.
ARITHMETIC: dict[str, tuple[Any, dict[str, Any], bool]] = {
    "float32 in truth": (jnp.float32, LOOP, False),
    "labels exact, log-sum of three parts": (jnp.float32, KERNEL | {"parts": 3}, True),
    "labels exact, log-sum of two parts (what scores are made of)": (jnp.float32, KERNEL | {"parts": 2}, True),
    "labels exact, log-sum of one part": (jnp.float32, KERNEL | {"parts": 1}, True),
    "all products in one bfloat16 pass, a TPU's default": (jnp.bfloat16, LOOP, False),
    "exact products, logits bfloat16": (jnp.float32, LOOP | BFLOAT16, False),
    "products and logits bfloat16": (jnp.bfloat16, LOOP | BFLOAT16, False),
}


def hidden_states(scorer: Scorer, prompts: Sequence[EncodedPrompt]) -> np.ndarray:
    """float32 [questions, D]: of each question's last token, in the order of the prompts."""
    by_prompt = [np.empty((len(prompt.questions), scorer.model.d_model), np.float32) for prompt in prompts]
    scorer._head = lambda params, hidden, labels, normalize_over: hidden  # type: ignore[assignment]
    for each in plan_passes(prompts, scorer.buckets):
        (hidden,) = np.asarray(scorer.dispatch([each]).log_probs, np.float32)
        start = 0
        for chunk in each.chunks:
            stop = start + len(chunk.questions)
            by_prompt[chunk.owner[0]][chunk.questions] = hidden[start:stop]
            start = stop
    return np.concatenate(by_prompt)


def exact(hidden: np.ndarray, head: np.ndarray, labels: Sequence[int], normalize_over: str) -> np.ndarray:
    logits = np.float64(hidden) @ np.float64(head).T
    words = logits if normalize_over == "vocabulary" else logits[:, labels]
    top = words.max(-1, keepdims=True)
    return logits[:, labels] - top - np.log(np.exp(words - top).sum(-1, keepdims=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="the folder of a float32 model")
    parser.add_argument("dataset", type=Path)
    parser.add_argument("task", type=Path)
    parser.add_argument("--examples", type=int, default=200)
    arguments = parser.parse_args()

    dataset, bundle = Dataset.load(arguments.dataset), Bundle.load(arguments.model)
    (task,) = load_tasks([arguments.task], dataset)
    _, prompts = encode_examples(bundle, dataset, task, sample_examples(dataset, task, "test", arguments.examples))
    hidden = hidden_states(bundle.scorer(prompts), prompts)
    with jax.set_mesh(bundle.mesh.build()):
        head = np.asarray(bind(bundle.model, bundle.params).lm_head, np.float32)
    labels, best = prompts[0].labels, int(np.argmax(task.values))
    group = np.repeat(np.arange(len(prompts)), [len(prompt.questions) for prompt in prompts])
    values = task.values[[answer for prompt in prompts for answer in prompt.answers]]
    pairs = map(_pairs, np.split(np.arange(len(group)), np.flatnonzero(np.diff(group)) + 1))
    first, second = (np.concatenate(rows) for rows in zip(*pairs, strict=True))
    differ = (hidden[first] != hidden[second]).any(-1)
    first, second = first[differ], second[differ]
    for normalize_over in ("vocabulary", "labels"):
        expected = exact(hidden, head, labels, normalize_over)[:, best]
        gap = expected[first] - expected[second]
        close = np.abs(gap) < CLOSE
        area = functools.partial(gauc, values=values, groups=group, weights=np.ones(len(group)))
        table = Table(
            "", "ties", "ordered otherwise", f"either, within {CLOSE}", "AUC less by", "moves by at most, nats",
            title=f"{task.name}, over the {normalize_over}: {len(group):,} questions, {len(gap):,} pairs, "
            f"{close.mean():.1%} within {CLOSE}; AUC by float64 {area(expected):.4f}",
        )  # fmt: skip
        for name, (dtype, how, of_log_sum) in ARITHMETIC.items():
            if of_log_sum and normalize_over == "labels":
                continue
            score = functools.partial(label_log_probs, normalize_over=normalize_over, **how)
            actual = jax.jit(score)(jnp.asarray(hidden, dtype), jnp.asarray(head, dtype), jnp.asarray(labels))
            scores = np.float64(actual[:, best])
            order = np.sign(scores[first] - scores[second])
            otherwise = (order != np.sign(gap)) & (order != 0)
            table.add_row(
                name,
                f"{(order == 0).mean():.2%}",
                f"{otherwise.mean():.3%}",
                f"{(otherwise | (order == 0))[close].mean():.1%}",
                f"{area(expected) - area(scores):+.5f}",
                f"{np.abs(scores - expected).max():.6f}",
            )
        Console(width=160).print(table)


def _pairs(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both rows of each pair."""
    first, second = np.triu_indices(len(rows), 1)
    return rows[first], rows[second]


if __name__ == "__main__":
    main()
