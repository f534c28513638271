"""`Recipe`: a YAML file with everything a run needs: data, tasks, prompts, a model and the stages it goes through."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml

from brewjax.bundle.bundle import PROMPTS
from brewjax.compress.prune import PruneConfig
from brewjax.compress.quantize import QuantizeConfig
from brewjax.config import Config, Location, misplaced, misplaced_within
from brewjax.data.prompts.styles import PromptConfig
from brewjax.data.records.preferences import AlignConfig
from brewjax.data.records.pretrain import PretrainConfig
from brewjax.data.records.sft import SftConfig
from brewjax.model.config import ModelConfig
from brewjax.model.params import MODEL
from brewjax.model.sharding import MeshConfig
from brewjax.pipeline.ladder import Ladder, expand
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
    """Evaluation on the test period."""

    max_examples: int | None = pydantic.Field(default=None, gt=0)
    """Of each task; a random choice where there are more, the same for all models and baselines."""
    bootstrap: int = pydantic.Field(default=200, gt=0)
    """Resamples of members behind each interval."""
    baseline_settings: int = pydantic.Field(default=8, gt=0)
    """Hyperparameter settings that LightGBM chooses from on the validation period."""
    mesh: MeshConfig = MeshConfig()
    """That models score on."""


class _Stage(Config):
    """A step from one model to the next.

    Attributes:
      start: the stage whose model it goes on from, or the folder of any model: by default the stage before, and for
        the first one the recipe's `model`.
    """

    init_from: str | None = None


class _Trained(_Stage):
    """A stage that trains.

    Attributes:
      fresh: begins with random weights: in the shape of `start`'s model, if that is given.
    """

    from_scratch: bool = False
    train: TrainConfig
    """What differs from the recipe's `train`."""


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
    match_sizes_of: str | None = None

    def has_target(self) -> bool:
        return bool(self.match_sizes_of) or super().has_target()

    def config(self, like: ModelConfig | None) -> PruneConfig:
        """With the sizes of the model of the stage `like`."""
        if not like:
            return self
        sizes = {"layers": like.layers, "kv_heads": like.kv_heads, "d_ff": like.d_ff}
        return self.model_copy(update=sizes | ({"experts": like.experts.num_experts} if like.experts else {}))


class QuantizeStage(_Stage, QuantizeConfig):
    """Weights of 8 bits."""

    do: Literal["quantize"]


TrainedStage = PretrainStage | SftStage | AlignStage | DistillStage
Stage = TrainedStage | PruneStage | QuantizeStage
OTHER_FOLDERS = ("prepare", "baselines", "report")  # of a run, beside its stages'
TRAINING = ("pretrain", "sft", "align", "distill")
KINDS = (*TRAINING, "prune", "quantize")
Name = Annotated[str, pydantic.Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]  # of a folder


def _in_ladder(name: str, stages: dict[str, Any]) -> Location:
    """The keys that a stage of this name comes from: its own, or those of a ladder's rung."""
    for ladder, values in stages.items() if name not in stages else ():
        rungs = values.get("rungs") if isinstance(values, dict) else None
        for rung in rungs if isinstance(rungs, dict) else ():
            if name in (rung, f"sft-{rung}"):
                return "stages", ladder, "rungs", rung
            if name in (f"{rung}-pruned", f"sft-{rung}-pruned"):
                return "stages", ladder, "rungs", rung, "prune"
    return "stages", name


def _depth(values: Any, keys: Location) -> int:
    """How many of `keys`, each in the value of the one before, are there."""
    for depth, key in enumerate(keys):
        if not isinstance(values, dict) or key not in values:
            return depth
        values = values[key]
    return len(keys)


def _over(shared: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """`own`, and of `shared` what it does not say, group by group."""
    both = {key: _over(shared[key], own[key]) for key in shared.keys() & own.keys() if isinstance(own[key], dict)}
    return shared | own | both


class CompilePlan(Config):
    """What `brewjax compile` compiles: the part of a recipe that needs no data. Paths are as in a recipe."""

    name: str
    model: str
    train: TrainConfig


class Recipe(Config):
    """What `brewjax run` runs. Paths are relative to the current directory."""

    name: Name
    dataset: str
    tasks: tuple[str, ...] = pydantic.Field(min_length=1)
    model: str
    """A file with a model's config, or the folder of a model to go on from, with its tokenizer, and its prompts
    unless there are others."""
    tokenizer: TokenizerConfig | None = None
    """Where `model` is a file."""
    prompts: PromptConfig = PromptConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    train: dict[str, Any] = {}
    """What all stages that train share; each may say what differs."""
    stages: dict[Name, Annotated[Stage, pydantic.Field(discriminator="do")]] = pydantic.Field(min_length=1)
    """By name, in order. A `ladder` stands for many."""

    @classmethod
    def place(cls, location: Location, source: dict[str, Any]) -> Location:
        """Without the stage's kind, which pydantic puts behind its name; of a ladder's stage, the rung; and the
        recipe's own `train` where that has the key and the stage has not."""
        if location[:1] != ("stages",) or len(location) < 2:
            return location
        name, keys = location[1], location[2:]
        if keys and keys[0] in (*KINDS, "[key]"):
            keys = keys[1:]
        place = (*_in_ladder(str(name), source["stages"]), *keys)
        if keys[:1] == ("train",) and _depth(source, keys) > max(1, _depth(source, place) - len(place) + len(keys)):
            return keys
        return place

    @pydantic.model_validator(mode="before")
    @classmethod
    def _spell_out(cls, values: Any) -> Any:
        """Ladders as stages, what all training shares in each, and who goes on from whom."""
        shared = values.get("train") or {} if isinstance(values, dict) else None
        if not isinstance(shared, dict) or not isinstance(values.get("stages"), dict):
            return values
        stages: dict[str, Any] = {}
        model = values.get("model")
        before = model if isinstance(model, str) and Path(model).is_dir() else None
        for name, stage in values["stages"].items():
            new, last = {name: stage}, name
            if isinstance(stage, dict) and stage.get("do") == "ladder":
                try:
                    ladder = Ladder.model_validate({"init_from": before, **stage})
                except pydantic.ValidationError as error:
                    raise misplaced_within(error, "stages", name) from None
                new, last = (
                    expand(ladder, stages.get(ladder.init_from, {}), shared.get("steps", 0)),
                    [*ladder.rungs][-1],
                )
            for key, keys in new.items():
                if key in stages or key in OTHER_FOLDERS or key.startswith(("data-", "evaluate-")):
                    raise misplaced(f"the name '{key}' is taken; choose another", "stages", name)
                if isinstance(keys, dict):
                    own = keys.get("train") or {}
                    if keys.get("do") in TRAINING and isinstance(own, dict):
                        keys = keys | {"train": _over(shared, own)}
                    if not keys.get("from_scratch"):
                        keys = {"init_from": before} | keys
                stages[key] = keys
            before = last
        file = Path(str(model)) / PROMPTS
        prompts = {} if "prompts" in values or not file.is_file() else {"prompts": yaml.safe_load(file.read_text())}
        return values | {"stages": stages} | prompts

    @pydantic.model_validator(mode="after")
    def _one_tokenizer(self) -> Recipe:
        if (self.tokenizer is None) != Path(self.model).is_dir():
            raise misplaced("give 'tokenizer' where 'model' is a file, and none where it is a folder", "model")
        return self

    @pydantic.model_validator(mode="after")
    def _stages_follow(self) -> Recipe:
        earlier: list[str] = []
        for name, stage in self.stages.items():
            for key in ("init_from", "teacher", "match_sizes_of"):
                other = getattr(stage, key, None)
                if other is not None and other not in earlier and not (Path(other) / MODEL).is_file():
                    near = f"; before it there are: {', '.join(earlier)}" if earlier else ""
                    raise misplaced(f"no stage '{other}' before it, and no model there{near}", "stages", name, key)
            if stage.init_from is None and isinstance(stage, (AlignStage, PruneStage, QuantizeStage)):
                message = "there is no model to go on from; put it after another, or give 'start'"
                raise misplaced(message, "stages", name)
            if stage.init_from and self._is_quantised(stage.init_from):
                message = f"'{stage.init_from}' is quantised, for serving; go on from the model that it was made from"
                raise misplaced(message, "stages", name, "init_from")
            if isinstance(stage, TrainedStage):
                self._check_training(name, stage)
            earlier.append(name)
        return self

    def _check_training(self, name: str, stage: TrainedStage) -> None:
        train = stage.train
        if not isinstance(stage, PretrainStage) and self.prompts.max_tokens > train.seq_len:
            message = (
                f"seq_len ({train.seq_len}) is less than prompts.max_tokens ({self.prompts.max_tokens}): "
                "a prompt must fit in a row"
            )
            raise misplaced(message, "stages", name, "train", "seq_len")
        if train.lora and (stage.from_scratch or not stage.init_from):
            message = "adapters of a model that is there: give 'start', or put the stage after another"
            raise misplaced(message, "stages", name, "train", "lora")

    def _is_quantised(self, model: str) -> bool:
        """Of a stage, or of a folder."""
        if model in self.stages:
            return isinstance(self.stages[model], QuantizeStage)
        return ModelConfig.load(Path(model) / MODEL).quantized is not None


def load_plan(path: str | Path, overrides: Sequence[str] = ()) -> CompilePlan:
    """A file with a plan; or of a recipe its model, as its first stage that trains does."""
    path = Path(path)
    values = yaml.safe_load(path.read_text()) if path.is_file() else None
    if not isinstance(values, dict) or "dataset" not in values:
        return CompilePlan.load(path, overrides)
    recipe = Recipe.load(path, overrides)
    for stage in recipe.stages.values():
        if isinstance(stage, TrainedStage):
            return CompilePlan(name=recipe.name, model=recipe.model, train=stage.train)
    raise recipe.error("none of them trains", "stages")
