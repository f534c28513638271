"""`Recipe`: a YAML file with everything a run needs: data, tasks, prompts, a model and the stages it goes through."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml

from brewjax.compress.ladder import Ladder, expand
from brewjax.compress.prune import PruneConfig
from brewjax.compress.quantize import QuantizeConfig
from brewjax.config import Config
from brewjax.data.preferences import AlignConfig
from brewjax.data.prose import PretrainConfig
from brewjax.data.styles import PromptConfig
from brewjax.data.training import SftConfig
from brewjax.model.config import ModelConfig
from brewjax.model.params import MODEL
from brewjax.model.sharding import MeshConfig
from brewjax.scoring.bundle import PROMPTS
from brewjax.train.align import Align
from brewjax.train.distill import Distill
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


class EvaluateConfig(Config):
    """Evaluation on the test period.

    Attributes:
      max_examples: of each task; a random choice where there are more, the same for all models and baselines.
      bootstrap: resamples of members behind each interval.
      baseline_settings: hyperparameter settings that LightGBM chooses from on the validation period.
      mesh: that models score on.
    """

    max_examples: int | None = pydantic.Field(default=None, gt=0)
    bootstrap: int = pydantic.Field(default=200, gt=0)
    baseline_settings: int = pydantic.Field(default=8, gt=0)
    mesh: MeshConfig = MeshConfig()


class _Stage(Config):
    """A step from one model to the next.

    Attributes:
      start: the stage whose model it goes on from, or the folder of any model: by default the stage before, and for
        the first one the recipe's `model`.
    """

    start: str | None = None


class _Trained(_Stage):
    """A stage that trains.

    Attributes:
      fresh: begins with random weights: in the shape of `start`'s model, if that is given.
      train: what differs from the recipe's `train`.
    """

    fresh: bool = False
    train: TrainConfig


class PretrainStage(_Trained):
    """Continued pre-training on the domain's text."""

    do: Literal["pretrain"]
    data: PretrainConfig = PretrainConfig()


class SftStage(_Trained):
    """Supervised fine-tuning."""

    do: Literal["sft"]
    data: SftConfig = SftConfig()


class AlignStage(_Trained):
    """Alignment to what members prefer. The reference is the model that it starts from."""

    do: Literal["align"]
    data: AlignConfig = AlignConfig()
    loss: Align = Align()


class DistillStage(_Trained):
    """Distillation from the model of the stage `teacher`, or of that folder."""

    do: Literal["distill"]
    teacher: str
    data: SftConfig = SftConfig()
    loss: Distill = Distill()


class PruneStage(_Stage, PruneConfig):
    """Structured pruning.

    Attributes:
      like: the stage to whose model's sizes it prunes, instead of to sizes of its own.
    """

    do: Literal["prune"]
    like: str | None = None

    def has_target(self) -> bool:
        return bool(self.like) or super().has_target()

    def config(self, like: ModelConfig | None) -> PruneConfig:
        """With the sizes of the model of the stage `like`."""
        if not like:
            return self
        sizes = {"layers": like.layers, "kv_heads": like.kv_heads, "d_ff": like.d_ff}
        return self.model_copy(update=sizes | ({"experts": like.experts.count} if like.experts else {}))


class QuantizeStage(_Stage, QuantizeConfig):
    """Weights of 8 bits."""

    do: Literal["quantize"]


TrainedStage = PretrainStage | SftStage | AlignStage | DistillStage
Stage = TrainedStage | PruneStage | QuantizeStage
OTHER_FOLDERS = ("prepare", "baselines", "report")  # of a run, beside its stages'


def _over(shared: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """`own`, and of `shared` what it does not say, group by group."""
    both = {key: _over(shared[key], own[key]) for key in shared.keys() & own.keys() if isinstance(own[key], dict)}
    return shared | own | both


class Plan(Config):
    """What `brewjax compile` compiles: the part of a recipe that needs no data. Paths are as in a recipe."""

    name: str
    model: str
    train: TrainConfig


class Recipe(Config):
    """What `brewjax run` runs. Paths are relative to the current directory.

    Attributes:
      model: a file with a model's config, or the folder of a model to go on from, with its tokenizer, and its prompts
        unless there are others.
      tokenizer: where `model` is a file.
      train: what all stages that train share; each may say what differs.
      stages: by name, in order. A `ladder` stands for many.
    """

    name: str
    dataset: str
    tasks: tuple[str, ...]
    model: str
    tokenizer: TokenizerConfig | None = None
    prompts: PromptConfig = PromptConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    train: dict[str, Any] = {}
    stages: dict[str, Annotated[Stage, pydantic.Field(discriminator="do")]] = pydantic.Field(min_length=1)

    @classmethod
    def place(cls, location: tuple[str | int, ...]) -> tuple[str | int, ...]:
        """Without what a stage is, which pydantic puts behind its name."""
        return location[:2] + location[3:] if location[:1] == ("stages",) else location

    @pydantic.model_validator(mode="before")
    @classmethod
    def _spell_out(cls, values: Any) -> Any:
        """Ladders as stages, what all training shares in each, and who goes on from whom."""
        if not isinstance(values, dict) or not isinstance(values.get("stages"), dict):
            return values
        shared = values.get("train") or {}
        stages: dict[str, Any] = {}
        model = values.get("model")
        before = model if isinstance(model, str) and Path(model).is_dir() else None
        for name, stage in values["stages"].items():
            new, last = {name: stage}, name
            if isinstance(stage, dict) and stage.get("do") == "ladder":
                ladder = Ladder.model_validate({"start": before, **stage})
                new, last = expand(ladder, stages.get(ladder.start, {}), shared.get("steps", 0)), [*ladder.rungs][-1]
            for key, one in new.items():
                if key in stages or key in OTHER_FOLDERS:
                    raise ValueError(f"stages.{name}: the name '{key}' is taken; choose another")
                if isinstance(one, dict):
                    if one.get("do") in ("pretrain", "sft", "align", "distill"):
                        one = one | {"train": _over(shared, one.get("train") or {})}
                    if not one.get("fresh"):
                        one = {"start": before} | one
                stages[key] = one
            before = last
        said = Path(str(model)) / PROMPTS
        prompts = {} if "prompts" in values or not said.is_file() else {"prompts": yaml.safe_load(said.read_text())}
        return values | {"stages": stages} | prompts

    @pydantic.model_validator(mode="after")
    def _one_tokenizer(self) -> Recipe:
        if (self.tokenizer is None) != Path(self.model).is_dir():
            raise ValueError("give 'tokenizer' where 'model' is a file, and none where it is a folder")
        return self

    @pydantic.model_validator(mode="after")
    def _stages_follow(self) -> Recipe:
        seen: list[str] = []
        for name, stage in self.stages.items():
            for key in ("start", "teacher", "like"):
                other = getattr(stage, key, None)
                if other is not None and other not in seen:
                    if (Path(other) / MODEL).is_file():
                        continue
                    near = f"; before it there are: {', '.join(seen)}" if seen else ""
                    raise ValueError(f"stages.{name}.{key}: no stage '{other}' before it, and no model there{near}")
            if stage.start is None and isinstance(stage, (AlignStage, PruneStage, QuantizeStage)):
                raise ValueError(
                    f"stages.{name}: there is no model to go on from; put it after another, or give 'start'"
                )
            if stage.start and self._is_quantised(stage.start):
                raise ValueError(
                    f"stages.{name}.start: '{stage.start}' is quantised, for serving; go on from the model that it was "
                    "made from"
                )
            seen.append(name)
            train = getattr(stage, "train", None)
            if train and not isinstance(stage, PretrainStage) and self.prompts.max_tokens > train.row_tokens:
                raise ValueError(
                    f"prompts.max_tokens ({self.prompts.max_tokens}) is over row_tokens ({train.row_tokens}) of stage "
                    f"'{name}': a prompt must fit in a row"
                )
        return self

    def _is_quantised(self, model: str) -> bool:
        """Of a stage, or of a folder."""
        if model in self.stages:
            return isinstance(self.stages[model], QuantizeStage)
        return ModelConfig.load(Path(model) / MODEL).quantized is not None


def load_plan(path: str | Path, overrides: Sequence[str] = ()) -> Plan:
    """A file with a plan; or of a recipe its model, as its first stage that trains does."""
    path = Path(path)
    values = yaml.safe_load(path.read_text()) if path.is_file() else None
    if not isinstance(values, dict) or "dataset" not in values:
        return Plan.load(path, overrides)
    recipe = Recipe.load(path, overrides)
    for stage in recipe.stages.values():
        if isinstance(stage, TrainedStage):
            return Plan(name=recipe.name, model=recipe.model, train=stage.train)
    raise recipe.error("none of them trains", "stages")
