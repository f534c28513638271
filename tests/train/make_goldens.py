"""Makes goldens/trl.npz: what TRL's own losses give for random log-probabilities and logits.

Not run by the tests, which do without torch. The two functions are taken out of TRL's files: its trainers import far
more than they need. In an environment of its own:
    pip install torch==2.13.0 numpy && pip download trl==0.24.0 --no-deps
    python tests/train/make_goldens.py trl-0.24.0-py3-none-any.whl
"""

import ast
import itertools
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: F401, N812 (what the functions call it)

OUT = Path(__file__).parent / "goldens" / "trl.npz"


def function(wheel: str, path: str, name: str):
    """A method of that name in a file of the wheel, as a function."""
    tree = ast.parse(zipfile.ZipFile(wheel).read(path))
    actual = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name)
    actual.decorator_list = []
    names = globals() | {"FDivergenceType": types.SimpleNamespace(ALPHA_DIVERGENCE=0, JS_DIVERGENCE=1)}
    exec("from __future__ import annotations\n" + ast.unparse(actual), names)
    return names[name]


def main(wheel: str) -> None:
    random = np.random.default_rng(0)
    logps = -random.exponential(5, (4, 20))  # of the chosen and the rejected: policy's, then reference's
    actual = {"logps": logps}
    dpo_loss = function(wheel, "trl/trainer/dpo_trainer.py", "dpo_loss")
    for beta, smoothing in itertools.product((0.1, 0.5), (0.0, 0.1)):
        trainer = types.SimpleNamespace(
            beta=beta,
            label_smoothing=smoothing,
            reference_free=False,
            f_divergence_type=None,
            accelerator=types.SimpleNamespace(device="cpu"),
        )
        losses, chosen, rejected = dpo_loss(trainer, *map(torch.tensor, logps))
        actual[f"dpo {beta} {smoothing}"] = np.stack([losses.numpy(), chosen.numpy(), rejected.numpy()])
    actual["student"], actual["teacher"] = logits = 3 * random.standard_normal((2, 6, 64))
    divergence = function(wheel, "trl/trainer/gkd_trainer.py", "generalized_jsd_loss")
    student, teacher = (torch.tensor(x)[None] for x in logits)
    for beta, temperature in itertools.product((0.0, 0.5, 1.0), (1.0, 2.0)):
        loss = divergence(student, teacher, beta=beta, temperature=temperature, reduction="sum")
        actual[f"jsd {beta} {temperature}"] = loss.numpy()
    np.savez(OUT, **actual)


if __name__ == "__main__":
    main(sys.argv[1])
