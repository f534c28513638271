"""Typed configs: YAML in, frozen objects out, every mistake named with its file and line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self, TypeVar

import pydantic
import yaml
from pydantic_core import PydanticCustomError

from brewjax.paths import write_text

C = TypeVar("C", bound="Config")
Location = tuple[str | int, ...]
Seed = Annotated[int, pydantic.Field(ge=0, lt=1 << 32)]  # what both NumPy and JAX take


class ConfigError(ValueError):
    """A config that cannot be used; the message says which file, line and key, and what would be right."""


class Config(pydantic.BaseModel):
    """Base of every config: frozen. Unknown keys are refused, with the nearest valid one; so are NaN and infinity."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    _file: _File | None = pydantic.PrivateAttr(default=None)
    _location: Location = pydantic.PrivateAttr(default=())

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
            errors = [{**detail, "loc": cls.place(_location(detail), values)} for detail in error.errors()]
            messages = [_describe(detail, path, lines) for detail in errors]
            raise ConfigError("\n".join(dict.fromkeys(messages))) from None
        config._anchor(_File(path, lines, values, cls), ())
        return config

    def _anchor(self, file: _File, location: Location) -> None:
        """Lets `error` of this config, and of all configs in it, name the file and their own lines."""
        self._file, self._location = file, location
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, Config):
                if name not in self.model_fields_set:  # a default is shared by all configs
                    value = self.__dict__[name] = value.model_copy()
                value._anchor(file, (*location, name))
                continue
            entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, tuple) else ()
            for key, entry in entries:
                if isinstance(entry, Config):
                    entry._anchor(file, (*location, name, key))

    @classmethod
    def place(cls, location: Location, source: dict[str, Any]) -> Location:
        """The keys in the file `source` that led to the field at `location` of the config; they are the same unless a
        config is derived from shorter keys."""
        return location

    def save(self, path: Path) -> None:
        """Writes what `load` reads, every default spelled out."""
        write_text(path, yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True))

    def error(self, message: str, *location: str | int) -> ConfigError:
        """A ConfigError about the key at `location`, e.g. `task.error("no such action", "history", "actions", 0)`."""
        if self._file is None:
            return ConfigError(f"{_place('<config>', {}, location)}: {message}")
        path, lines, values, root = self._file
        return ConfigError(f"{_place(path, lines, root.place((*self._location, *location), values))}: {message}")


class _File(NamedTuple):
    """The file that a config and all configs in it were read from, and the class of the outermost."""

    path: str
    lines: dict[Location, int]
    values: dict[str, Any]
    root: type[Config]


def located_error(message: str, *location: str | int) -> PydanticCustomError:
    """What a validator raises to blame the key at `location` below it, so that the message has that key's line."""
    return PydanticCustomError("located", "{message}", {"message": message, "location": location})


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


def first_error(error: pydantic.ValidationError, *location: str | int) -> PydanticCustomError:
    """The first mistake in a config that a validator makes itself, blamed on its key below `location`."""
    detail = error.errors()[0]
    return located_error(_message(detail), *location, *_location(detail))


def _location(error: Any) -> Location:
    """Of a pydantic error, with what `located_error` adds."""
    context = error.get("ctx", {})
    return (*error["loc"], *context.get("location", ()), *((context["key"],) if error["type"] == "unknown_key" else ()))


def _describe(error: Any, path: str, lines: dict[Location, int]) -> str:
    return f"{_place(path, lines, error['loc'])}: {_message(error)}"


def _message(error: Any) -> str:
    if error["type"] in ("unknown_key", "located"):
        return error["msg"]
    message = error["msg"][0].lower() + error["msg"][1:]
    message = message.replace("valid tuple", "list in [brackets]")
    return message if error["type"] == "missing" else f"{message}, found {error['input']!r}"
