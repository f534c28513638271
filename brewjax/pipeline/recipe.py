"""`Recipe`: a YAML file with everything a run needs: surfaces, prompts, a model and the stages it goes through."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pydantic
import yaml

from brewjax.bundle.bundle import PROMPTS
from brewjax.compress.prune import PruneConfig
from brewjax.compress.quantize import QuantizeConfig
from brewjax.config import Config, Location, Words, misplaced, misplaced_within
from brewjax.data.prompts.styles import STYLES, PromptConfig
from brewjax.data.records.contrastive import ContrastiveConfig
from brewjax.data.records.preferences import AlignConfig
from brewjax.data.records.pretrain import PretrainConfig
from brewjax.data.records.sft import SftConfig
from brewjax.model.config import ModelConfig
from brewjax.model.params import MODEL
from brewjax.model.sharding import MeshConfig
from brewjax.pipeline.ladder import Ladder, expand
from brewjax.retrieve.encoder import ENCODER
from brewjax.suite.watch import WatchConfig
from brewjax.train.align import Align
from brewjax.train.contrastive import Contrastive
from brewjax.train.distill import Distill
from brewjax.train.loop import TrainConfig


class TokenizerConfig(Config):
    """A tokenizer trained on the prompts, of `vocab_size` tokens, or the one in the folder `path`."""

    vocab_size: int | None = pydantic.Field(default=None, gt=300)
    """Tokens of a byte-level BPE that is trained on prompts of the training period."""
    path: str | None = None
    """A folder with a `tokenizer.json`, which is used as it is."""

    @pydantic.model_validator(mode="after")
    def _exactly(self) -> TokenizerConfig:
        if (self.vocab_size is None) == (self.path is None):
            raise ValueError("give either 'vocab_size' or 'path'")
        return self


class EvaluateConfig(Config):
    """Evaluation on the test period."""

    max_examples: int | None = pydantic.Field(default=None, gt=0)
    """Examples of each task; a random choice where there are more, the same for all models and baselines."""
    bootstrap: int = pydantic.Field(default=200, gt=0)
    """Resamples of members behind each interval."""
    baseline_settings: int = pydantic.Field(default=8, gt=0)
    """Hyperparameter settings of LightGBM that are compared on the validation period."""
    budgets: tuple[pydantic.PositiveInt, ...] = ()
    """Token budgets within which the last ranker answers the same questions once more, as a curve in the report: what a
    longer history is worth. The smallest, with hardly an event, is what the others are compared with."""
    budget_style: str = "compact"
    """The style of these prompts, one with a history."""
    mesh: MeshConfig = MeshConfig()
    """The mesh that models are scored on."""
    watch: WatchConfig | None = None
    """A suite that is run while rankers are trained; it stops what gets worse. Only where one process trains."""

    @pydantic.field_validator("budget_style")
    @classmethod
    def _has_history(cls, style: str) -> str:
        with_history = [name for name, each in STYLES.items() if each.history]
        if style not in with_history:
            raise ValueError(f"no style '{style}' with a history; styles: {', '.join(with_history)}")
        return style


class RecipeSurface(Config):
    """A dataset and the tasks that are trained on it, which split time alike."""

    ALIASES: ClassVar = {"data": "dataset", "task": "tasks", "share": "weight"}

    dataset: Words
    """A dataset folder."""
    tasks: tuple[str, ...] = pydantic.Field(min_length=1)
    """Task files, or patterns that fit several, such as configs/tasks/movielens/*.yaml."""
    weight: float = pydantic.Field(default=1.0, gt=0)
    """By which the shares of its tasks in training are multiplied, beside the others'; see `mix` of a stage's data."""


class _Stage(Config):
    """A step from one model to the next."""

    init_from: str | None = None
    """The stage whose model this one starts from, or the folder of any model; the stage before by default, and the
    recipe's `model` for the first stage."""
    calibrate: int | None = pydantic.Field(default=None, gt=0)
    """Fits a temperature for each task to at most so many examples of the validation period, for probabilities that are
    right; a ranking model's folder has them, and whatever scores with it divides its logits by them."""


class _Trained(_Stage):
    """A stage that trains."""

    from_scratch: bool = False
    """Train from random weights, in the sizes of the model of `init_from` if that is given."""
    train: TrainConfig
    """Settings that differ from the recipe's `train`."""


class PretrainStage(_Trained):
    """Continued pre-training on the domain's text."""

    do: Literal["pretrain"]
    """Continued pre-training on text."""
    data: PretrainConfig = PretrainConfig()
    """The text that is trained on."""


class SftStage(_Trained):
    """Supervised fine-tuning."""

    do: Literal["sft"]
    """Supervised fine-tuning on the recipe's tasks."""
    data: SftConfig = SftConfig()
    """How training records are made of the tasks' examples."""
    soft_label_weight: float = pydantic.Field(default=0.9, ge=0, le=1)
    """Weight of the divergence from `data.soft_labels`, if there are any; the answers' cross-entropy has the rest."""


class AlignStage(_Trained):
    """Alignment to what members prefer. The reference is the model that it starts from."""

    do: Literal["align"]
    """Preference alignment (DPO) of the model of `init_from`, which is also its reference."""
    data: AlignConfig = AlignConfig()
    """How lists of chosen and rejected candidates are made."""
    loss: Align = Align()
    """The preference loss."""


class DistillStage(_Trained):
    """Distillation from the model of the stage `teacher`, or of that folder."""

    do: Literal["distill"]
    """Distillation from a teacher."""
    teacher: str
    """The stage whose model is the teacher, or the folder of any model with the same tokenizer."""
    data: SftConfig = SftConfig()
    """How training records are made of the tasks' examples."""
    loss: Distill = Distill()
    """The distillation loss."""


class ContrastiveStage(_Trained):
    """Contrastive training of an encoder of members and items, for retrieval."""

    do: Literal["contrastive"]
    """Contrastive training of an encoder of members and items, for retrieval."""
    data: ContrastiveConfig = ContrastiveConfig()
    """How training records are made of a task's examples, and what members' and items' texts say."""
    loss: Contrastive = Contrastive()
    """The contrastive loss, and how a text becomes a vector."""


class PruneStage(_Stage, PruneConfig):
    """Structured pruning."""

    do: Literal["prune"]
    """Structured pruning of the model of `init_from`."""
    match_sizes_of: str | None = None
    """The stage to whose model's sizes this one prunes, instead of to sizes of its own."""

    def has_target(self) -> bool:
        return bool(self.match_sizes_of) or super().has_target()

    def config(self, target: ModelConfig | None) -> PruneConfig:
        """The settings, with the sizes of the model `target` of `match_sizes_of` where there is one."""
        if not target:
            return self
        sizes = {"layers": target.layers, "kv_heads": target.kv_heads, "d_ff": target.d_ff}
        return self.model_copy(update=sizes | ({"experts": target.experts.num_experts} if target.experts else {}))


class QuantizeStage(_Stage, QuantizeConfig):
    """Weights of 8 bits."""

    do: Literal["quantize"]
    """Quantisation of the model of `init_from` to 8 bits."""


TrainedStage = PretrainStage | SftStage | AlignStage | DistillStage | ContrastiveStage
Stage = TrainedStage | PruneStage | QuantizeStage
OTHER_FOLDERS = ("prepare", "baselines", "report")  # of a run, which no stage may be called after
TRAINING: dict[str, type[TrainedStage]] = {
    "pretrain": PretrainStage,
    "sft": SftStage,
    "align": AlignStage,
    "distill": DistillStage,
    "contrastive": ContrastiveStage,
}
KINDS: dict[str, type[Stage]] = {**TRAINING, "prune": PruneStage, "quantize": QuantizeStage}
Name = Annotated[str, pydantic.Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]  # of a folder


def _in_ladder(name: str, stages: dict[str, Any]) -> Location:
    """The keys of the file that define the stage `name`: its own, or those of a ladder's rung."""
    for ladder, values in stages.items() if name not in stages else ():
        rungs = values.get("rungs") if isinstance(values, dict) else None
        for rung in rungs if isinstance(rungs, dict) else ():
            if name in (rung, f"sft-{rung}"):
                return "stages", ladder, "rungs", rung
            if name in (f"{rung}-pruned", f"sft-{rung}-pruned"):
                return "stages", ladder, "rungs", rung, "prune"
    return "stages", name


def _depth(values: Any, keys: Location) -> int:
    """The number of leading `keys` that can be looked up, each in the value of the key before it."""
    for depth, key in enumerate(keys):
        if not isinstance(values, dict) or key not in values:
            return depth
        values = values[key]
    return len(keys)


def _merge(shared: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """`overrides`, and `shared` where these have no value, group by group."""
    groups = {
        key: _merge(shared[key], overrides[key])
        for key in shared.keys() & overrides.keys()
        if isinstance(shared[key], dict) and isinstance(overrides[key], dict)
    }
    return shared | overrides | groups


class CompilePlan(Config):
    """What `brewjax compile` compiles: the part of a recipe that needs no data. Paths are as in a recipe."""

    name: str
    """A name, for people."""
    model: str
    """A file with a model's config."""
    train: TrainConfig
    """Settings of the training step."""


class Recipe(Config):
    """What `brewjax run` runs. Paths are relative to the current directory."""

    ALIASES: ClassVar = {"datasets": "surfaces"}

    name: Name
    """The run's name; its outputs are in runs/NAME by default."""
    surfaces: dict[Name, RecipeSurface] = {}
    """What the model learns, all of it at once: by name, datasets and the tasks of each. Where there are several, a
    task is named with its surface: jobs/applies."""
    dataset: str | None = None
    """In place of `surfaces`, where there is one: its dataset folder. Its name is that on the card."""
    tasks: tuple[str, ...] = ()
    """Beside `dataset`: task files, or patterns that fit several, such as configs/tasks/movielens/*.yaml."""
    model: str
    """A file with a model's config, or the folder of a model to start from; its tokenizer is used, and its prompts
    unless the recipe has its own."""
    tokenizer: TokenizerConfig | None = None
    """The tokenizer, where `model` is a file; a model's folder has one."""
    prompts: PromptConfig = PromptConfig()
    """How prompts are rendered."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """How every stage's model is evaluated."""
    train: dict[str, Any] = {}
    """Training settings shared by all stages that train; a stage's own `train` overrides them key by key."""
    stages: dict[Name, Annotated[Stage, pydantic.Field(discriminator="do")]] = pydantic.Field(min_length=1)
    """The stages by name, in order. A `ladder` stands for many."""

    @classmethod
    def place(cls, location: Location, source: dict[str, Any]) -> Location:
        """Maps a location in the recipe to the keys of its file, for errors.

        It drops the stage's kind, which pydantic puts behind its name, and maps a ladder's stage to its rung, and
        training settings that only the recipe's own `train` spells out to that.

        Args:
          location: keys that lead to the field.
          source: the values of the file.

        Returns:
          The keys in the file.
        """
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
        """Expands ladders into stages, and fills in each stage's shared training settings and `init_from`."""
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
                    overrides = keys.get("train") or {}
                    if keys.get("do") in [*TRAINING] and isinstance(overrides, dict):
                        keys = keys | {"train": _merge(shared, overrides)}
                    if not keys.get("from_scratch"):
                        keys = {"init_from": before} | keys
                stages[key] = keys
            before = last
        file = Path(str(model)) / PROMPTS
        prompts = {} if "prompts" in values or not file.is_file() else {"prompts": yaml.safe_load(file.read_text())}
        return values | {"stages": stages} | prompts

    @pydantic.model_validator(mode="after")
    def _some_surface(self) -> Recipe:
        if self.surfaces and (self.dataset or self.tasks):
            raise misplaced("give 'surfaces', or the 'dataset' and 'tasks' of one, not both", "surfaces")
        if not self.surfaces:
            for key in ("dataset", "tasks"):
                if not getattr(self, key):
                    raise misplaced("missing; give 'dataset' and 'tasks', or 'surfaces'", key)
        return self

    @pydantic.model_validator(mode="after")
    def _encoders_have_no_labels(self) -> Recipe:
        for name, stage in self.stages.items():
            if isinstance(stage, ContrastiveStage) and stage.calibrate:
                raise misplaced("an encoder has no labels to calibrate", "stages", name, "calibrate")
        return self

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
                source = getattr(stage, key, None)
                if source is not None and source not in earlier and not (Path(source) / MODEL).is_file():
                    near = f"; before it there are: {', '.join(earlier)}" if earlier else ""
                    raise misplaced(f"no stage '{source}' before it, and no model there{near}", "stages", name, key)
            if isinstance(stage, ContrastiveStage):
                self._check_models_of_data(name, stage.data, earlier)
            if stage.init_from is None and isinstance(stage, (AlignStage, PruneStage, QuantizeStage)):
                message = "there is no model to go on from; put it after another, or give 'init_from'"
                raise misplaced(message, "stages", name)
            if stage.init_from and self._is_quantised(stage.init_from):
                message = f"'{stage.init_from}' is quantised, for serving; go on from the model that it was made from"
                raise misplaced(message, "stages", name, "init_from")
            if isinstance(stage, TrainedStage):
                self._check_training(name, stage)
            earlier.append(name)
        return self

    def _check_models_of_data(self, name: str, data: ContrastiveConfig, earlier: Sequence[str]) -> None:
        if (mined := data.mined_negatives) and not self._is_encoder(mined.encoder, earlier):
            message = f"no contrastive stage '{mined.encoder}' before it, and no encoder there"
            raise misplaced(message, "stages", name, "data", "mined_negatives", "encoder")
        if data.ranker and (
            not (data.ranker in earlier or (Path(data.ranker) / MODEL).is_file())
            or self._is_encoder(data.ranker, earlier)
        ):
            message = f"no stage '{data.ranker}' before it whose model ranks, and no such model there"
            raise misplaced(message, "stages", name, "data", "ranker")

    def _check_training(self, name: str, stage: TrainedStage) -> None:
        train = stage.train
        if not isinstance(stage, PretrainStage) and self.prompts.max_tokens > train.seq_len:
            message = (
                f"seq_len ({train.seq_len}) is less than prompts.max_tokens ({self.prompts.max_tokens}): "
                "a prompt must fit in a row"
            )
            raise misplaced(message, "stages", name, "train", "seq_len")
        if train.lora and (stage.from_scratch or not stage.init_from):
            message = "adapters of a model that is there: give 'init_from', or put the stage after another"
            raise misplaced(message, "stages", name, "train", "lora")

    @property
    def ranking_stages(self) -> list[str]:
        """The stages whose models rank; the others embed."""
        return [name for name, stage in self.stages.items() if not isinstance(stage, ContrastiveStage)]

    def _is_encoder(self, model: str, earlier: Sequence[str]) -> bool:
        """Of one of these stages, or of a folder."""
        if model in earlier:
            return isinstance(self.stages[model], ContrastiveStage)
        return (Path(model) / ENCODER).is_file()

    def _is_quantised(self, model: str) -> bool:
        """Of a stage, or of a folder."""
        if model in self.stages:
            return isinstance(self.stages[model], QuantizeStage)
        return ModelConfig.load(Path(model) / MODEL).quantized is not None


def load_plan(path: str | Path, overrides: Sequence[str] = ()) -> CompilePlan:
    """Reads what `brewjax compile` compiles.

    Args:
      path: of a plan; or of a recipe, whose model is compiled as its first stage that trains does.
      overrides: such as `train.steps=100`.

    Returns:
      The plan.

    Raises:
      ConfigError: the file is wrong, or no stage of the recipe trains.
    """
    path = Path(path)
    values = yaml.safe_load(path.read_text()) if path.is_file() else None
    if not isinstance(values, dict) or "stages" not in values:
        return CompilePlan.load(path, overrides)
    recipe = Recipe.load(path, overrides)
    for stage in recipe.stages.values():
        if isinstance(stage, TrainedStage):
            return CompilePlan(name=recipe.name, model=recipe.model, train=stage.train)
    raise recipe.error("none of them trains", "stages")
