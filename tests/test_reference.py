"""Everything on the page "Python" of the reference says what it takes, what it returns and what it raises."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import brewjax

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
