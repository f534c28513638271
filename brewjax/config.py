"""Typed configs: YAML in, frozen objects out, every mistake named with its file and line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

import pydantic
import yaml
from pydantic_core import PydanticCustomError

C = TypeVar("C", bound="Config")
Location = tuple[str | int, ...]
Seed = Annotated[int, pydantic.Field(ge=0, lt=1 << 32)]  # what both NumPy and JAX take


class ConfigError(ValueError):
    """A config that cannot be used; the message says which file, line and key, and what would be right."""


class Config(pydantic.BaseModel):
    """Base of every config: frozen. Unknown keys are refused, with the nearest valid one; so are NaN and infinity."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    _path: str = pydantic.PrivateAttr(default="<config>")
    _lines: dict[Location, int] = pydantic.PrivateAttr(default_factory=dict)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, values: Any) -> Any:
        if isinstance(values, dict):
            for key in values:
                if key not in cls.model_fields:
                    near = difflib.get_close_matches(str(key), cls.model_fields, n=1)
                    hint = f"did you mean '{near[0]}'?" if near else f"valid keys: {', '.join(cls.model_fields)}"
                    raise PydanticCustomError("unknown_key", "unknown key '{key}'; {hint}", {"key": key, "hint": hint})
        return values

    def __eq__(self, other: object) -> bool:
        """By value, whichever file it was read from."""
        return type(self) is type(other) and dict(self) == dict(other)

    @classmethod
    def load(cls, path: str | Path, overrides: Iterable[str] = ()) -> Self:
        """Reads a YAML file and applies overrides such as `train.steps=100` (the value is YAML too).

        Raises ConfigError naming file, line and key.
        """
        path = Path(path)
        if not path.is_file():
            raise ConfigError(f"{path}: no such config file")
        return cls.parse(path.read_text(), str(path), overrides)

    @classmethod
    def parse(cls, text: str, path: str = "<config>", overrides: Iterable[str] = ()) -> Self:
        """As `load`, from a string; `path` is only used in errors."""
        try:
            root = yaml.compose(text, Loader=_Loader)
            values = yaml.load(text, _Loader)
        except yaml.YAMLError as error:
            raise ConfigError(f"{path}: not valid YAML: {error}") from None
        lines = _line_numbers(root, path) if root is not None else {}
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: expected keys and values, found {type(values).__name__}")
        for override in overrides:
            _override(values, override)
        try:
            config = cls.model_validate(values)
        except pydantic.ValidationError as error:
            errors = [{**one, "loc": cls.place(one["loc"])} for one in error.errors()]
            raise ConfigError("\n".join(_describe(one, path, lines) for one in errors)) from None
        config._path, config._lines = path, lines
        return config

    @classmethod
    def place(cls, location: Location) -> Location:
        """Where a file says what pydantic finds at `location`."""
        return location

    def save(self, path: Path) -> None:
        """Writes what `load` reads, every default spelled out."""
        path.write_text(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True))

    def error(self, message: str, *location: str | int) -> ConfigError:
        """A ConfigError about the key at `location`, e.g. `task.error("no such action", "history", "actions", 0)`."""
        return ConfigError(f"{_place(self._path, self._lines, location)}: {message}")


class _Loader(yaml.SafeLoader):
    """YAML in which a date stays text: PyYAML refuses an impossible one, such as 1998-13-07, without its line."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def _line_numbers(node: yaml.Node, path: str, location: Location = ()) -> dict[Location, int]:
    """Line (from 1) of every key and list entry; refuses a key given twice, which YAML would silently accept."""
    lines = {location: node.start_mark.line + 1}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            child = (*location, key.value)
            if child in lines:
                raise ConfigError(
                    f"{path}:{key.start_mark.line + 1}: '{key.value}' is given twice, first on line {lines[child]}"
                )
            lines |= _line_numbers(value, path, child)
            lines[child] = key.start_mark.line + 1
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines |= _line_numbers(value, path, (*location, index))
    return lines


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals:
        raise ConfigError(f"override '{override}': expected KEY=VALUE, for example train.steps=100")
    *parents, leaf = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise ConfigError(f"override '{override}': '{parent}' is not a group of keys")
    try:
        values[leaf] = yaml.load(value, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"override '{override}': the value is not valid YAML: {error}") from None


def _place(path: str, lines: dict[Location, int], location: Location) -> str:
    """`file:line: key.path`, with the line of the nearest ancestor that the file spells out."""
    known = next((location[:n] for n in range(len(location), -1, -1) if location[:n] in lines), ())
    line = f":{lines[known]}" if known in lines else ""
    name = ".".join(str(part) for part in location)
    return f"{path}{line}: {name}" if name else f"{path}{line}"


def _describe(error: Any, path: str, lines: dict[Location, int]) -> str:
    if error["type"] == "unknown_key":
        return f"{_place(path, lines, (*error['loc'], error['ctx']['key']))}: {error['msg']}"
    message = error["msg"][0].lower() + error["msg"][1:]
    message = message.replace("valid tuple", "list in [brackets]")
    found = "" if error["type"] == "missing" else f", found {error['input']!r}"
    return f"{_place(path, lines, error['loc'])}: {message}{found}"
