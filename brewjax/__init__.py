"""One decoder language model that reads a member's history and ranks anything, from a company's own tables.

Bundle: a model's folder, to score and generate with.
Prompt: a prefix (instruction, profile, history) with questions behind it.
Dataset, Task: a company's tables, and what is asked of them.
Recipe: what `brewjax run` runs.
Client: calls a server.
open: a model to hold in the hand, in a notebook.

Each name is imported when it is first used: `import brewjax` loads neither JAX nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from brewjax.bundle.bundle import Bundle
    from brewjax.data.tables.dataset import Dataset
    from brewjax.data.tasks.task import Task
    from brewjax.data.text.prompt import Prompt
    from brewjax.explore.explorer import open as open
    from brewjax.pipeline.recipe import Recipe
    from brewjax.serve.client import Client

# Without `open`, so that `from brewjax import *` does not hide Python's own.
__all__ = ["Bundle", "Client", "Dataset", "Prompt", "Recipe", "Task"]

_HOMES = {
    "Bundle": "brewjax.bundle.bundle",
    "Client": "brewjax.serve.client",
    "Dataset": "brewjax.data.tables.dataset",
    "Prompt": "brewjax.data.text.prompt",
    "Recipe": "brewjax.pipeline.recipe",
    "Task": "brewjax.data.tasks.task",
    "open": "brewjax.explore.explorer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'brewjax' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
