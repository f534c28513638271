"""One model of two surfaces: jobs and people of the simulated network, whose tasks have one name."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from brewjax.bundle.bundle import Bundle
from brewjax.config import ConfigError
from brewjax.data.records.pretrain import PretrainConfig
from brewjax.data.records.sft import SftConfig
from brewjax.data.records.shards import read_counts
from brewjax.data.simulate.network import simulate_network
from brewjax.data.tables.dataset import Dataset
from brewjax.paths import CONFIGS
from brewjax.pipeline.check import check_run
from brewjax.pipeline.context import Run
from brewjax.pipeline.dry_run import surfaces_table
from brewjax.pipeline.preparation import Preparation, write_data
from brewjax.pipeline.recipe import Recipe
from brewjax.pipeline.stages import prepare, run_recipe, shares
from brewjax.pipeline.workers import write_here, write_on_all_cores, write_on_this_host
from brewjax.retrieve.encoder import Encoder
from tests.pipeline.test_preparation import contents
from tests.pipeline.test_run import MODEL, brewjax, in_process, start

TASKS = {"jobs": "applies", "people": "connects", "posts": "clicks_post"}
RECIPE = """\
name: network
surfaces:
  jobs: {dataset: network/jobs, tasks: [jobs.yaml]}
  people: {dataset: network/people, tasks: [people.yaml], weight: 2}
model: model.yaml
tokenizer: {vocab_size: 1200}
prompts: {styles: {compact: 1, sectioned: 1}, score_style: compact, max_tokens: 512}
train: {steps: 4, batch_size: 2, seq_len: 640, checkpoint_every_steps: 2, mesh: {data: 1}}
evaluate: {max_examples: 5, bootstrap: 10, baseline_settings: 1}
stages:
  big: {do: sft, data: {max_examples: 40, mix: {temperature: 2}, soft_labels: LightGBM}}
  small: {do: prune, d_ff: 0.5, examples: 8}
  turbo: {do: quantize}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A user's folder with the network, and a task "acts" for each surface."""
    folder = tmp_path_factory.mktemp("user")
    simulate_network(folder / "network", 150, seed=3, months=2)
    for surface, name in TASKS.items():
        text = (CONFIGS / "tasks" / "network" / f"{name}.yaml").read_text()
        (folder / f"{surface}.yaml").write_text(text.replace(f"name: {name}", "name: acts"))
    (folder / "model.yaml").write_text(MODEL)
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="module")
def trained(folder) -> Path:
    """The folder of the run."""
    done = brewjax(folder, "run", "recipe.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "runs" / "network"


def weights(model: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in model.iterdir() if path.is_file()}


def test_a_run_names_surface_and_task(trained):
    for folder in ("data-big", "evaluate-turbo", "baselines"):
        assert sorted(path.name for path in (trained / folder).iterdir() if path.is_dir()) == ["jobs", "people"]
    report = (trained / "report" / "report.md").read_text()
    for words in ("## jobs/acts", "## people/acts", "jobs/acts: AUC in list", "jobs/dataset: network-jobs"):
        assert words in report
    assert "Tasks told apart" not in report  # rows of two surfaces are no pairs


def test_a_models_folder_knows_both_surfaces(folder, trained):
    bundle = Bundle.load(trained / "turbo" / "model")
    assert bundle.task_names == ["jobs/acts", "people/acts"]
    for name in ("jobs", "people"):
        dataset = Dataset.load(folder / "network" / name)
        surface = bundle.surface_of(dataset)
        assert surface is bundle.surface(name)
        assert surface.card == dataset.card
        assert surface.scales.fits(dataset)
    assert [data.dataset for data in bundle.training.data] == [bundle.surface(n).card.name for n in ("jobs", "people")]
    assert bundle.surface_of(Dataset.load(folder / "network" / "posts")) is None


def test_verbs_find_the_surface_or_are_told(workdir, trained, refuse):
    model = "runs/network/turbo/model"
    for surface in TASKS:  # posts were never trained on
        arguments = ("evaluate", model, f"network/{surface}", f"{surface}.yaml", "--max-examples", "2")
        judged = in_process(workdir, *arguments)
        assert judged.exit_code == 0, judged.output
        assert ("scales are fitted to this one" in judged.stderr) == (surface == "posts")
    refused = refuse("evaluate", model, "network/jobs", "jobs.yaml", "--surface", "films")
    assert "no surface 'films'; there are: jobs, people" in refused
    refused = refuse("evaluate", model, "network/jobs", "jobs.yaml", "--surface", "people")
    assert "network/jobs: surface 'people' of the model has no scales of" in refused
    arguments = ("--dataset", "network/people", "--task", "people.yaml", "--member", "7", "--items", "5")
    ranked = in_process(workdir, "score", model, *arguments)
    assert ranked.exit_code == 0, ranked.output


@pytest.mark.long
def test_killed_in_the_middle_it_ends_with_the_same_bits(folder, trained):
    for step in ("data-big", "big", "evaluate-big", "small", "turbo"):
        output = folder / "runs" / "killed" / step
        running = start(folder, "run", "recipe.yaml", "--out", "runs/killed")
        awaited = "checkpoints/[0-9]*" if step == "big" else "stage.json"
        while not list(output.glob(awaited)) and running.poll() is None:
            time.sleep(0.01)
        running.kill()
        assert running.wait() == -signal.SIGKILL, running.stderr.read().decode()
    last = brewjax(folder, "run", "recipe.yaml", "--out", "runs/killed")
    assert last.returncode == 0, last.stderr
    killed = folder / "runs" / "killed"
    assert weights(killed / "big" / "model") == weights(trained / "big" / "model")
    for name in ("jobs", "people"):
        tables = [pq.read_table(run / "evaluate-turbo" / name / "acts.parquet") for run in (trained, killed)]
        assert tables[0].equals(tables[1])


@pytest.mark.long
def test_an_encoder_is_of_the_surface_of_its_task(workdir, capsys):
    stage = {"do": "contrastive", "data": {"task": "people/acts"}, "loss": {"dimensions": [8]}}
    run_recipe(load(workdir, "encoder", stages={"encoder": stage}).recipe, workdir / "encoder")
    encoder = Encoder.load(workdir / "encoder" / "encoder" / "model")
    assert (encoder.surface.name, encoder.task.name, encoder.config.task) == ("people", "acts", "acts")
    assert "Recall@100" in capsys.readouterr().out


def load(folder: Path, out: str, **changed: object) -> Run:
    return Run(Recipe.parse(yaml.safe_dump(yaml.safe_load(RECIPE) | changed, sort_keys=False)), folder / out)


def prepared(folder: Path, out: str, **changed: object) -> Run:
    """A run with a tokenizer and all that its first fine-tuning reads."""
    run = load(folder, out, **changed)
    (run.folder / "prepare").mkdir(parents=True)
    prepare(run, run.folder / "prepare")
    return run


@pytest.fixture
def workdir(folder, monkeypatch) -> Path:
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="module")
def both(folder) -> Run:
    """The recipe's run, prepared."""
    with contextlib.chdir(folder):
        return prepared(folder, "both")


TOKENIZER = {"path": "both/prepare/tokenizer"}  # what has one need not train one


def test_records_of_a_surface_do_not_depend_on_the_others(workdir, both):
    surfaces = yaml.safe_load(RECIPE)["surfaces"]
    alone = prepared(workdir, "alone", surfaces={"jobs": surfaces["jobs"]}, tokenizer=TOKENIZER)
    short = prepared(
        workdir, "short", surfaces={}, **{k: surfaces["jobs"][k] for k in ("dataset", "tasks")}, tokenizer=TOKENIZER
    )
    config = both.recipe.stages["big"].data
    written = {}
    for run, write in ((both, write_on_all_cores), (alone, write_here), (short, write_here)):
        preparation = Preparation(run.recipe, run.folder, config, 640, run.folder / "data", records_per_shard=9)
        preparation.predict_soft_labels(run)
        counts = write(preparation, run)
        written[run.folder.name] = contents(run.folder / "data" / ("jobs" if run is both else ""))
        assert [*counts] == (["jobs/acts", "people/acts"] if run is both else ["acts"])
    assert len(written["both"]) > 8
    assert written["both"] == written["alone"] == written["short"]
    assert [*short.surfaces] == [Dataset.load("network/jobs").card.name]


def test_shares_are_as_weights_and_temperature_say(workdir):
    run = load(workdir, "shares")
    tokens = {"jobs/acts": 400, "people/acts": 100}
    for name, count in tokens.items():
        (workdir / "shares" / name).mkdir(parents=True)
        (workdir / "shares" / name / "counts.json").write_text(json.dumps({"tokens": count}))
    actual = shares(run, SftConfig(mix={"temperature": 2, "weights": {"jobs/acts": 3}}), workdir / "shares")
    expected = {workdir / "shares/jobs/acts": 3 * 20 / 80, workdir / "shares/people/acts": 2 * 10 / 80}
    assert actual == pytest.approx(expected)


def test_prose_is_of_every_surface_by_weight(workdir, both):
    run = prepared(workdir, "prose", stages={"text": {"do": "pretrain"}}, tokenizer=TOKENIZER)
    write_data(run, PretrainConfig(), 640, write_on_this_host, workdir / "prose" / "data")
    tokens = {name: read_counts(workdir / "prose" / "data" / name / "domain")["tokens"] for name in ("jobs", "people")}
    actual = shares(run, PretrainConfig(), workdir / "prose" / "data")
    expected = tokens["jobs"] / (tokens["jobs"] + 2 * tokens["people"])
    assert actual[workdir / "prose" / "data" / "jobs" / "domain"] == pytest.approx(expected)
    assert sum(actual.values()) == pytest.approx(1)


def test_the_tokenizer_has_read_every_surface(workdir, both):
    jobs = prepared(workdir, "words-of-jobs", surfaces={"jobs": yaml.safe_load(RECIPE)["surfaces"]["jobs"]})
    acts = both.tasks["people/acts"]
    (example,) = acts.sample("train", 1)
    text = acts.surface.verbalizer.prompt(acts.task, example, "sectioned").render()
    assert len(both.tokenizer.encode([text])[0]) < 0.95 * len(jobs.tokenizer.encode([text])[0])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dataset": "network/jobs"}, "surfaces: give 'surfaces', or the 'dataset' and 'tasks' of one, not both"),
        ({"surfaces": {}}, "dataset: missing; give 'dataset' and 'tasks', or 'surfaces'"),
        ({"surfaces": {"jobs": {"dataset": "network/jobs"}}}, "surfaces.jobs.tasks: missing"),
        ({"surfaces": {"jobs": {"dataset": "network/jobs", "tasks": ["jobs.yaml"], "weight": 0}}}, "more than 0"),
        ({"surfaces": {"a/b": {"dataset": "network/jobs", "tasks": ["jobs.yaml"]}}}, "expected a text that fits"),
        ({"surfaces": {"jobs": {"dataset": "films", "tasks": ["jobs.yaml"]}}}, "films: no such folder"),
        ({"surfaces": {"jobs": {"dataset": "network/jobs", "tasks": ["people.yaml"]}}}, "the dataset has no action"),
        ({"stages": {"big": {"do": "sft", "data": {"mix": {"weights": {"acts": 2}}}}}}, "no source 'acts'; sources: j"),
        ({"stages": {"big": {"do": "sft", "data": {"soft_labels": "x.parquet"}}}}, "soft_labels: the ids of a file"),
    ],
)
def test_mistakes_are_named(workdir, changed, message):
    with pytest.raises(ConfigError, match=message):
        check_run(load(workdir, "refused", **changed))
    assert not (workdir / "refused").exists()


def test_one_token_cannot_be_the_id_of_two_things(workdir):
    shutil.copytree("network", "ids", dirs_exist_ok=True)
    surfaces = yaml.safe_load(RECIPE)["surfaces"]
    for name, surface in surfaces.items():
        file = Path("ids", name, "dataset.yaml")
        card = yaml.safe_load(file.read_text())
        column = card["items"].get("id", "item_id")
        card["items"]["attributes"].append({"column": column, "kind": "id", "display_name": "Item"})
        file.write_text(yaml.safe_dump(card, sort_keys=False))
        surface["dataset"] = f"ids/{name}"
    message = "items of surface 'jobs' and of items of surface 'people' are both called 'item', and would be the same"
    with pytest.raises(ConfigError, match=message):
        check_run(load(workdir, "ids", surfaces=surfaces))


def test_surfaces_split_time_each_in_its_own_way(workdir):
    later = Path("jobs.yaml").read_text().replace("validation: 80%", "validation: 70%")
    Path("later.yaml").write_text(later.replace("name: acts", "name: later"))
    surfaces = yaml.safe_load(RECIPE)["surfaces"]
    check_run(load(workdir, "own", surfaces=surfaces | {"jobs": surfaces["jobs"] | {"tasks": ["later.yaml"]}}))
    both = surfaces | {"jobs": surfaces["jobs"] | {"tasks": ["jobs.yaml", "later.yaml"]}}
    with pytest.raises(ConfigError, match="split: not the split of task 'acts'; tasks trained together"):
        check_run(load(workdir, "own", surfaces=both))


def test_a_plan_shows_the_surfaces(workdir):
    columns = {column.header: list(column.cells) for column in surfaces_table(load(workdir, "plan")).columns}
    assert columns["surface"] == ["jobs", "people"]
    assert columns["weight"] == ["1", "2"]
    assert columns["members"] == ["150", "150"]
