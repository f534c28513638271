"""Temperatures that make a model's probabilities right, fitted on the validation period."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy.optimize import minimize_scalar

from brewjax.bundle.bundle import Bundle
from brewjax.evaluate.metrics import log_loss
from brewjax.evaluate.predict import TaskExamples, encode_examples
from brewjax.scoring.scorer import normalize_over_labels

LEAST, MOST = 0.1, 10.0  # temperatures that are tried


def fit_temperature(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Finds the temperature with the least log loss (Guo et al., ICML 2017).

    Args:
      probabilities: float [questions, labels], at temperature 1.
      labels: int [questions], the right answers.

    Returns:
      The temperature, from LEAST to MOST.
    """
    log_probs, ones = np.log(np.maximum(probabilities, np.finfo(np.float32).tiny)), np.ones(len(labels))

    def loss(log_temperature: float) -> float:
        return float(log_loss(normalize_over_labels(log_probs, np.exp(log_temperature)), labels, ones))

    return float(np.exp(minimize_scalar(loss, bounds=(np.log(LEAST), np.log(MOST)), method="bounded").x))


def calibrate(bundle: Bundle, tasks: Sequence[TaskExamples]) -> Bundle:
    """Fits a temperature for each task; those that the model had are forgotten.

    Args:
      bundle: the model.
      tasks: of the model's surfaces, which are named, with examples of the validation period. A task without examples
        has the temperature 1.

    Returns:
      The model with surfaces that have the temperatures.
    """
    forgotten = {name: dataclasses.replace(surface, temperatures={}) for name, surface in bundle.surfaces.items()}
    bundle = dataclasses.replace(bundle, surfaces=forgotten)
    encoded = [
        encode_examples(bundle, each.dataset, each.task, each.examples, each.surface) if each.examples else ([], [])
        for each in tasks
    ]
    prompts = [prompt for _, of_task in encoded for prompt in of_task]
    probabilities = iter(bundle.scorer(prompts).score_encoded(prompts))
    fitted: dict[str, dict[str, float]] = {name: {} for name in bundle.surfaces}
    for each, (examples, of_task) in zip(tasks, encoded, strict=True):
        if of_task:
            scored = np.concatenate([next(probabilities) for _ in of_task])
            labels = np.concatenate([example.labels for example in examples])
            fitted[each.surface][each.task.name] = round(fit_temperature(scored, labels), 4)
    surfaces = {
        name: dataclasses.replace(surface, temperatures=fitted[name]) for name, surface in bundle.surfaces.items()
    }
    return dataclasses.replace(bundle, surfaces=surfaces)
