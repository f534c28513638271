# %% [markdown]
# # Retrieve, then rank
#
# A ranker reads every candidate, so it cannot read a catalogue of millions. An encoder makes one vector of a member and
# one of each job; the nearest jobs are the candidates. Here it starts from the ranker's weights and learns, by a
# contrastive loss, to bring members near to the jobs that they applied to.

# %%
import tempfile
from pathlib import Path

import jobs
import pandas as pd

import brewjax
from brewjax.evaluate.funnel import evaluate_funnel
from brewjax.retrieve.index import Index, IndexConfig

run = jobs.train("evaluate-encoder")
encoder = brewjax.open(run / "encoder/model", jobs.DATASET)
ranker = brewjax.open(run / "big/model", jobs.DATASET)

# %% [markdown]
# The vectors of all jobs, and their map: two directions out of 64. What decides about applications is whether a job is
# remote, so that is what should separate them.

# %%
items = encoder.embed("items")
items

# %%
items.plot(colour="place")

# %% [markdown]
# An index holds the vectors, on disk; searches are exact. What the member knows is left out.

# %%
index = Index.create(Path(tempfile.mkdtemp()), IndexConfig(dimensions=items.vectors.shape[1], ids="text"))
index.upsert(items.ids, items.vectors)
context = ranker.context("7")
seen = set(items.ids) - set(context.item_ids)
(hits,) = index.search(encoder.embed("members", ["7"]).vectors, k=10, exclude=[seen])
jobs_table = encoder.dataset.items.to_pandas().astype({"item_id": str}).set_index("item_id")
jobs_table.loc[hits.ids].assign(cosine=hits.scores)

# %% [markdown]
# The ranker orders what was retrieved. Beside it, the rank of each job if all that are new to the member are ranked.

# %%
ranking = context.change(items=hits.ids).rank()
of_all = {item: rank for rank, item in context.rank()["item"].items()}
ranking.assign(rank_of_all=ranking["item"].map(of_all))

# %% [markdown]
# How good is retrieval alone? Recall@10 on the test period, beside the baselines. Nothing about these members says
# which job they want but that it is remote, so popularity knows all there is to know, and no encoder can be ahead of
# it; `lead` is how far the encoder is ahead.

# %%
recall = pd.read_json(run / "evaluate-encoder/recall.json").query("past_events == 'all' and k == 10")
recall[["method", "recall", "error", "lead", "lead_error"]].set_index("method").round(3)

# %% [markdown]
# What is lost by retrieving first? Over the test period: NDCG@10 among all jobs, where those that the member went on to
# are the relevant ones. `lead` is this minus that of ranking everything, with its 95% interval.

# %%
funnel = pd.DataFrame(evaluate_funnel(encoder.encoder, ranker.bundle, encoder.dataset, ks=(10, 20, 30)))
funnel.set_index("method").round(3)

# %% [markdown]
# The interval of a difference is narrower than that of each value, for both are of the same members. To rank fewer jobs
# costs less; whether it also loses something is what the last two columns say.
#
# Are the ranker's probabilities right? On the dashed line they are what happened.

# %%
ranker.calibration("apply").plot()

# %%
place = jobs_table["place"][list(items.ids)]
points, _ = items.project()
remote, on_site = (points[(place == value).to_numpy()].mean(0) for value in ("remote", "on site"))
assert abs(remote - on_site).max() > points.std(), "the map does not tell remote jobs from the others"
assert funnel["ranked"].iloc[0] > funnel["ranked"].iloc[1], "retrieving saves no work"
