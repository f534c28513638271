"""`Recipe`: a YAML file with everything a run needs: data, tasks, model, prompts, training, evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pydantic
import yaml

from brewjax.config import Config
from brewjax.data.styles import PromptConfig
from brewjax.train.loop import TrainConfig


class TokenizerConfig(Config):
    """A tokenizer trained on the prompts, of `vocab_size` tokens, or the one in the folder `path`."""

    vocab_size: int | None = pydantic.Field(default=None, gt=300)
    path: str | None = None

    @pydantic.model_validator(mode="after")
    def _one_of(self) -> TokenizerConfig:
        if (self.vocab_size is None) == (self.path is None):
            raise ValueError("give either 'vocab_size' or 'path'")
        return self


class PrepareConfig(Config):
    """Training data.

    Attributes:
      passes: how often every example is said, each time in a style drawn anew.
      max_examples: of each task and pass; a random choice where there are more.
    """

    passes: int = pydantic.Field(default=1, gt=0)
    max_examples: int | None = pydantic.Field(default=None, gt=0)
    seed: int = 0


class EvaluateConfig(Config):
    """Evaluation on the test period.

    Attributes:
      max_examples: of each task; a random choice where there are more, the same for model and baselines.
      bootstrap: resamples of members behind each interval.
      baseline_settings: hyperparameter settings that LightGBM chooses from on the validation period.
    """

    max_examples: int | None = pydantic.Field(default=None, gt=0)
    bootstrap: int = pydantic.Field(default=200, gt=0)
    baseline_settings: int = pydantic.Field(default=8, gt=0)


class Plan(Config):
    """What `brewjax compile` compiles: the part of a recipe that needs no data. Paths are as in a recipe."""

    name: str
    model: str
    train: TrainConfig


class Recipe(Plan):
    """What `brewjax run` runs. Paths are relative to the current directory."""

    dataset: str
    tasks: tuple[str, ...]
    tokenizer: TokenizerConfig
    prompts: PromptConfig = PromptConfig()
    prepare: PrepareConfig = PrepareConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @pydantic.model_validator(mode="after")
    def _prompts_fit_rows(self) -> Recipe:
        if self.prompts.max_tokens > self.train.row_tokens:
            raise ValueError(
                f"prompts.max_tokens ({self.prompts.max_tokens}) is over train.row_tokens ({self.train.row_tokens}): "
                "a prompt must fit in a row"
            )
        return self


def load_plan(path: str | Path, overrides: Sequence[str] = ()) -> Plan:
    """A file with a recipe, or with only what a `Plan` has; each is refused where it would be as what it is."""
    path = Path(path)
    values = yaml.safe_load(path.read_text()) if path.is_file() else None
    whole = isinstance(values, dict) and "dataset" in values
    return (Recipe if whole else Plan).load(path, overrides)
