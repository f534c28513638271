"""The generated modules are those of the protos: `make proto` makes them anew, by the oldest protobuf they are for."""

import re
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

ROOT = Path(__file__).parents[2]


def test_the_generated_modules_are_of_the_protos(tmp_path):
    includes = [f"-I{ROOT}", f"-I{Path(grpc_tools.__file__).parent / '_proto'}"]
    protos = [f"brewjax/serve/{name}.proto" for name in ("ranker", "retriever")]
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    assert protoc.main(["protoc", *includes, *outputs, *protos]) == 0
    generated = {path.name: path.read_text() for path in (tmp_path / "brewjax" / "serve").iterdir()}
    assert len(generated) == 6
    for name, text in generated.items():
        assert without_versions(text) == without_versions((ROOT / "brewjax" / "serve" / name).read_text()), name


def without_versions(text: str) -> str:
    """A generated module without the versions of what generated it: those of `make proto` are older than these."""
    return re.sub(r"(Version: |VERSION = '|^    )\d+[\d.]*", r"\1", text, flags=re.MULTILINE)
