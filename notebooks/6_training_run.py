# %% [markdown]
# # A training run, read from its metrics
#
# Every stage that trains writes `metrics.jsonl`, one line per step: no service, no account. TensorBoard reads the
# `tensorboard` folder beside it.

# %%
import jobs
import pandas as pd
from matplotlib import pyplot

run = jobs.train()
metrics = pd.read_json(run / "big/metrics.jsonl", lines=True).set_index("step")
metrics.iloc[[0, 1, len(metrics) // 2, -1]].T

# %% [markdown]
# The loss is the mean cross-entropy of label words, so it is compared with what can be known: the entropy of the
# answers (always saying how often Yes is the answer), and that of the probabilities by which the tables were made.

# %%
import numpy as np

import brewjax

dataset = brewjax.Dataset.load(jobs.DATASET)
base = dataset.has_action(["applied"]).mean()


def entropy(p):
    return -(p * np.log(p) + (1 - p) * np.log(1 - p))


signs = {"actively": 1, "passively": -1, "remote": 1, "on site": -1}
seeking = np.array([signs[word] for word in dataset.members["seeking"].to_pylist()])
place = np.array([signs[word] for word in dataset.items["place"].to_pylist()])
odds = jobs.SEEKING * seeking[dataset.event_member] + jobs.REMOTE * place[dataset.event_item]
best = entropy(1 / (1 + np.exp(-odds))).mean()
{"knowing nothing": round(float(entropy(base)), 3), "knowing all": round(float(best), 3)}

# %%
figure, (loss, norm) = pyplot.subplots(1, 2, figsize=(8, 2.8), layout="constrained")
loss.plot(metrics["loss"], alpha=0.3)
loss.plot(metrics["loss"].rolling(20).mean())
loss.axhline(entropy(base), color="gray", linestyle=":")
loss.axhline(best, color="gray", linestyle="--")
loss.set(ylim=(0.3, 1.2), xlabel="step", title="loss, and what can be known")
norm.semilogy(metrics["grad_norm"], label="gradient")
norm.semilogy(metrics["update_norm"].replace(0, np.nan), label="update")
norm.legend(frameon=False)
norm.set(xlabel="step", title="norms")

# %% [markdown]
# Is it fast? Tokens per second, without the first steps, in which programs are compiled.

# %%
speed = metrics["tokens_per_second"].iloc[5:]
print(f"{'steady' if speed.median() > 0.2 * speed.max() else 'uneven: something else ran on this machine'}")

# %%
last = metrics["loss"].iloc[-40:].mean()
assert last < entropy(base), "it has learned less than how often Yes is the answer"
