"""The settings of every YAML file: as JSON schemas for editors, and as rows for `brewjax help` and the docs."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin

import pydantic
from pydantic.fields import FieldInfo

from brewjax.config import Config
from brewjax.data.tables.card import Card
from brewjax.data.tables.union import UnionCard
from brewjax.data.tasks.task import Task
from brewjax.model.config import ModelConfig
from brewjax.pipeline.ladder import Ladder
from brewjax.pipeline.recipe import KINDS, TRAINING, CompilePlan, Recipe
from brewjax.serve.config import ServeConfig
from brewjax.suite.suite import Suite
from brewjax.train.loop import TrainConfig

FILES: dict[str, type[Config]] = {
    "dataset": Card,
    "union": UnionCard,
    "task": Task,
    "model": ModelConfig,
    "suite": Suite,
    "recipe": Recipe,
    "plan": CompilePlan,
    "serve": ServeConfig,
}
STAGES: dict[str, type[Config]] = {**KINDS, "ladder": Ladder}


class Setting(NamedTuple):
    """One key of a YAML file.

    Attributes:
      file: the kind of file, a key of `FILES`.
      key: dotted, with `*` for a name or an index that the file chooses, and a stage's kind in brackets.
      type: as a reader of YAML would say it.
      default: as YAML; "" where the key is required.
    """

    file: str
    key: str
    type: str
    default: str
    description: str


def settings(file: str) -> list[Setting]:
    """All keys of a kind of file, in the order of their declaration."""
    return list(_settings(file, "", FILES[file]))


def find(key: str) -> list[Setting]:
    """The settings whose dotted key is `key`, or ends in it."""
    parts = key.split(".")
    return [
        setting
        for file in FILES
        for setting in settings(file)
        if [part.partition("[")[0] for part in setting.key.split(".")][-len(parts) :] == parts
    ]


def schema(file: str) -> dict[str, Any]:
    """JSON Schema (2020-12) of a kind of file, for editors and for checks before brewjax sees it."""
    config = FILES[file]
    made = config.model_json_schema()
    if config is Recipe:
        _loosen_recipe(made)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": f"brewjax {file}", **made}


def _settings(file: str, prefix: str, config: type[Config]) -> Iterator[Setting]:
    for name, field in config.model_fields.items():
        key = f"{prefix}{field.alias or name}"
        yield Setting(file, key, _type_name(field.annotation), _default(field), field.description or "")
        if name == "train" and FILES[file] is Recipe:  # the same in every stage: spelled out once
            yield from _settings(file, f"{key}.", TrainConfig) if config is Recipe else ()
        elif config is Recipe and name == "stages":
            for kind, stage in STAGES.items():
                yield from _settings(file, f"{key}.*[{kind}].", stage)
        else:
            for inner, many in _configs_in(field.annotation):
                yield from _settings(file, f"{key}.*." if many else f"{key}.", inner)


def _configs_in(annotation: Any) -> list[tuple[type[Config], bool]]:
    """The configs that a field holds, and whether under a name or an index of their own."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [(annotation, False)]
    many = get_origin(annotation) in (dict, tuple)
    return [(config, many or nested) for part in get_args(annotation) for config, nested in _configs_in(part)]


def _type_name(annotation: Any) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_name(parts[0])
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_type_name(part) for part in parts))
    if origin is tuple:
        return f"list of {_type_name(parts[0])}"
    if origin is dict:
        return f"{_type_name(parts[1])} by name"
    if parts:  # Literal
        return " | ".join(map(str, parts))
    names = {str: "text", int: "whole number", float: "number", bool: "true | false", type(None): "null", Any: "any"}
    return names.get(annotation, "group")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return ""
    value = field.get_default(call_default_factory=True)
    if isinstance(value, pydantic.BaseModel):
        return "its defaults"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return str(list(value)) if isinstance(value, tuple) else str(value) or "empty"


def _loosen_recipe(made: dict[str, Any]) -> None:
    """What `Recipe` fills in before it is checked (training settings shared by all stages, and ladders), and checks of
    its own: surfaces, or the short form of one."""
    definitions = made["$defs"]
    made["oneOf"] = [{"required": ["surfaces"]}, {"required": ["dataset", "tasks"]}]
    for stage in TRAINING.values():
        definitions[stage.__name__]["required"].remove("train")
    definitions["TrainConfig"].pop("required")
    ladder = Ladder.model_json_schema()
    definitions |= ladder.pop("$defs")
    definitions["Ladder"] = ladder | {"required": ["do", "rungs"]}
    made["properties"]["train"] = {"$ref": "#/$defs/TrainConfig"}
    (stages,) = made["properties"]["stages"]["patternProperties"].values()
    stages["oneOf"].append({"$ref": "#/$defs/Ladder"})
