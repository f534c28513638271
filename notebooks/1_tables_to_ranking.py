# %% [markdown]
# # From tables to a ranking
#
# Three tables and a card become prompts, prompts train a model, and the model ranks. The job site is made up (see
# `jobs.py` beside this notebook): whether a member is *actively seeking* and whether a job is *remote* decide about
# applications, and nothing else does.

# %%
import jobs

import brewjax

dataset = brewjax.Dataset.load(jobs.make_tables())
dataset.members.to_pandas().head(4)

# %%
dataset.items.to_pandas().head(4)

# %%
dataset.events.to_pandas().head(4)

# %% [markdown]
# The card says how to speak about the tables, and the task what is asked.

# %%
print(jobs.CARD)
print(jobs.APPLY)

# %% [markdown]
# One recipe prepares the data, trains a model and evaluates it. What is done already is not done again.

# %%
run = jobs.train()

# %%
model = brewjax.open(run / "big/model", dataset)
model

# %% [markdown]
# A context is a member as of a moment, with a task and candidates. This is what the model reads; every question sees
# the instruction and the history, and no other question.

# %%
context = model.context("7", items=12)
context.prompt()

# %%
context.rank()

# %% [markdown]
# The tokens of a prompt, and what a prompt of your own scores.

# %%
model.tokens("7", items=1)

# %%
from brewjax.data.text.prompt import Prompt, Question

questions = (
    Question("? apply|nurse wanted|remote|salary#50\n"),
    Question("? apply|nurse wanted|on site|salary#50\n"),
)
model.score(Prompt("Do they apply?\nnurse|actively\n", (), questions, ("Yes", "No"))).round(3)

# %%
scores = context.rank()
assert scores["log_odds"].is_monotonic_decreasing
