"""What a check can hold of the house's language and structure."""

from __future__ import annotations

import ast
import functools
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Lowest first: a floor imports from itself and from floors below it. Floors of one line do not see each other.
FLOORS = (
    {"pallas_kernels"},
    {"brewjax.paths"},
    {"brewjax.config", "brewjax.fingerprint", "brewjax.devices", "brewjax.distributed"},
    {"brewjax.console", "brewjax.download"},
    {"brewjax.data.tables", "brewjax.data.text"},
    {"brewjax.data.public"},
    {"brewjax.data.tasks"},
    {"brewjax.data.prompts"},
    {"brewjax.data.records"},
    {"brewjax.data"},
    {"brewjax.model"},
    {"brewjax.scoring"},
    {"brewjax.bundle"},
    {"brewjax.train", "brewjax.retrieve"},
    {"brewjax.compress"},
    {"brewjax.evaluate", "brewjax.aot"},
    {"brewjax.suite"},
    {"brewjax.serve", "brewjax.explore"},
    {"brewjax.pipeline"},
    {
        "brewjax.schemas",
        "brewjax.cli_errors",
        "brewjax.cli_data",
        "brewjax.cli_index",
        "brewjax.cli_models",
        "brewjax.cli_retrieve",
        "brewjax.cli_suite",
    },
    {"brewjax.cli"},
    {"brewjax.__main__"},
    {"brewjax"},
)
# Words that are no names: a reader from JAX, search or recommender systems would have to guess what they hold.
NO_NAMES = """
said told asked found given taken met kept drawn wanted one other another own mine others those here there who what
most least at_most began beside way ways whoever nobody
""".split()  # noqa: SIM905


@functools.cache
def modules() -> dict[str, ast.Module]:
    files = [path for package in ("brewjax", "pallas_kernels") for path in (ROOT / package).rglob("*.py")]
    return {name(path): ast.parse(path.read_text()) for path in files if "_pb2" not in path.name}


def name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.Module) -> Iterator[str]:
    """Modules of this project that a module imports, inside functions too, but for type annotations alone."""
    typing_only = {
        node
        for guard in ast.walk(tree)
        if isinstance(guard, ast.If) and ast.unparse(guard.test) == "TYPE_CHECKING"
        for node in ast.walk(guard)
    }
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if not alias.name.endswith(("_pb2", "_pb2_grpc")):  # which import nothing of ours
                    yield inner if inner in modules() else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def graph() -> dict[str, set[str]]:
    return {
        module: {imported for imported in imports(tree) if imported in modules()} for module, tree in modules().items()
    }


def floor(module: str) -> int:
    for level, rooms in enumerate(FLOORS):
        if any(module == room or (module.startswith(f"{room}.") and room != "brewjax") for room in rooms):
            return level
    raise AssertionError(f"{module} is on no floor: add it to FLOORS")


def test_no_module_imports_from_a_floor_above_it():
    upward = [
        f"{module} -> {target}"
        for module, targets in graph().items()
        for target in targets
        if floor(target) > floor(module)
    ]
    assert not upward


def test_no_two_modules_import_each_other_however_far_round():
    edges, done, path = graph(), set(), []

    def visit(module: str) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            path.append(module)
            for imported in edges[module]:
                visit(imported)
            path.pop()
            done.add(module)

    for module in edges:
        visit(module)


def test_no_two_classes_have_one_name():
    places = defaultdict(list)
    for module, tree in modules().items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                places[node.name].append(module)
    assert not {class_name: where for class_name, where in places.items() if len(where) > 1}


def test_no_two_test_files_have_one_name():
    """pytest would refuse the second, but only when both are run."""
    counts = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert not [file for file, count in counts.items() if count > 1]


def bindings(tree: ast.Module) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.arg) and node.arg != "other":  # of a binary operation
            yield node.arg, node.lineno
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.ExceptHandler)) and node.name:
            yield node.name, node.lineno
        elif isinstance(node, ast.alias) and node.asname:
            yield node.asname, node.lineno


@pytest.mark.parametrize("folder", ["brewjax", "pallas_kernels", "tests", "benchmarks", "notebooks"])
def test_names_are_words_of_the_field(folder):
    files = [path for path in (ROOT / folder).rglob("*.py") if "_pb2" not in path.name]
    assert files
    bad = [
        f"{path.relative_to(ROOT)}:{line} {bound}"
        for path in files
        for bound, line in bindings(ast.parse(path.read_text()))
        if bound.strip("_") in NO_NAMES
    ]
    assert not bad


def axis_letters(tree: ast.Module) -> Iterator[str]:
    """Letters in shapes such as `Float[Array, "B T D"]`; a word is a name, and a star stands for any axes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and getattr(node.value, "id", "") in ("Float", "Int", "Bool", "Num"):
            *_, shape = node.slice.elts if isinstance(node.slice, ast.Tuple) else [None]
            if isinstance(shape, ast.Constant) and isinstance(shape.value, str):
                yield from re.findall(r"(?<![*\w])[A-Za-z]{1,2}(?!\w)", shape.value)


def test_axis_letters_are_in_the_legend():
    legend = (ROOT / "docs/glossary.md").read_text().partition("## Axis letters")[2]
    known = {
        letter.strip() for row in re.findall(r"^\| ([\w, ]+) \|", legend, re.MULTILINE) for letter in row.split(",")
    }
    used = {letter for tree in modules().values() for letter in axis_letters(tree)}
    assert {"B", "T", "D", "NQ"} <= used
    assert not {letters for letters in used if letters not in known and not {*letters} <= known}
