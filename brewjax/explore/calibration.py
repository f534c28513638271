"""`calibration`: do a model's probabilities match how often the label is the answer?"""

from __future__ import annotations

import dataclasses
import html
from typing import TYPE_CHECKING

import numpy as np

from brewjax.bundle.bundle import Bundle
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tasks.examples import sample_examples
from brewjax.data.tasks.task import Task
from brewjax.evaluate.metrics import calibration_error, ratio, reliability
from brewjax.evaluate.predict import encode_examples

if TYPE_CHECKING:
    import pandas as pd

    from brewjax.explore.plots import Plot


@dataclasses.dataclass(frozen=True, repr=False)
class Calibration:
    """A reliability diagram: questions in ten bins of equal size, by the probability of a label.

    Attributes:
      title: of the model and the task.
      label: the label word.
      predicted, observed: float64 [bins], mean probability and frequency of the label; ascending.
      questions: int64 [bins], how many.
      error: expected calibration error, see `brewjax.evaluate.metrics.calibration_error`; of all labels.
    """

    title: str
    label: str
    predicted: np.ndarray
    observed: np.ndarray
    questions: np.ndarray
    error: float

    def table(self) -> pd.DataFrame:
        """The bins as a table; `error` is half of the 95% interval of the observed frequency, by the binomial."""
        import pandas as pd

        columns = {"predicted": self.predicted, "observed": self.observed, "error": self.errors}
        return pd.DataFrame(columns | {"questions": self.questions})

    @property
    def errors(self) -> np.ndarray:
        """float64 [bins]: half of the 95% interval of each frequency, as if answers were independent."""
        return 1.96 * np.sqrt(self.observed * (1 - self.observed) / self.questions)

    def summary(self) -> str:
        """One sentence: the calibration error, and what it is measured on."""
        return f"{self.title}: calibration error {self.error:.3f} on {self.questions.sum():,} questions"

    def plot(self) -> Plot:
        """The frequency by the probability, with intervals; on the diagonal, probabilities are right."""
        from brewjax.explore.plots import plot_reliability

        return plot_reliability(self.summary(), self.label, self.predicted, self.observed, self.errors)

    def __repr__(self) -> str:
        return f"{self.summary()}\n{self.table()}"

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(self.summary())}</p>{self.table().round(3)._repr_html_()}"  # type: ignore[operator]


def measure_calibration(bundle: Bundle, dataset: Dataset, task: Task, max_examples: int, surface: str) -> Calibration:
    """Scores examples of a task's test period and sorts them into bins.

    Args:
      bundle: the model.
      dataset: the tables.
      task: whose test period is scored.
      max_examples: the most prompts.
      surface: of the model, by name; "" finds it by the dataset's card.

    Raises:
      ConfigError: the test period has no question, or all of them are too long.
    """
    examples = sample_examples(dataset, task, "test", max_examples)
    if not examples:
        raise task.error("no question falls into the test period", "split")
    examples, prompts = encode_examples(bundle, dataset, task, examples, surface)
    probabilities = np.concatenate(bundle.score_encoded(prompts)).astype(np.float64)
    labels = np.concatenate([example.labels for example in examples])
    label, ones = int(np.argmax(task.values)), np.ones(len(labels))
    predicted, observed, weight = reliability(probabilities[:, label], labels == label, ones)
    full = weight > 0
    return Calibration(
        title=f"{bundle.model.name}, {task.name}",
        label=task.words[label],
        predicted=ratio(predicted[full], weight[full]),
        observed=ratio(observed[full], weight[full]),
        questions=weight[full].astype(np.int64),
        error=float(calibration_error(probabilities, labels, ones)),
    )
