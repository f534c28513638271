"""Other checkpoints, taken up by a server that runs."""

import concurrent.futures
import dataclasses
import shutil
from pathlib import Path

import grpc
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from brewjax.data.text.tokenizer import Tokenizer
from brewjax.scoring.passes import Bucket
from brewjax.scoring.scorer import Scorer
from tests.serve.serving import ask, eventually, expected, probabilities, refusal
from tests.tiny import params

Code = grpc.StatusCode


@pytest.fixture(scope="module")
def new_folder(bundle, tmp_path_factory) -> Path:
    """A checkpoint of the same shape."""
    folder = tmp_path_factory.mktemp("other")
    dataclasses.replace(bundle, params=params(bundle.model, 1)).save(folder)
    return folder


def test_a_reload_under_load_drops_nobody_and_mixes_nothing(server, client, bundle, alone, new_folder, scoring_loop):
    of_new = Scorer(bundle.model, params(bundle.model, 1), bundle.tokenizer, "dense", [Bucket(256), Bucket(4096)])
    questions = [ask(seed, 30) for seed in range(6)]
    before = client.describe()
    right = {before.model: [expected(alone, question) for question in questions]}
    seen: list[str] = []
    done = False

    def keep_asking(number: int) -> None:
        while not done:
            at = len(seen) % len(questions)
            responses = list(client.stream(questions[at])) if number % 2 else [client.score(questions[at])]
            (model,) = {response.model for response in responses}
            results.append((model, at, probabilities(*responses)))
            seen.append(model)

    results: list[tuple[str, int, np.ndarray]] = []
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        asking = [pool.submit(keep_asking, number) for number in range(6)]
        try:
            eventually(lambda: len(seen) > 6)
            new = client.reload(str(new_folder)).model
            eventually(lambda: seen.count(new) > 12)
        finally:
            done = True
            restored = client.reload().model  # for the tests that follow, whatever failed
    for future in asking:
        future.result()
    assert new != before.model
    assert set(seen) == {before.model, new}
    right[new] = [expected(of_new, question) for question in questions]
    for model, at, scores in results:
        np.testing.assert_allclose(scores, right[model][at], atol=1e-5)
    assert restored == before.model
    np.testing.assert_allclose(probabilities(client.score(questions[0])), right[before.model][0], atol=1e-5)
    assert client.describe().compilations == before.compilations


def break_weights(folder: Path) -> None:
    largest = max((path for path in (folder / "params").rglob("*") if path.is_file()), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])


def lose_weights(folder: Path) -> None:
    for path in (folder / "params" / "state").rglob("d"):
        shutil.rmtree(path)


BROKEN = {
    "no model.yaml there": lambda folder: (folder / "model.yaml").unlink(),
    "no complete weights there": lambda folder: shutil.rmtree(folder / "params"),
    "model cannot be read: ": break_weights,
    "model cannot be read: NOT_FOUND": lose_weights,
    "no tokenizer.json there": lambda folder: shutil.rmtree(folder / "tokenizer"),
    "dataset.yaml": lambda folder: (folder / "surfaces" / "jobs" / "dataset.yaml").write_text("name: [oops"),
}


def changed(bundle, fault: str):
    if fault == "not finite":
        leaves, tree = jax.tree.flatten(bundle.params)
        spoilt = jax.tree.unflatten(tree, [leaves[0].at[(0,) * leaves[0].ndim].set(jnp.nan), *leaves[1:]])
        return dataclasses.replace(bundle, params=spoilt)
    if fault == "another shape":
        model = bundle.model.model_copy(update={"d_ff": 64})
        return dataclasses.replace(bundle, model=model, params=params(model))
    return dataclasses.replace(bundle, tokenizer=Tokenizer.train(["other words"], ["Yes", "No"], vocab_size=300))


@pytest.mark.parametrize("fault", [*BROKEN, "not finite", "another shape", "another tokenizer"])
def test_a_broken_checkpoint_is_refused_and_the_old_one_serves_on(client, bundle, alone, new_folder, tmp_path, fault):
    folder = tmp_path / "model"
    if fault in BROKEN:
        shutil.copytree(new_folder, folder)
        BROKEN[fault](folder)
    else:
        changed(bundle, fault).save(folder)
    before = client.describe()
    code, details = refusal(client.reload, str(folder))
    assert code is Code.INVALID_ARGUMENT
    assert fault in details
    assert "Traceback" not in details
    question = ask(1, 5)
    np.testing.assert_allclose(probabilities(client.score(question)), expected(alone, question), atol=1e-5)
    assert client.describe().model == before.model
