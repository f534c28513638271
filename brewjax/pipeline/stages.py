"""What each stage of a recipe does, and all of them as steps, each model followed by its evaluation."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from brewjax import hosts
from brewjax.compress.prune import LayerReport, prune
from brewjax.compress.quantize import quantize
from brewjax.config import ConfigError
from brewjax.data.dataset import CARD
from brewjax.data.examples import sample_examples
from brewjax.data.loader import MixConfig, write_shards
from brewjax.data.numbers import Percentiles
from brewjax.data.preferences import AlignConfig, align_records
from brewjax.data.prose import PretrainConfig, domain_texts, general_texts, pretrain_records
from brewjax.data.task import Task
from brewjax.data.tokenizer import Tokenizer
from brewjax.data.tokens import EncodedPrompt, Text
from brewjax.data.training import Note, SftConfig, sft_records
from brewjax.data.verbalize import Verbalizer
from brewjax.model.config import ModelConfig
from brewjax.model.params import MODEL, Params, load_model
from brewjax.pipeline.judgement import EVALUATE, baselines_stage, evaluate_stage, report_stage
from brewjax.pipeline.recipe import (
    AlignStage,
    DistillStage,
    PretrainStage,
    PruneStage,
    QuantizeStage,
    Recipe,
    TrainedStage,
)
from brewjax.pipeline.run import Run
from brewjax.pipeline.steps import Step, run_steps
from brewjax.scoring.bundle import PERCENTILES, TOKENIZER, Bundle, PercentileScale
from brewjax.train.align import REFERENCE
from brewjax.train.loop import train
from brewjax.train.objectives import Objective, supervised
from brewjax.train.teachers import Beside, Frozen

# The folders whose code makes what a step leaves.
TRAIN = ("train", "model", "../pallas_kernels")
COMPRESS = ("compress", "model", "../pallas_kernels")
SCORE = ("evaluate", "scoring", "model", "../pallas_kernels")
DataConfig = SftConfig | AlignConfig | PretrainConfig
TOKENIZER_EXAMPLES = 400  # prompts of each task that a tokenizer is trained on


# --- data


def prepare(run: Run, folder: Path) -> None:
    """The tokenizer, and the scale that numbers are said on."""
    if run.base:
        Tokenizer.load(run.base / TOKENIZER).save(folder / TOKENIZER)
    percentiles = Percentiles.fit(run.dataset, run.tasks[0].boundaries(run.dataset)[0])
    PercentileScale(dataset=run.dataset.card.name, quantiles=percentiles.quantiles).save(folder / PERCENTILES)
    config = run.recipe.tokenizer
    if config and config.path:
        Tokenizer.load(config.path).save(folder / TOKENIZER)
    elif config:
        _train_tokenizer(run, percentiles, config.vocab_size or 0).save(folder / TOKENIZER)
    run.tokenizer.check_pieces()
    for task in run.tasks:
        task.check_words(run.tokenizer)
    for name in run.recipe.stages:
        _check_tokenizers(run, name)


def _check_tokenizers(run: Run, name: str) -> None:
    """What a stage takes from another folder must read the tokens that this recipe writes."""
    for key in ("start", "teacher"):
        model = getattr(run.recipe.stages[name], key, None)
        if not model or model in run.recipe.stages:
            continue
        if Tokenizer.load(Path(model) / TOKENIZER).hf.get_vocab() != run.tokenizer.hf.get_vocab():
            hint = "make it the recipe's `model`, or its tokenizer's `path`"
            raise run.recipe.error(f"the tokenizer of {model} is not this recipe's; {hint}", "stages", name, key)


def _train_tokenizer(run: Run, percentiles: Percentiles, vocab_size: int) -> Tokenizer:
    """Trained on prompts of the training period, which a tokenizer of single bytes says first."""
    prompts = run.recipe.prompts
    words = sorted({word for task in run.tasks for word in task.words})
    verbalizer = Verbalizer(run.dataset, percentiles, Tokenizer.of_bytes(), max_tokens=1_000_000)
    rng = np.random.default_rng(0)
    texts = [
        verbalizer.prompt(task, example, prompts.draw(rng)).render()
        for task in run.tasks
        for example in sample_examples(run.dataset, task, "train", TOKENIZER_EXAMPLES)
    ]
    if _reads_prose(run.recipe):
        until = run.tasks[0].boundaries(run.dataset)[0]
        told = domain_texts(verbalizer, until, PretrainConfig())
        texts += [text for text, _ in itertools.islice(told, len(texts))]
    return Tokenizer.train(texts, words, vocab_size)


def _reads_prose(recipe: Recipe) -> bool:
    return any(isinstance(stage, PretrainStage) for stage in recipe.stages.values())


def write_data(run: Run, config: DataConfig, row_tokens: int, folder: Path) -> None:
    """What stages train on: a folder of shards for each source."""
    for name, records in _sources(run, config).items():
        counts = write_shards(folder / name, records, row_tokens)
        each = f"{counts['tokens'] / max(1, counts['targets']):.0f} tokens a target"
        Console().print(f"{name}: {counts['records']:,} records, {counts['targets']:,} targets, {each}")


def _sources(run: Run, config: DataConfig) -> dict[str, Iterator[tuple[EncodedPrompt | Text, Note]]]:
    """Records by the name of what they come from: a task, or a kind of text."""
    verbalizer, prompts = run.verbalizer, run.recipe.prompts
    match config:
        case SftConfig():
            return {task.name: sft_records(verbalizer, task, prompts, config) for task in run.tasks}
        case AlignConfig():
            return {task.name: align_records(verbalizer, task, prompts, config) for task in _aligned(run, config)}
    until = run.tasks[0].boundaries(run.dataset)[0]
    texts = {"domain": domain_texts(verbalizer, until, config)}
    if config.general:
        texts["general"] = general_texts(Path(config.general))
    return {name: pretrain_records(of, run.tokenizer) for name, of in texts.items()}


def shares(run: Run, config: DataConfig, folder: Path) -> dict[Path, float]:
    """The folders that `write_data` left, with their shares of all tokens."""
    if isinstance(config, PretrainConfig):
        general = config.general_share if config.general else 0
        return {folder / "domain": 1 - general} | ({folder / "general": general} if general else {})
    if isinstance(config, AlignConfig):
        return MixConfig().shares({task.name: folder / task.name for task in _aligned(run, config)})
    return config.mix.shares({task.name: folder / task.name for task in run.tasks})


def _aligned(run: Run, config: AlignConfig) -> list[Task]:
    known = [task.name for task in run.tasks]
    for name in config.tasks:
        if name not in known:
            raise config.error(f"no task '{name}'; tasks: {', '.join(known)}", "tasks")
    return [task for task in run.tasks if task.name in (config.tasks or known)]


# --- models


def train_stage(run: Run, stage: TrainedStage, data: Path, folder: Path) -> None:
    """Trains on what is in the folder `data`, and leaves the model in `folder/model`."""
    mesh, shards = stage.train.mesh.build(), shares(run, stage.data, data)
    model, init = _beginning(run, stage, mesh)
    frozen: dict[str, Beside] = {}
    objective: Objective = supervised
    if isinstance(stage, DistillStage):
        objective = stage.loss
        teacher = Frozen(*load_model(run.model(stage.teacher), mesh))
        frozen = stage.loss.frozen(teacher, model, stage.train, shards, folder / "teacher")
    elif isinstance(stage, AlignStage):
        objective = stage.loss
        if not stage.train.lora:
            frozen = {REFERENCE: Frozen(*load_model(run.model(stage.start), mesh))}
    run.save(folder / "model", model, train(model, stage.train, shards, folder, objective, init, frozen))


def _beginning(run: Run, stage: TrainedStage, mesh: Mesh) -> tuple[ModelConfig, Callable[[], Params] | None]:
    """What a stage starts from; nothing that makes parameters: random ones."""
    if not stage.start:
        return run.first_model(), None
    start = run.model(stage.start)
    return ModelConfig.load(start / MODEL), None if stage.fresh else lambda: load_model(start, mesh)[1]


def prune_stage(run: Run, stage: PruneStage, folder: Path) -> None:
    like = ModelConfig.load(run.model(stage.like) / MODEL) if stage.like else None
    config = stage.config(like)
    bundle = Bundle.load(run.model(stage.start), config.mesh)
    prune(bundle, run.calibration(bundle, stage.examples), config, _say).save(folder / "model")


def _say(layer: LayerReport) -> None:
    if hosts.is_first():
        said = f"{layer.attention:.2%} of what attention says is lost, {layer.mlp:.2%} of what the MLP says"
        Console().print(f"layer {layer.layer}: {said}", highlight=False)


def quantize_stage(run: Run, stage: QuantizeStage, folder: Path) -> None:
    quantize(run.model(stage.start), stage).save(folder / "model")


def make_model(run: Run, name: str, work: Callable[[Path], None], folder: Path) -> None:
    """A stage's own work, of models that read the recipe's tokens."""
    _check_tokenizers(run, name)  # again: a stage may be new, and `prepare` done long ago
    work(folder)


# --- the plan


def steps(run: Run) -> list[Step]:
    """Everything that a recipe asks for, in order."""
    recipe = run.recipe
    tasks = [Path(path).read_text() for path in run.task_files if Path(path).is_file()]
    tokenizer = _hash_model(run.base / TOKENIZER) if run.base else None
    plan = [
        Step(
            "prepare",
            functools.partial(prepare, run),
            (),
            [tasks, _dump(recipe, "tokenizer", "prompts"), _reads_prose(recipe), tokenizer],
            ("data",),
        )
    ]
    judged = _dump(recipe, "evaluate")
    data: dict[str, str] = {}  # the steps that write training data, by what they write
    for name, stage in recipe.stages.items():
        settings = stage.model_dump(mode="json")
        others = [other for key in ("start", "teacher", "like") if (other := getattr(stage, key, None))]
        models = tuple(other for other in others if other in recipe.stages)
        outside: list[Any] = [_hash_model(Path(other)) for other in others if other not in recipe.stages]
        outside += [] if stage.start else [ModelConfig.load(recipe.model).model_dump(mode="json")]
        if isinstance(stage, TrainedStage):
            wanted = json.dumps([type(stage.data).__name__, settings.pop("data"), stage.train.row_tokens])
            if wanted not in data:
                data[wanted] = f"data-{name}"
                work = functools.partial(write_data, run, stage.data, stage.train.row_tokens)
                plan.append(Step(data[wanted], work, ("prepare",), wanted, ("data",)))
            work = functools.partial(train_stage, run, stage, run.folder / data[wanted])
            work = functools.partial(make_model, run, name, work)
            plan.append(Step(name, work, (data[wanted], *models), [settings, outside], TRAIN, keep=True, together=True))
        else:
            does: Any = prune_stage if isinstance(stage, PruneStage) else quantize_stage
            work = functools.partial(make_model, run, name, functools.partial(does, run, stage))
            plan.append(Step(name, work, ("prepare", *models), [settings, outside], COMPRESS, together=True))
        work = functools.partial(evaluate_stage, run, name)
        plan.append(Step(f"{EVALUATE}{name}", work, (name,), judged, SCORE, together=True))
    plan.append(Step("baselines", functools.partial(baselines_stage, run), ("prepare",), judged, ("evaluate",)))
    everything = tuple(step.name for step in plan)
    plan.append(Step("report", functools.partial(report_stage, run, everything), everything, [], ("evaluate",)))
    return plan


def run_recipe(recipe: Recipe, folder: Path, any_code: bool = False, until: str = "report") -> None:
    """Runs a recipe's stages into `folder/<stage>`, each followed by its evaluation; see `run_steps`."""
    plan = steps(Run(recipe, folder))
    last = [step.name for step in plan].index(until)
    run_steps(plan[: last + 1], folder, hosts.on_first(lambda: _hash_dataset(Path(recipe.dataset))), any_code)


def _dump(recipe: Recipe, *keys: str) -> list[Any]:
    values = recipe.model_dump(mode="json")
    return [values[key] for key in keys]


def _hash_model(folder: Path) -> str:
    return _hash_files(sorted(path for path in folder.rglob("*") if path.is_file()))


def _hash_dataset(folder: Path) -> str:
    if not (folder / CARD).is_file():
        raise ConfigError(f"{folder}: no {CARD} there; fetch a dataset with `brewjax data fetch` or make one")
    return _hash_files([folder / CARD, *sorted(folder.rglob("*.parquet"))])


def _hash_files(paths: Iterable[Path]) -> str:
    """Sizes and times of change: cheap, and different whenever the files are."""
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()
