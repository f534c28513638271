"""The examples of docstrings run, and their results are as written."""

import doctest

from brewjax.bundle.bundle import Bundle
from brewjax.data.text.prompt import Prompt, Question
from brewjax.scoring.passes import Bucket
from brewjax.scoring.scorer import Scorer
from brewjax.serve.client import Client, raw


def run_example(cls: type, **names: object) -> None:
    (example,) = doctest.DocTestFinder(recurse=False).find(cls, globs={cls.__name__: cls, **names})
    results = doctest.DocTestRunner().run(example)
    assert results.attempted
    assert not results.failed


def test_a_bundle_scores_a_prompt(model_folder):
    run_example(Bundle, folder=model_folder, Prompt=Prompt, Question=Question)


def test_a_scorer_scores_many_prompts(bundle):
    run_example(Scorer, bundle=bundle, Bucket=Bucket, Prompt=Prompt, Question=Question)


def test_a_client_ranks_items(server):
    run_example(Client, address=f"127.0.0.1:{server.port}", raw=raw)
