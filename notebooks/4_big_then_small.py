# %% [markdown]
# # Big, then small: what did pruning take?
#
# The recipe takes half of the neurons out of the big model, and then lets the small one learn from the big one.

# %%
import jobs
import pandas as pd
import pyarrow.parquet as pq

import brewjax
from brewjax.evaluate.results import OVERALL, compare
from brewjax.model.params import num_parameters

run = jobs.train("evaluate-small")
names = ("big", "pruned", "small")
models = {name: brewjax.open(run / name / "model", jobs.DATASET) for name in names}
{name: f"{num_parameters(model.bundle.params):,} parameters" for name, model in models.items()}

# %% [markdown]
# How good is each, on questions that came after its training?

# %%
task = models["big"].tasks["apply"]
predictions = {name: pq.read_table(run / f"evaluate-{name}" / "apply.parquet") for name in names}
comparison = compare(task, predictions)
metrics = {
    name: {metric: f"{value.value:.3f} ± {value.error:.3f}" for metric, value in results[OVERALL].metrics.items()}
    for name, results in comparison.results.items()
}
pd.DataFrame(metrics).T

# %% [markdown]
# And how alike do they rank, for members one by one? A rank correlation of 1 is the same order.

# %%
rows = []
for member in range(8):
    context = models["big"].context(member, items=30)
    for name in names[1:]:
        change = models["big"].compare(context, context.change(bundle=models[name].bundle))
        rows.append({"model": name, "rank correlation": change.correlation, "of the first 10": change.overlap})
pd.DataFrame(rows).groupby("model").mean().round(3)

# %% [markdown]
# Do they rank for the same reasons? The largest effects of each model on one score.

# %%
context = models["big"].context("7", items=30)
item = context.rank()["item"].iloc[0]
tables = {
    name: context.change(bundle=models[name].bundle).why(item).table().set_index("part")["effect"] for name in names
}
parts = tables["big"].abs().sort_values(ascending=False).index.drop_duplicates()[:8]
pd.DataFrame({name: effects[~effects.index.duplicated()].reindex(parts) for name, effects in tables.items()}).round(3)
