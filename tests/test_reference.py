"""What a docstring must say: on the page "Python" of the reference all arguments, results and errors; and of everything
else that one room imports from another, what its types leave open; and of all public functions, what they raise.

A room is a folder. A type leaves open what a number, a text, a path or an array means, and when a value is None; a
class of this project does not. So an argument is named in the docstring, under Args or in a sentence, unless its type
is such a class; an array has its dtype and axes; the parts of a tuple or mapping are under Returns; and errors are
under Raises.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import brewjax
from tests.test_house import modules

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reference" / "python.md"
Function = ast.FunctionDef | ast.AsyncFunctionDef


def entries() -> list[str]:
    return re.findall(r"^::: (\S+)$", PAGE.read_text(), re.MULTILINE)


def definition(entry: str) -> ast.stmt:
    module, _, name = entry.rpartition(".")
    if module == "brewjax":
        module = brewjax._HOMES[name]
    tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())
    return next(node for node in tree.body if getattr(node, "name", None) == name)


def functions(node: ast.stmt) -> Iterator[Function]:
    """The function, or the public methods of the class; what a property is, its first line says."""
    if isinstance(node, Function):
        yield node
    elif isinstance(node, ast.ClassDef):
        for method in node.body:
            decorators = " ".join(map(ast.unparse, getattr(method, "decorator_list", [])))
            is_property = "property" in decorators or ".setter" in decorators
            if isinstance(method, Function) and not method.name.startswith("_") and not is_property:
                yield method


def missing(function: Function) -> Iterator[str]:
    """What the docstring of a function does not say."""
    sections = re.split(r"^(Args|Returns|Yields|Raises|Examples):$", ast.get_docstring(function) or "", flags=re.M)
    summary, texts = sections[0], dict(zip(sections[1::2], sections[2::2], strict=True))
    if not summary.strip():
        yield "a first line"
    names = {*re.findall(r"^  [*]{0,2}(\w+):", texts.get("Args", ""), re.MULTILINE)}  # griffe takes one a line
    arguments = function.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    yield from (each.arg for each in every if each and each.arg not in {"self", "cls", *names})
    returns = ast.unparse(function.returns) if function.returns else "None"
    if returns != "None" and not {"Returns", "Yields"} & {*texts}:
        yield "Returns"
    if any(isinstance(node, ast.Raise) and node.exc for node in ast.walk(function)) and "Raises" not in texts:
        yield "Raises"


@pytest.mark.parametrize("entry", entries())
def test_arguments_results_and_errors_are_documented(entry):
    node = definition(entry)
    docstring = ast.get_docstring(node)
    assert docstring
    assert not re.findall(r"^ +\w+(?:, \w+)+: .*", docstring, re.MULTILINE), "a line for each: griffe takes one name"
    undocumented = {function.name: [*missing(function)] for function in functions(node)}
    assert not {name: parts for name, parts in undocumented.items() if parts}


def room(module: str) -> str:
    return module if (ROOT / module.replace(".", "/")).is_dir() else module.rpartition(".")[0]


def imported(module: str, tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Modules of other rooms, and the names in them that a module imports or looks up."""
    aliases = {}
    for node in ast.walk(tree):
        for alias in node.names if isinstance(node, (ast.Import, ast.ImportFrom)) else ():
            source = getattr(node, "module", None)
            name = f"{source}.{alias.name}" if source else alias.name
            if name in modules():
                aliases[alias.asname or alias.name] = name
            elif source in modules():
                yield source, alias.name
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", None) in aliases:
            yield aliases[node.value.id], node.attr


@functools.cache
def shared() -> dict[str, ast.stmt]:
    """The functions and classes that one room imports from another."""
    names = {
        (source, name)
        for module, tree in modules().items()
        for source, name in imported(module, tree)
        if room(source) != room(module)
    }
    return {
        f"{source}.{node.name}": node
        for source, tree in modules().items()
        for node in tree.body
        if isinstance(node, (Function, ast.ClassDef)) and (source, node.name) in names
    }


@functools.cache
def classes() -> set[str]:
    return {node.name for tree in modules().values() for node in tree.body if isinstance(node, ast.ClassDef)}


def words(annotation: ast.expr | None) -> set[str]:
    """The names in a type, of `list[np.ndarray] | None` list, np, ndarray and None."""
    nodes = [] if annotation is None else [*ast.walk(annotation)]
    names = {getattr(node, "id", None) or getattr(node, "attr", None) for node in nodes}
    return {name for name in names if name} | {"None" for node in nodes if getattr(node, "value", "") is None}


def is_array(annotation: ast.expr | None) -> bool:
    """Whether a type is an array, of which jaxtyping does not say the axes."""
    return bool({"ndarray", "Array"} & words(annotation)) and not {"Float", "Int", "Bool", "Num"} & words(annotation)


def unnamed(function: Function, docstring: str) -> Iterator[str]:
    """Arguments whose meaning neither their type nor the docstring says."""
    args = function.args
    for argument in [*args.posonlyargs, *args.args, args.vararg, *args.kwonlyargs, args.kwarg]:
        if argument is None or argument.annotation is None or words(argument.annotation) <= classes():
            continue
        if not re.search(rf"\b{argument.arg}\b", docstring, re.IGNORECASE):
            yield argument.arg


def raises(node: ast.AST) -> bool:
    """Whether a function raises an error that it makes itself, outside the functions within it."""
    return any(
        (isinstance(child, ast.Raise) and isinstance(child.exc, ast.Call))
        or (not isinstance(child, (Function, ast.Lambda, ast.ClassDef)) and raises(child))
        for child in ast.iter_child_nodes(node)
    )


def missing_parts(function: Function) -> Iterator[str]:
    """What neither the types nor the docstring of a function or method say."""
    docstring = ast.get_docstring(function) or ""
    if not docstring:
        yield "anything"
    if raises(function) and "Raises:" not in docstring:
        yield "Raises"
    if re.match(r"(See|As) `[\w.]+`\.(\n|$)", docstring):  # the method of a protocol, for instance
        return
    yield from unnamed(function, docstring)
    returns = ast.unparse(function.returns or ast.Constant(None))
    is_property = "property" in " ".join(map(ast.unparse, function.decorator_list))
    if is_array(function.returns) and not re.search(r"[\w`] \[[^]]*\]", docstring):
        yield "dtype [axes]"
    if re.search(r"\bNone\b", returns) and returns not in ("None", "Iterator[None]") and "None" not in docstring:
        yield "when it is None"
    is_composed = re.search(r"\b(dict|Mapping|tuple)\[(?!\w+, \.\.\.)", returns)
    if is_composed and not is_property and not re.search("^(Returns|Yields):$", docstring, re.MULTILINE):
        yield "Returns"


def missing_by_part(node: ast.stmt) -> dict[str, list[str]]:
    """Of a function; or of a class its fields that are arrays, its constructor and its public methods."""
    if isinstance(node, Function):
        return {node.name: [*missing_parts(node)]}
    assert isinstance(node, ast.ClassDef)
    docstring = ast.get_docstring(node) or ""
    parts = {node.name: [] if docstring else ["anything"]}
    for part in node.body:
        if isinstance(part, Function) and part.name == "__init__":
            parts[part.name] = [*unnamed(part, docstring)]
        elif isinstance(part, Function) and not part.name.startswith("_") and part.name not in parts:  # nor a setter
            parts[part.name] = [*missing_parts(part)]
        elif isinstance(part, ast.AnnAssign) and ast.unparse(part.annotation) in ("np.ndarray", "np.ndarray | None"):
            name = ast.unparse(part.target)
            if not re.search(rf"^  [\w, ]*\b{name}\b[\w, ]*:.*\[", docstring, re.MULTILINE):
                parts[name] = ["dtype [axes]"]
    return parts


def test_what_rooms_import_from_each_other_says_what_its_types_leave_open():
    assert len(shared()) > 250
    gaps = [
        f"{name}.{part}: {', '.join(missing)}"
        for name, node in shared().items()
        for part, missing in missing_by_part(node).items()
        if missing
    ]
    assert not gaps


def test_every_public_function_says_what_it_raises():
    silent = [
        f"{module}.{function.name}"
        for module, tree in modules().items()
        if not module.startswith("brewjax.cli")  # whose docstrings users read
        for node in tree.body
        if not getattr(node, "name", "_").startswith("_")
        for function in functions(node)
        if raises(function) and "Raises:" not in (ast.get_docstring(function) or "")
    ]
    assert not silent
