"""What each part of an encoder is worth: the recipe with one part changed, against the recipe as it is.

`python -m benchmarks.retrieval_ablations configs/recipes/encoder.yaml OUT [NAME ..]` trains an encoder a variant,
and prints its recall on the queries of the test period, and by how much that is above the recipe's own, paired over
members. What is in OUT already is not made again. `--ranker MODEL` adds two variants with the same records: one that
learns the ranker's scores of them, and one that does not.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import yaml

from brewjax.data.tables.dataset import Dataset
from brewjax.pipeline.recipe import ContrastiveStage, Recipe
from brewjax.pipeline.stages import run_recipe
from brewjax.retrieve.encoder import Encoder
from brewjax.retrieve.evaluation import interval, recall_at, resample_members, search_catalogue
from brewjax.retrieve.queries import Queries, select_queries
from brewjax.train.contrastive import MASKED, Contrastive

AS_IT_IS, BCE, NO_FACTS = "as-it-is", "bce", "no-facts"
K, BOOTSTRAP = 100, 200


class BinaryCrossEntropy(Contrastive):
    """Each pair of a member and an item is a question of its own, as in SigLIP (Zhai et al. 2023, arXiv 2303.15343).

    The bias is the log of the prior odds: one positive among all negatives.
    """

    def loss_of_positives(self, positive: jax.Array, negatives: jax.Array) -> jax.Array:
        is_negative = negatives > MASKED / 2
        bias = -jnp.log(jnp.maximum(jnp.sum(is_negative, -1), 1))
        of_negatives = jnp.where(is_negative, jax.nn.softplus(negatives + bias[..., None]), 0)
        return jax.nn.softplus(-(positive + bias)) + jnp.sum(of_negatives, -1)


def variants(name: str, out: Path, ranker: Path | None, max_ranked: int) -> dict[str, list[str]]:
    """What is set in the recipe for each variant, whose encoder is the stage `name`."""
    stage = f"stages.{name}"
    settings = {
        AS_IT_IS: [],
        "last-token": [f"{stage}.loss.pooling=last"],
        BCE: [],
        "no-logq": [f"{stage}.loss.logq_correction=false"],
        NO_FACTS: [f"dataset={out / 'dataset'}"],
        "mined-negatives": [
            f"{stage}.data.mined_negatives={{encoder: {out / AS_IT_IS / name / 'model'}, count: 2}}",
        ],
        "no-matryoshka": [f"{stage}.loss.dimensions=[]"],
    }
    if ranker:
        data = {"ranker": ranker, "hard_negatives": 8, "max_examples": max_ranked}
        records = [f"{stage}.data.{key}={value}" for key, value in data.items()]
        settings |= {"ranker-unread": [*records, f"{stage}.loss.ranker_weight=0"], "distilled": records}
    return settings


def train(path: str, name: str, variant: str, settings: Sequence[str], out: Path) -> Path:
    """The encoder's folder."""
    recipe = Recipe.load(path, settings)
    stage = recipe.stages[name]
    assert isinstance(stage, ContrastiveStage)
    if variant == BCE:
        changed = stage.model_copy(update={"loss": BinaryCrossEntropy(**stage.loss.model_dump())})
        recipe = recipe.model_copy(update={"stages": {name: changed}})
    run_recipe(recipe, out / variant, allow_code_mismatch=True, until=name)
    return out / variant / name / "model"


def write_without_facts(dataset: Path, folder: Path) -> None:
    """The same tables, with a card that declares no facts."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in dataset.iterdir():
        link = folder / path.name
        if path.suffix != ".yaml" and not link.exists():
            link.symlink_to(path.resolve())
    card = yaml.safe_load((dataset / "dataset.yaml").read_text())
    (folder / "dataset.yaml").write_text(yaml.safe_dump(card | {"facts": {}}, sort_keys=False))


def measure(model: Path, dataset: Dataset, queries: Queries, dimensions: int | None = None) -> np.ndarray:
    """float64 [queries]: recall at K; computed once for a model."""
    path = model.parent / f"recall-{dimensions or 'whole'}.npy"
    if not path.exists():
        nearest = search_catalogue(Encoder.load(model), dataset, queries, K, dimensions)
        np.save(path, recall_at(nearest, queries.positives, K))
    return np.load(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="with one stage, an encoder, and one dataset")
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="*", help="of the variants; by default all")
    parser.add_argument("--ranker", type=Path, help="a ranker's folder")
    parser.add_argument("--max-ranked", type=int, default=2500, help="records that it scores; 100 steps read so many")
    arguments = parser.parse_intermixed_args()
    recipe = Recipe.load(arguments.recipe)
    (name,), folder = recipe.stages, Path(str(recipe.dataset))
    write_without_facts(folder, arguments.out / "dataset")
    settings = variants(name, arguments.out, arguments.ranker, arguments.max_ranked)
    rows: dict[str, np.ndarray] = {}
    queries: Queries | None = None
    for variant in dict.fromkeys([AS_IT_IS, *(arguments.names or settings)]):
        model = train(arguments.recipe, name, variant, settings[variant], arguments.out)
        dataset = Dataset.load(arguments.out / "dataset" if variant == NO_FACTS else folder)
        queries = queries or select_queries(dataset, Encoder.load(model).task)
        rows[variant] = measure(model, dataset, queries)
        if variant == AS_IT_IS:
            for size in Encoder.load(model).config.dimensions:
                rows[f"{variant}, {size} dimensions"] = measure(model, dataset, queries, size)
    assert queries
    weights, _ = resample_members(queries, BOOTSTRAP)
    print(f"| variant | Recall@{K} | minus {AS_IT_IS} |\n|---|---|---|")
    for variant, recall in rows.items():
        lead = recall - rows[AS_IT_IS]
        error, lead_error = interval(weights, recall), interval(weights, lead)
        shown = "" if variant == AS_IT_IS else f"{lead.mean():+.3f} ±{lead_error:.3f}"
        print(f"| {variant} | {recall.mean():.3f} ±{error:.3f} | {shown} |")


if __name__ == "__main__":
    main()
