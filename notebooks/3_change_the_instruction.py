# %% [markdown]
# # Change the instruction
#
# A ranking is steered by words. This small model has read one instruction only, in training, so what another one does
# is an accident of it: look before you promise. A model that was trained on many tasks follows more.

# %%
import jobs

import brewjax

model = brewjax.open(jobs.train() / "big/model", jobs.DATASET)
context = model.context("7", items=30)
context.rank().head()

# %%
changed = context.change(note="Remote jobs only, please.")
model.compare(context, changed)

# %% [markdown]
# The same as numbers, for several changes at once.

# %%
import pandas as pd

changes = {
    "a note": context.change(note="Remote jobs only, please."),
    "another instruction": context.change(instruction="Rank jobs for this member."),
    "no instruction": context.change(instruction=""),
    "another style": context.change(style="key-value"),
    "without the newest event": context.change(left_out=[int(context.in_budget[-1])]),
    "without history": context.change(left_out=context.in_budget.tolist()),
}
rows = {}
for name, after in changes.items():
    change = model.compare(context, after)
    rows[name] = {
        "rank correlation": change.correlation,
        "of the first 10": change.overlap,
        "log-odds": (change.log_odds_after - change.log_odds_before).mean(),
    }
pd.DataFrame(rows).T.round(3)

# %% [markdown]
# What the sentences of the instruction are worth for one item; a note is a part as well.

# %%
changed.why(changed.item_ids[0]).table().query("kind in ('instruction', 'note')")

# %% [markdown]
# `brewjax explore MODEL --dataset DATASET` is the same as a page.

# %%
assert "Remote jobs only" in changed.prompt().prompt.preamble
