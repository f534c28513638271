# %% [markdown]
# # What does it look at?
#
# `why` leaves out each part of a prompt in turn (every event, every attribute, every sentence of the instruction) and
# scores the prompt that is rendered without it. An effect is the difference of the log-odds. It answers "and without
# this?", for one member and one item; parts that say the same can stand in for each other, and then neither has an
# effect of its own.

# %%
import jobs
import pandas as pd

import brewjax

run = jobs.train()
model = brewjax.open(run / "big/model", jobs.DATASET)
active = model.dataset.members.to_pandas()["seeking"] == "actively"
seeker, idler = (str(active[active == value].index[0]) for value in (True, False))

# %%
context = model.context(seeker)
best, worst = context.rank()["item"].iloc[[0, -1]]
reasons = context.why(best)
reasons

# %%
reasons.plot()

# %% [markdown]
# Two causes were planted in the tables: whether the member seeks, and whether the job is remote. The worst item:

# %%
context.why(worst).plot()

# %% [markdown]
# Over many members: how large are the effects, against how far items are apart? `noise` is what rounding alone does:
# the same prompt, read at other positions.

# %%
rows = []
for member in range(16):
    some = model.context(member, items=6)
    why = some.why(some.item_ids[0])
    for part, effect in zip(why.parts, why.effects, strict=True):
        name = part.text.split(":")[0] if part.kind in ("profile", "item") else "all"
        sizes = {"size of effect": abs(effect), "noise": why.noise, "spread of items": why.spread}
        rows.append({"kind": part.kind, "part": name, **sizes})
effects = pd.DataFrame(rows).groupby(["kind", "part"]).mean().sort_values("size of effect", ascending=False)
effects

# %% [markdown]
# What was planted is found: these two are the largest by far.

# %%
assert set(effects.index[:2]) == {("profile", "Seeking"), ("item", "Place")}

# %% [markdown]
# Inside: what the head would make of each layer (the last is the score), and which pieces the question attends to. That
# is a look and no reason: attention to a piece does not say that it matters.

# %%
context.layers(best)

# %%
context.layers(best).plot()

# %% [markdown]
# Two members with the same candidates: who seeks ranks the same jobs alike, and says Yes more often.

# %%
items = context.item_ids[:20]
change = model.compare(model.context(seeker, items=items), model.context(idler, items=items))
change
