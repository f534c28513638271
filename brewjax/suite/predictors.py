"""What answers questions: a model from its folder, or a baseline trained on the surface itself."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from brewjax.bundle.bundle import Bundle, check_folder
from brewjax.bundle.training import Training
from brewjax.data.simulate.truth import action_column, oracle
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tables.scales import Scales
from brewjax.data.tasks.examples import RankingExample, sample_examples
from brewjax.data.tasks.task import Task
from brewjax.evaluate.baselines import ORACLE, LightGBM, own_past, popularity
from brewjax.evaluate.predict import encode_examples
from brewjax.evaluate.regression import FactRegression
from brewjax.fingerprint import hash_folder, hash_packages
from brewjax.scoring.buckets import PACK_TO
from brewjax.scoring.passes import Bucket
from brewjax.scoring.scorer import Scorer

SHORTEST_ROW = 256  # tokens; rows double from here, whatever the prompts, so that scores do not depend on other tasks
DECIMALS = 6  # of a model's probabilities: what rounding makes of equal prompts at other positions is no order
MAX_TRAIN = 3_000  # examples of the training period that a baseline learns from, and of validation
DATA = ("data/tables", "data/tasks", "data/prompts", "data/text")
SCORING = (*DATA, "bundle", "scoring", "model", "../pallas_kernels")  # the code that makes a model's scores
BASELINE = (*DATA, "evaluate")
TRUTH = (*DATA, "data/simulate")

Cost = dict[str, float]  # of scoring: seconds and tokens
# Figures do not depend on the processor, some of which round what they multiply (see pallas_kernels/platform.py).
float32_products = functools.partial(jax.default_matmul_precision, "float32")


class Predictor(Protocol):
    """Answers the questions of any task."""

    name: str
    """On the leaderboard."""
    folder: Path | None
    """Of a model; None of a baseline."""
    training: Training | None
    """What a model was trained on, if it is known."""
    identity: dict[str, Any]
    """What its answers depend on, beside the questions, as values that JSON can hold."""

    def can_answer(self, dataset: Dataset, task: Task) -> bool:
        """Whether it can answer a task of these tables."""
        ...

    def predict(
        self, dataset: Dataset, task: Task, examples: Sequence[RankingExample], visible: Dataset
    ) -> tuple[np.ndarray, Cost]:
        """Answers every question.

        Args:
          dataset: the tables of the surface, to learn from.
          examples: rows of `visible`.
          visible: the tables as the questions know them; `dataset` itself, but for cold starts.

        Returns:
          Probabilities, float [questions, labels], in order, and what they cost.
        """
        ...


class Model:
    """A model of a folder, in its own style and token budget.

    Args:
      folder: of the model.
      name: on the leaderboard.
    """

    def __init__(self, folder: Path, name: str):
        check_folder(folder)
        self.name: str = name
        self.folder: Path | None = folder
        self.training = Training.of_model(folder)
        self.identity = {"model": hash_folder(folder), "code": hash_packages(SCORING), "decimals": DECIMALS}
        self._scorer: Scorer | None = None

    def can_answer(self, dataset: Dataset, task: Task) -> bool:
        """Any task."""
        return True

    @property
    def bundle(self) -> Bundle:
        """The model, loaded when it is first needed: a suite whose scores are all kept never loads it."""
        if self._scorer is None:
            assert self.folder is not None  # of a model
            self._bundle = Bundle.load(self.folder)
            longest, lengths = max(PACK_TO, self._bundle.prompts.max_tokens), [SHORTEST_ROW]
            while lengths[-1] < longest:
                lengths.append(2 * lengths[-1])
            with float32_products():
                self._scorer = self._bundle.make_scorer([Bucket(length) for length in lengths])
        return self._bundle

    def predict(
        self, dataset: Dataset, task: Task, examples: Sequence[RankingExample], visible: Dataset
    ) -> tuple[np.ndarray, Cost]:
        """See `Predictor`.

        Raises:
          ConfigError: a question is too long, and the task skips or refuses such.
        """
        bundle = self.bundle
        assert self._scorer is not None  # by `bundle`
        start_time = time.perf_counter()
        fitting, prompts = encode_examples(bundle, visible, task, examples, scales_of=dataset)
        skipped = sum(map(_size, examples)) - sum(map(_size, fitting))
        if skipped:
            message = f"{skipped} questions are too long for {self.name} and were skipped: a suite asks all or none"
            raise task.error(f"{message}; give 'truncate', or train with more max_tokens", "questions", "overlong")
        with float32_products():
            probabilities = np.round(np.concatenate(self._scorer.score_encoded(prompts)), DECIMALS)
        tokens = sum(len(prompt) for prompt in prompts)
        return probabilities, {"seconds": time.perf_counter() - start_time, "tokens": tokens}


def twin_gap(predictor: Predictor, dataset: Dataset, task: Task, examples: Sequence[RankingExample]) -> float:
    """The largest difference between the probabilities of a question that is asked twice in one prompt."""
    twice = [example.select(np.array([0, *range(_size(example))])) for example in examples]
    probabilities, _ = predictor.predict(dataset, task, twice, dataset)
    first = np.cumsum([0, *map(_size, twice)])[:-1]
    return float(np.abs(probabilities[first] - probabilities[first + 1]).max())


def _size(example: RankingExample) -> int:
    return len(example.candidates)


def _learning_examples(dataset: Dataset, task: Task) -> list[list[RankingExample]]:
    """What baselines learn from and are tuned on: examples of the training period, and of validation. Those of the
    latest task are kept, because every baseline needs them and some take long to draw."""
    latest = dataset.__dict__.setdefault("_learning_examples", {})
    if task.name not in latest:
        latest.clear()
        latest[task.name] = [sample_examples(dataset, task, split, MAX_TRAIN) for split in ("train", "validation")]
    return latest[task.name]


Learn = Callable[[Dataset, Task, Sequence[RankingExample], Sequence[RankingExample]], Callable[..., np.ndarray]]


class Baseline:
    """A baseline, which is trained on the surface for each task. It learns from at most MAX_TRAIN examples.

    Args:
      learn: makes, of the tables, the task, and examples of training and validation, a function of (tables, task,
        examples) that gives their probabilities.
    """

    def __init__(self, name: str, learn: Learn):
        self.name, self._learn = name, learn
        self.folder: Path | None = None
        self.training: Training | None = None
        self.identity = {"baseline": name, "max_train": MAX_TRAIN, "code": hash_packages(BASELINE)}
        self._latest: tuple[Dataset, Task, Callable[..., np.ndarray]] | None = None

    def can_answer(self, dataset: Dataset, task: Task) -> bool:
        """Any task."""
        return True

    def predict(
        self, dataset: Dataset, task: Task, examples: Sequence[RankingExample], visible: Dataset
    ) -> tuple[np.ndarray, Cost]:
        """See `Predictor`."""
        start_time = time.perf_counter()
        if not (self._latest and self._latest[0] is dataset and self._latest[1] == task):
            self._latest = dataset, task, self._learn(dataset, task, *_learning_examples(dataset, task))
        probabilities = self._latest[2](visible, task, examples)
        return probabilities, {"seconds": time.perf_counter() - start_time, "tokens": 0}


def _learn_popularity(
    dataset: Dataset, task: Task, train: Sequence[RankingExample], validation: Sequence[RankingExample]
) -> Callable[..., np.ndarray]:
    return lambda visible, task, examples: popularity(visible, task, train, examples)


def _learn_own_past(
    dataset: Dataset, task: Task, train: Sequence[RankingExample], validation: Sequence[RankingExample]
) -> Callable[..., np.ndarray]:
    return lambda visible, task, examples: own_past(visible, task, train, examples)


def _learn_regression(
    dataset: Dataset, task: Task, train: Sequence[RankingExample], validation: Sequence[RankingExample]
) -> Callable[..., np.ndarray]:
    return FactRegression.fit(dataset, task, train, Scales.fit(dataset, task.boundaries(dataset)[0])).predict


def _learn_trees(
    dataset: Dataset, task: Task, train: Sequence[RankingExample], validation: Sequence[RankingExample]
) -> Callable[..., np.ndarray]:
    return LightGBM.fit(dataset, task, train, validation, settings=1).predict


POPULARITY = "popularity"
FLOOR = "fact regression"  # a model below it cannot read its prompt
LEARNERS: dict[str, Learn] = {
    POPULARITY: _learn_popularity,
    "own past": _learn_own_past,
    FLOOR: _learn_regression,
    "LightGBM": _learn_trees,
}


class Oracle:
    """The truth of a simulated dataset, which no model can expect to beat; it knows nothing of other datasets."""

    name = ORACLE
    folder: Path | None = None
    training: Training | None = None

    def __init__(self) -> None:
        self.identity = {"baseline": ORACLE, "code": hash_packages(TRUTH)}

    def can_answer(self, dataset: Dataset, task: Task) -> bool:
        """Whether the dataset's folder holds the truth of the task."""
        return action_column(dataset, task) is not None

    def predict(
        self, dataset: Dataset, task: Task, examples: Sequence[RankingExample], visible: Dataset
    ) -> tuple[np.ndarray, Cost]:
        """See `Predictor`."""
        probabilities = oracle(visible, task, examples)
        assert probabilities is not None  # by `can_answer`
        return probabilities, {"seconds": 0.0, "tokens": 0}


def baselines() -> list[Predictor]:
    """Every baseline, and the oracle."""
    return [*(Baseline(name, learn) for name, learn in LEARNERS.items()), Oracle()]
