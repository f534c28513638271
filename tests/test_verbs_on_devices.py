"""The verbs over several devices. Run as a script, this file is a user who goes through them."""

import json
import os
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from brewjax.cli import app
from brewjax.data.text.tokenizer import Tokenizer
from brewjax.model import huggingface
from tests.tiny import MODEL, params

ROOT = Path(__file__).parents[1]
PROMPT = {"preamble": "Nurse", "events": ["Acme"], "questions": ["Nurse?", "Acme?"], "labels": ["Yes", "No"]}


def test_a_mixture_goes_through_the_verbs_over_four_devices(tmp_path):
    """That it says the same on any mesh is held elsewhere (`test_sharding`)."""
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "4"}
    command = [sys.executable, "-m", "tests.test_verbs_on_devices", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    weights = "model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (tmp_path / "again" / weights).read_bytes()


def main(folder: Path) -> None:
    def verb(*arguments: object) -> None:
        done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
        assert done.exit_code == 0, done.output

    tokenizer = Tokenizer.train(["Nurse, Acme"], ["Yes", "No"], vocab_size=300)
    model = MODEL.model_copy(update={"vocab_size": tokenizer.vocab_size})
    (folder / "open").mkdir()
    huggingface.write(folder / "open", model, params(model), {})
    tokenizer.save(folder / "open")
    (folder / "prompt.json").write_text(json.dumps(PROMPT))
    verb("import", folder / "open", folder / "dense")
    verb("upcycle", folder / "dense", folder / "mixed", "--experts", 4)
    verb("export", folder / "mixed", folder / "out")
    verb("import", folder / "out", folder / "same")
    verb("export", folder / "same", folder / "again")
    verb("score", folder / "same", "--prompt", folder / "prompt.json")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
