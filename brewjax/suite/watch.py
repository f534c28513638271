"""A suite that is run on a model while it is trained."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import numpy as np
import pydantic

from brewjax.config import Config, Words, suggest
from brewjax.console import plain_console
from brewjax.model.params import Params
from brewjax.paths import write_text
from brewjax.suite.board import HEADLINE, make_board
from brewjax.suite.predictors import Model
from brewjax.suite.runs import answer
from brewjax.suite.suite import Suite

RESULTS = "suite.jsonl"  # in a stage's folder


class WatchConfig(Config):
    """A suite's quick questions, asked of a ranker every so many steps of its training."""

    ALIASES: ClassVar = {"file": "suite", "steps": "every"}

    suite: Words
    """The suite's file; what `brewjax suite fetch` makes for it must be there."""
    every: int = pydantic.Field(gt=0)
    """Steps from one run of the suite to the next."""
    surfaces: tuple[str, ...] = ()
    """Some of the suite's surfaces; by default all."""
    tolerance: float = pydantic.Field(default=0.02, ge=0, le=1)
    """A stage is stopped when its AUC within the list, a mean over domains, is below its best by more than this, twice
    in a row."""

    def check(self) -> None:
        """Checks that the suite can be run; all its tables are read.

        Raises:
          ConfigError: the suite is wrong, it has no such surface, or one of its datasets is not there.
        """
        suite = Suite.load(self.suite)
        for index, name in enumerate(self.surfaces):
            if name not in suite.surfaces:
                message = f"{self.suite} has no surface '{name}'; {suggest(name, suite.surfaces)}"
                raise self.error(message, "surfaces", index)
        for name in self.surfaces or suite.surfaces:
            suite.load_surface(name)


class Watch:
    """Runs a suite on the parameters of a training run, and stops what gets worse.

    Args:
      config: which suite, and when.
      folder: of the stage; gets a line of RESULTS for each run.
      save: writes parameters as a model's folder.
    """

    def __init__(self, config: WatchConfig, folder: Path, save: Callable[[Params, Path], None]):
        self._config, self._folder, self._save = config, folder, save
        self._suite = Suite.load(config.suite)

    def __call__(self, step: int, make_params: Callable[[], Params]) -> None:
        """Runs the suite after a step, if its turn has come.

        Args:
          step: that was just trained.
          make_params: makes the parameters after it.

        Raises:
          ValueError: the model got worse, see `WatchConfig.tolerance`.
        """
        if step % self._config.every:
            return
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            self._save(make_params(), Path(folder) / "model")
            model = Model(Path(folder) / "model", f"{self._folder.name}@{step}")
            (entry,) = answer(self._suite, "quick", [model], self._config.surfaces or None)
        (row,) = make_board(self._suite, "quick", [entry]).rows
        domains = {name: estimates[HEADLINE].value for name, estimates in row.domains.items()}
        path = self._folder / RESULTS
        earlier = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        results = [result for result in earlier if result["step"] < step]  # a run that was killed comes here again
        results.append({"step": step, "mean": float(np.mean([*domains.values()])), "domains": domains})
        write_text(path, "".join(json.dumps(result) + "\n" for result in results))
        plain_console().print(f"step {step}: {self._suite.name}: {results[-1]['mean']:.4f} of {len(domains)} domains")
        best = max(results, key=lambda result: result["mean"])
        latest = [result["mean"] for result in results[-2:]]
        if len(latest) == 2 and max(latest) < best["mean"] - self._config.tolerance:
            raise ValueError(
                f"{self._folder.name}: stopped at step {step}, because it got worse than at step {best['step']}: "
                f"{self._suite.name} had a mean AUC of {best['mean']:.4f} then, and has {latest[0]:.4f} and "
                f"{latest[1]:.4f}; change the training, or evaluate.watch.tolerance"
            )
