"""What people answered or judged: lectures, personality statements, anger, résumés, and a contest of bakers."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa

from brewjax.data.public.choices import relative_steps
from brewjax.data.public.rtables import import_pandas, read_rdataset

# The statements of bfi, of the International Personality Item Pool (in the public domain), and what each measures.
STATEMENTS = {
    "A1": "Am indifferent to the feelings of others.",
    "A2": "Inquire about others' well-being.",
    "A3": "Know how to comfort others.",
    "A4": "Love children.",
    "A5": "Make people feel at ease.",
    "C1": "Am exacting in my work.",
    "C2": "Continue until everything is perfect.",
    "C3": "Do things according to a plan.",
    "C4": "Do things in a half-way manner.",
    "C5": "Waste my time.",
    "E1": "Don't talk a lot.",
    "E2": "Find it difficult to approach others.",
    "E3": "Know how to captivate people.",
    "E4": "Make friends easily.",
    "E5": "Take charge.",
    "N1": "Get angry easily.",
    "N2": "Get irritated easily.",
    "N3": "Have frequent mood swings.",
    "N4": "Often feel blue.",
    "N5": "Panic easily.",
    "O1": "Am full of ideas.",
    "O2": "Avoid difficult reading material.",
    "O3": "Carry the conversation to a higher level.",
    "O4": "Spend time reflecting on things.",
    "O5": "Will not probe deeply into a subject.",
}
GLUED = re.compile(r"(?<=[a-z])with(?=[ A-Z])")  # "Cakewith Cream"
SITUATIONS = {
    "1": "A bus fails to stop for me",
    "2": "I miss a train because a clerk gave me faulty information",
    "3": "The grocery store closes just as I am about to enter",
    "4": "The operator disconnects me when I had used up my last 10 cents for a call",
}


def read_lectures(source: Path | None) -> dict[str, pa.Table]:
    """InstEval: ratings of lecturers by students of ETH Zurich. There are no times: members are split."""
    frame = read_rdataset("lme4/InstEval", source)
    departments = frame.groupby("d")["dept"].agg(lambda values: values.mode().iloc[0])
    students = frame.groupby("s")["studage"].max()
    # A student who rated two lectures of one lecturer has two events, which the first of them stands for.
    frame = frame.drop_duplicates(["s", "d"])
    members = {"member_id": students.index.tolist(), "semesters": students.tolist()}
    items = {
        "item_id": departments.index.tolist(),
        "lecturer": [f"Lecturer {number}" for number in departments.index],
        "department": [f"Department {number}" for number in departments],
    }
    events = {
        "member_id": frame["s"].tolist(),
        "item_id": frame["d"].tolist(),
        "action": ["rated"] * len(frame),
        "stars": frame["y"].tolist(),
        "semesters_ago": frame["lectage"].tolist(),
        "audience": ["another department" if service else "the own department" for service in frame["service"]],
    }
    return {"members": pa.table(members), "items": pa.table(items), "events": pa.table(events)}


def read_statements(source: Path | None) -> dict[str, pa.Table]:
    """bfi: how well each of 25 statements describes a person, 1 (very inaccurate) to 6 (very accurate)."""
    frame = read_rdataset("psych/bfi", source)
    frame = frame.rename(columns={"rownames": "member_id"})
    answers = frame.melt("member_id", list(STATEMENTS), "item_id", "answer").dropna()
    education = {1: "some high school", 2: "high school", 3: "some college", 4: "college", 5: "graduate degree"}
    members = {
        "member_id": frame["member_id"].tolist(),
        "age": frame["age"].tolist(),
        "gender": ["male" if gender == 1 else "female" for gender in frame["gender"]],
        "education": [education.get(level) for level in frame["education"]],
    }
    traits = {"A": "agreeableness", "C": "conscientiousness", "E": "extraversion", "N": "neuroticism", "O": "openness"}
    items = {
        "item_id": list(STATEMENTS),
        "statement": list(STATEMENTS.values()),
        "trait": [traits[key[0]] for key in STATEMENTS],
    }
    events = {
        "member_id": answers["member_id"].tolist(),
        "item_id": answers["item_id"].tolist(),
        "action": ["answered"] * len(answers),
        "answer": answers["answer"].astype(int).tolist(),
    }
    return {"members": pa.table(members), "items": pa.table(items), "events": pa.table(events)}


def read_anger(source: Path | None) -> dict[str, pa.Table]:
    """VerbAgg: would a person curse, scold or shout in four situations, or want to (De Boeck and Wilson, 2004)."""
    frame = read_rdataset("lme4/VerbAgg", source)
    people = frame.drop_duplicates("id").sort_values("id")
    members = {
        "member_id": people["id"].astype(int).tolist(),
        "anger": people["Anger"].tolist(),
        "gender": ["male" if gender == "M" else "female" for gender in people["Gender"]],
    }
    kinds = frame.drop_duplicates("item")
    items = {
        "item_id": kinds["item"].astype(str).tolist(),
        "situation": [SITUATIONS[item[1]] for item in kinds["item"]],
        "behavior": [
            f"I would {'want to ' if mode == 'want' else ''}{act}"
            for mode, act in zip(kinds["mode"], kinds["btype"], strict=True)
        ],
        "act": kinds["btype"].astype(str).tolist(),
        "kind": ["wish" if mode == "want" else "deed" for mode in kinds["mode"]],
        "to_blame": ["somebody else" if blame == "other" else "oneself" for blame in kinds["situ"]],
    }
    events = {
        "member_id": frame["id"].astype(int).tolist(),
        "item_id": frame["item"].astype(str).tolist(),
        "action": ["answered"] * len(frame),
        "answer": frame["resp"].astype(str).tolist(),
        "agreed": [int(answer == "Y") for answer in frame["r2"]],
    }
    return {"members": pa.table(members), "items": pa.table(items), "events": pa.table(events)}


def read_resume(source: Path | None) -> dict[str, pa.Table]:
    """Which of the résumés sent to one advertisement were answered (Bertrand and Mullainathan, 2004).

    The names on the résumés, which the experiment drew at random to measure discrimination, are left out with the race
    and gender that they suggest: a model ranks by what a person can do.
    """
    frame = read_rdataset("openintro/resume", source)
    advertisements = frame.drop_duplicates("job_ad_id").sort_values("job_ad_id")
    words = lambda column: [str(value).replace("_", " ") for value in column]  # noqa: E731
    members = {
        "member_id": advertisements["job_ad_id"].tolist(),
        "job": words(advertisements["job_type"]),
        "industry": words(advertisements["job_industry"]),
        "city": words(advertisements["job_city"]),
        "experience": [
            None if str(years) in ("nan", "None") else str(years) for years in advertisements["job_req_min_experience"]
        ],
    }
    features = {
        "college_degree": "a college degree",
        "honors": "honours",
        "worked_during_school": "work during school",
        "computer_skills": "computer skills",
        "special_skills": "special skills",
        "volunteer": "volunteer work",
        "military": "military service",
        "employment_holes": "gaps in employment",
        "has_email_address": "an e-mail address",
    }
    shows = [[text for column, text in features.items() if values[column]] for values in frame.to_dict("records")]
    items = {
        "item_id": frame["rownames"].tolist(),
        "years": frame["years_experience"].tolist(),
        "college": frame["years_college"].tolist(),
        "shows": shows,
        "strengths": [len(texts) for texts in shows],
        "quality": frame["resume_quality"].astype(str).tolist(),
    }
    events = {
        "member_id": frame["job_ad_id"].tolist(),
        "item_id": frame["rownames"].tolist(),
        "action": ["called" if called else "ignored" for called in frame["received_callback"]],
        "ad": frame["job_ad_id"].tolist(),
    }
    return {"members": pa.table(members), "items": pa.table(items), "events": pa.table(events)}


def read_bakeoff(source: Path | None) -> dict[str, pa.Table]:
    """Who leaves a contest of bakers in each episode of ten series; finals, in which nobody does, are left out."""
    pandas = import_pandas()
    frame, bakers = (read_rdataset(f"bakeoff/{name}", source) for name in ("challenges", "bakers"))
    results = {"IN": "stayed", "STAR BAKER": "won", "OUT": "left"}
    frame = frame[frame["result"].isin(results)].sort_values(["series", "episode"], kind="stable")
    leaves = frame.groupby(["series", "episode"])["result"].transform(lambda values: (values == "OUT").any())
    frame = frame[leaves].reset_index(drop=True)
    ids = lambda table: [f"{row.series}-{row.baker}" for row in table.itertuples()]  # noqa: E731
    episodes = frame.drop_duplicates(["series", "episode"])
    steps = dict(
        zip(
            zip(episodes["series"], episodes["episode"], strict=True),
            relative_steps(episodes["series"].to_numpy()).tolist(),
            strict=True,
        )
    )
    bakers = bakers.assign(key=ids(bakers))
    bakers = bakers[bakers["key"].isin(set(ids(frame)))]
    text = lambda value: None if pandas.isna(value) else str(value)  # noqa: E731
    items = {
        "item_id": bakers["key"].tolist(),
        "baker": bakers["baker"].astype(str).tolist(),
        "age": bakers["age"].astype(int).tolist(),
        "occupation": [text(value) for value in bakers["occupation"]],
    }
    events = {
        "member_id": frame["series"].astype(int).tolist(),
        "item_id": ids(frame),
        "action": [results[result] for result in frame["result"]],
        "step": [steps[key] for key in zip(frame["series"], frame["episode"], strict=True)],
        "episode": [f"{row.series}-{row.episode}" for row in frame.itertuples()],
        "technical": frame["technical"].tolist(),
        "signature": [value and GLUED.sub(" with", value) for value in map(text, frame["signature"])],
    }
    series = sorted(set(events["member_id"]))
    members = {"member_id": series, "series": [f"Series {number}" for number in series]}
    frames = {"members": members, "items": items, "events": events}
    return {
        name: pa.Table.from_pandas(pandas.DataFrame(values), preserve_index=False) for name, values in frames.items()
    }
