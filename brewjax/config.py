"""Typed configs: YAML in, frozen objects out, every mistake named with its file and line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple, Self, get_args

import pydantic
import yaml
from pydantic_core import PydanticCustomError

from brewjax.paths import write_text

Location = tuple[str | int, ...]
Words = Annotated[str, pydantic.StringConstraints(min_length=1)]  # a text that must not be empty
Seed = Annotated[int, pydantic.Field(ge=0, lt=1 << 32)]  # what both NumPy and JAX take
Count = Annotated[int, pydantic.Field(gt=0, lt=1 << 31)]  # fits into the int32 of tables and of JAX
Days = Annotated[float, pydantic.Field(gt=0, le=1e6)]  # in microseconds, and added to a time, it fits into 64 bits
SHOWN = 20  # of the names that there are, where none is near


class ConfigError(ValueError):
    """A config that cannot be used; the message says which file, line and key, and what would be right."""


class Config(pydantic.BaseModel):
    """Base of every config: frozen. Unknown keys are refused, with the nearest valid one; so are NaN and infinity.

    Attributes:
      ALIASES: keys that people write for others, and those; only for the hint.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)
    ALIASES: ClassVar[Mapping[str, str]] = {}

    _file: _File | None = pydantic.PrivateAttr(default=None)
    _location: Location = pydantic.PrivateAttr(default=())

    @pydantic.model_validator(mode="before")
    @classmethod
    def _refuse_keys(cls, values: Any) -> Any:
        """Unknown keys, and true or false where a number is expected, which pydantic would take for 1 or 0."""
        if not isinstance(values, dict):
            return values
        fields = {field.alias or name: field for name, field in cls.model_fields.items()}
        for key, value in values.items():
            if key not in fields:
                hint = suggest(str(key), fields, cls.ALIASES, "valid keys")
                raise misplaced(f"unknown key '{key}'; {hint}", key)
            if isinstance(value, bool) and _takes_numbers_only(fields[key].annotation):
                raise misplaced(f"expected a number, found {_show(value)}", key)
        return values

    def __eq__(self, other: object) -> bool:
        """By value, whichever file it was read from."""
        return type(self) is type(other) and dict(self) == dict(other)

    @classmethod
    def load(cls, path: str | Path, overrides: Iterable[str] = ()) -> Self:
        """Reads a YAML file.

        Args:
          path: of the file.
          overrides: such as `train.steps=100`; the value is YAML too.

        Returns:
          The config.

        Raises:
          ConfigError: a line for each mistake, with file, line and key, and what would be right.
        """
        return cls.parse(read_text(Path(path)), str(path), overrides)

    @classmethod
    def parse(cls, text: str, path: str = "<config>", overrides: Iterable[str] = ()) -> Self:
        """As `load`, from a string.

        Args:
          text: the YAML.
          path: only used in errors.
          overrides: as of `load`.

        Returns:
          The config.

        Raises:
          ConfigError: as `load`.
        """
        try:
            root = yaml.compose(text, Loader=_Loader)
            values = yaml.load(text, _Loader)
        except yaml.YAMLError as error:
            raise ConfigError(f"{path}{_yaml_problem(error)}") from None
        places = dict(_read_places(root, path)) if root is not None else {}
        if not isinstance(values, dict):
            needed = ", ".join(name for name, field in cls.model_fields.items() if field.is_required())
            content = "an empty file" if root is None else _show(values)
            raise ConfigError(f"{path}: expected KEY: VALUE lines{needed and f' with {needed}'}, found {content}")
        return cls.of(values, path, overrides, places)

    @classmethod
    def of(
        cls,
        values: dict[str, Any],
        path: str = "<config>",
        overrides: Iterable[str] = (),
        places: dict[Location, str] | None = None,
    ) -> Self:
        """As `load`, of values that were read already.

        Args:
          values: keys and values, as of a YAML file.
          path: names what `places` does not say, in errors.
          overrides: as of `load`.
          places: the file and line of each key.

        Returns:
          The config.

        Raises:
          ConfigError: as `load`.
        """
        places = places or {}
        for override in overrides:
            _override(values, places, override)
        try:
            config = cls.model_validate(values)
        except pydantic.ValidationError as error:
            errors = error.errors()
            # A list with a wrong entry is too short as well, pydantic finds.
            within = {each["loc"][:end] for each in errors for end in range(len(each["loc"]))}
            errors = [each for each in errors if each["type"] != "too_short" or each["loc"] not in within]
            lines = [_describe({**each, "loc": cls.place(_location(each), values)}, path, places) for each in errors]
            raise ConfigError("\n".join(dict.fromkeys(lines))) from None
        config._anchor(_File(path, places, values, cls), ())
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
        """Finds where in the file a field comes from; a config that is derived from shorter keys overrides this.

        Args:
          location: of the field in the config.
          source: keys and values of the file.

        Returns:
          The keys in the file that led to the field; here `location` itself.
        """
        return location

    def save(self, path: Path) -> None:
        """Writes what `load` reads, every default spelled out, in one step.

        Args:
          path: of the YAML file.
        """
        write_text(
            path, yaml.safe_dump(self.model_dump(mode="json", by_alias=True), sort_keys=False, allow_unicode=True)
        )

    def error(self, message: str, *location: str | int) -> ConfigError:
        """Makes an error about a key, e.g. `raise task.error("no such action", "history", "actions", 0)`.

        Args:
          message: what is wrong, and what would be right.
          location: keys and indices, from this config on, that lead to the value.

        Returns:
          The error, to raise; it names the file and the line that the config was read from.
        """
        if self._file is None:
            return ConfigError(f"{_place('<config>', {}, location)}: {message}")
        path, places, values, root = self._file
        return ConfigError(f"{_place(path, places, root.place((*self._location, *location), values))}: {message}")


class _File(NamedTuple):
    """The file that a config and all configs in it were read from, and the class of the outermost."""

    path: str
    places: dict[Location, str]
    values: dict[str, Any]
    root: type[Config]


def misplaced(message: str, *location: Any) -> PydanticCustomError:
    """Makes what a validator raises about a key further in: the error then names that key, and its line.

    For instance, in a validator of a model with `stages`:
    `raise misplaced("no such stage", "stages", name, "init_from")`.

    Args:
      message: what is wrong, and what would be right.
      location: keys and indices, from the validator's model on, that lead to the value.

    Returns:
      The error, to raise.
    """
    return PydanticCustomError("misplaced", "{message}", {"message": message, "location": location})


def misplaced_within(error: pydantic.ValidationError, *location: Any) -> PydanticCustomError:
    """`misplaced`, for a config that a validator makes itself out of values further in.

    Args:
      error: what making it raised; only the first mistake is reported.
      location: keys and indices that lead to the values.

    Returns:
      The error, to raise.
    """
    detail = error.errors()[0]
    return misplaced(describe(detail), *location, *_location(detail))


def refuse_twice(values: Iterable[Any], name: str, *location: str | int) -> None:
    """Checks that no two values are equal.

    Args:
      values: in the order of the file.
      name: what each is, for the error.
      location: keys that lead to them.

    Raises:
      PydanticCustomError: `misplaced`, at the first value that an earlier one equals.
    """
    seen: list[Any] = []
    for index, value in enumerate(values):
        if value in seen:
            raise misplaced(f"the {name} {_show(value)} is given twice", *location, index)
        seen.append(value)


def nearest(name: str, known: Iterable[str], aliases: Mapping[str, str] | None = None) -> str | None:
    """Finds the name that was most likely meant, whatever the case.

    Args:
      name: as it was written.
      known: the names that there are.
      aliases: names that people write for others, in lower case, and those.

    Returns:
      One of `known`; None where none is near.
    """
    fold = lambda word: str(word).casefold().replace("-", "_").strip()  # noqa: E731
    folded = {fold(word): word for word in known}
    key = fold(name)
    if key in folded:
        return folded[key]
    if (aliases or {}).get(key) in folded.values():
        return (aliases or {})[key]
    if near := difflib.get_close_matches(key, folded, n=1):
        return folded[near[0]]
    within = [word for text, word in folded.items() if min(len(text), len(key)) > 1 and (text in key or key in text)]
    return within[0] if len(within) == 1 else None


def suggest(
    name: str, known: Iterable[str], aliases: Mapping[str, str] | None = None, listing: str = "there are"
) -> str:
    """Makes a hint for an error about a name.

    Args:
      name: as it was written.
      known: the names that there are.
      aliases: names that people write for others.
      listing: the words before all that there are.

    Returns:
      The name that was most likely meant, or else all that there are.
    """
    known = list(known)
    if near := nearest(name, known, aliases):
        return f"did you mean '{near}'?"
    more = f" and {len(known) - SHOWN:,} more" if len(known) > SHOWN else ""
    return f"{listing}: {', '.join(map(str, known[:SHOWN])) or 'none'}{more}"


def suggest_path(path: Path) -> str:
    """A hint for an error about a missing path: the entry of its folder that was most likely meant; empty if none."""
    siblings = sorted(entry.name for entry in path.parent.iterdir()) if path.parent.is_dir() else []
    near = nearest(path.name, siblings)
    return f"; did you mean '{path.parent / near}'?" if near else ""


def read_text(path: Path) -> str:
    """Reads a file of UTF-8.

    Args:
      path: of the file.

    Returns:
      The text.

    Raises:
      ConfigError: the file is not there, a folder, not readable, or not UTF-8.
    """
    if path.is_dir():
        raise ConfigError(f"{path}: a folder; expected a file")
    if not path.is_file():
        missing = "no file fits this pattern" if set(path.name) & set("*?[") else "no such file"
        raise ConfigError(f"{path}: {missing}{suggest_path(path)}")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: not readable: {error.strerror}") from None
    return decode(content, str(path))


def decode(content: bytes, place: str) -> str:
    """Decodes UTF-8.

    Args:
      content: bytes, with a byte order mark or without.
      place: the file, for errors.

    Returns:
      The text.

    Raises:
      ConfigError: it is not UTF-8; names the line.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ConfigError(f"{place}:{line}: not UTF-8: byte 0x{content[error.start]:02x}; save it as UTF-8") from None


class _Loader(yaml.SafeLoader):
    """YAML in which a date stays text: PyYAML refuses an impossible one, such as 1998-13-07, without its line."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def _yaml_problem(error: yaml.YAMLError) -> str:
    """Line and problem of a text that is not YAML, on one line."""
    if isinstance(error, yaml.reader.ReaderError):
        return f": not valid YAML: character #x{error.character:04x} at position {error.position} is not allowed"
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    context, problem = getattr(error, "context", None) or "", getattr(error, "problem", None) or str(error)
    hint = "; indent with spaces, not tabs" if "'\\t'" in problem else ""
    message = f"{context}, {problem}" if context.startswith("expected") else problem
    return f"{f':{mark.line + 1}' if mark else ''}: not valid YAML: {message}{hint}"


def _read_places(
    node: yaml.Node, path: str, location: Location = (), within: tuple[yaml.Node, ...] = ()
) -> Iterator[tuple[Location, str]]:
    """`file:line` of every key and list entry; refuses a key given twice, which YAML would silently accept."""
    yield location, f"{path}:{node.start_mark.line + 1}"
    if node in within:
        raise ConfigError(f"{path}:{node.start_mark.line + 1}: an alias (*name) stands within what it names")
    within = (*within, node)
    if isinstance(node, yaml.MappingNode):
        lines: dict[Any, int] = {}
        for key, value in node.value:
            name, line = _key(key), key.start_mark.line + 1
            if name in lines:
                raise ConfigError(f"{path}:{line}: '{key.value}' is given twice, first on line {lines[name]}")
            lines[name] = line
            yield from _read_places(value, path, (*location, name), within)
            yield (*location, name), f"{path}:{line}"
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield from _read_places(value, path, (*location, index), within)


def _key(node: yaml.Node) -> Any:
    """A key as Python has it: `yes:` is True, `1:` is 1."""
    plain = node.tag in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")
    return node.value if plain else yaml.load(node.value, _Loader)


def _override(values: dict[str, Any], places: dict[Location, str], override: str) -> None:
    """Puts a value into `values`, and what it was given by into `places`."""
    key, equals, value = override.partition("=")
    if not equals:
        raise ConfigError(f"--set {override}: expected KEY=VALUE, for example train.steps=100")
    *parents, leaf = key.strip().split(".")
    for parent in parents:
        if values.get(parent) is None:
            values[parent] = {}
        values = values[parent]
        if not isinstance(values, dict):
            raise ConfigError(f"--set {override}: '{parent}' is not a group of keys")
    try:
        values[leaf] = yaml.load(value, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}{_yaml_problem(error).replace(':1:', ':')}") from None
    location = (*parents, leaf)
    for inner in [place for place in places if place[: len(location)] == location]:
        del places[inner]
    places[location] = f"--set {override}"


def _place(path: str, places: dict[Location, str], location: Location) -> str:
    """`file:line: key.path`, with the line of the nearest ancestor that the file spells out."""
    known = next((location[:n] for n in range(len(location), -1, -1) if location[:n] in places), None)
    name = ".".join(str(part) for part in location)
    where = path if known is None else places[known]
    return f"{where}: {name}" if name else where


# What pydantic finds, in plain words; filled with the error's own context.
_EXPECTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a smaller number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "tuple_type": "a list in [brackets]",
    "list_type": "a list in [brackets]",
    "dict_type": "keys and values",
    "literal_error": "{expected}",
    "union_tag_invalid": "one of {expected_tags}",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "too_short": "at least {min_length} of them",
    "too_long": "at most {max_length} of them",
    "string_too_short": "a text that is not empty",
}


def _location(error: Any) -> Location:
    """Where a pydantic error lies, with what `misplaced` adds."""
    return (*error["loc"], *(error["ctx"]["location"] if error["type"] == "misplaced" else ()))


def _describe(error: Any, path: str, places: dict[Location, str]) -> str:
    """One of pydantic's errors as a line of its own: where, what was expected, what is there."""
    location = error["loc"]
    if location and location[-1] == "[key]" and error["type"] == "string_type":
        return f"{_place(path, places, location[:-1])}: expected text as a key; put it in 'quotes'"
    return f"{_place(path, places, location)}: {describe(error)}"


def describe(error: Any) -> str:
    """Says one of pydantic's errors in plain words.

    Args:
      error: one of `ValidationError.errors()`.

    Returns:
      What was expected, and what is there.
    """
    kind, context, shown = error["type"], error.get("ctx", {}), f", found {_show(error['input'])}"
    match kind:
        case "misplaced":
            return str(context["message"])
        case "missing":
            return "missing; this key is needed"
        case "value_error" | "assertion_error":
            return str(context.get("error", error["msg"]))
        case "union_tag_not_found":
            key = context["discriminator"].strip("'")
            return f"'{key}' is missing; this key is needed"
        case "model_type" | "model_attributes_type":
            return f"expected keys and values{_shape(context.get('class_name', ''))}{shown}"
        case "string_pattern_mismatch":
            return f"expected a text that fits {context['pattern']}{shown}"
    if kind not in _EXPECTED:
        return f"{error['msg'][0].lower()}{error['msg'][1:]}{shown}"
    if kind == "literal_error" and isinstance(error["input"], str):
        choices = [choice.strip(" '") for choice in context["expected"].replace(" or ", ", ").split(", ")]
        near = nearest(error["input"], choices)
        shown += f"; did you mean '{near}'?" if near else ""
    limits = {name: f"{limit:g}" if isinstance(limit, float) else limit for name, limit in context.items()}
    return f"expected {_EXPECTED[kind].format(**limits)}{shown}"


def _shape(name: str) -> str:
    """` {past: ..}`: the keys that a config of this name needs."""
    waiting = [Config]
    while waiting:
        config = waiting.pop()
        waiting += config.__subclasses__()
        if config.__name__ == name:
            needed = [key for key, field in config.model_fields.items() if field.is_required()]
            return f" such as {{{', '.join(f'{key}: ..' for key in needed)}}}" if needed else ""
    return ""


def _takes_numbers_only(annotation: Any) -> bool:
    kinds = {kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)}
    return bool(kinds & {int, float}) and not kinds & {bool, str}


def _show(value: Any) -> str:
    """A value as an error shows it, on one line and not too long."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict) and not value:
        return "no keys"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
