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
TINY = np.finfo(np.float32).tiny


def fit_temperature(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Finds the temperature with the least log loss (Guo et al., ICML 2017).

    Args:
      probabilities: float [questions, labels], at temperature 1.
      labels: int [questions], the right answers.

    Returns:
      The temperature, from LEAST to MOST.
    """
    log_probs, ones = np.log(np.maximum(probabilities, TINY)), np.ones(len(labels))

    def loss(log_temperature: float) -> float:
        return float(log_loss(normalize_over_labels(log_probs, np.exp(log_temperature)), labels, ones))

    return float(np.exp(minimize_scalar(loss, bounds=(np.log(LEAST), np.log(MOST)), method="bounded").x))


def robust_temperature(probabilities: np.ndarray, labels: np.ndarray, example: np.ndarray) -> float:
    """Fits a temperature that holds beyond the questions that it was fitted to.

    Args:
      probabilities: float [questions, labels], at temperature 1.
      labels: int [questions], the right answers.
      example: int [questions], of which example each question is.

    Returns:
      The temperature of all questions if, fitted to the even examples, it lowers the log loss of the odd ones, and the
      other way round; 1 otherwise: the model is as calibrated as these examples can tell.
    """
    for fold in (0, 1):
        fitted, held_out = example % 2 == fold, example % 2 != fold
        if not fitted.any() or not held_out.any():
            return 1.0
        temperature, ones = fit_temperature(probabilities[fitted], labels[fitted]), np.ones(held_out.sum())
        logits = np.log(np.maximum(probabilities[held_out], TINY))
        losses = [log_loss(normalize_over_labels(logits, each), labels[held_out], ones) for each in (1.0, temperature)]
        if losses[1] >= losses[0]:
            return 1.0
    return fit_temperature(probabilities, labels)


def calibrate(bundle: Bundle, tasks: Sequence[TaskExamples]) -> Bundle:
    """Fits a temperature for each task; those that the model had are forgotten.

    Args:
      bundle: the model.
      tasks: of the model's surfaces, which are named, with examples of the validation period. A task without examples
        has the temperature 1, and so has one whose examples cannot tell.

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
            example = np.repeat(np.arange(len(examples)), [len(entry.labels) for entry in examples])
            fitted[each.surface][each.task.name] = round(robust_temperature(scored, labels, example), 4)
    surfaces = {
        name: dataclasses.replace(surface, temperatures=fitted[name]) for name, surface in bundle.surfaces.items()
    }
    return dataclasses.replace(bundle, surfaces=surfaces)
