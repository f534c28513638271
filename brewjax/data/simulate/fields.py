"""The fields of work of the network: ISCO groups with titles of occupations and skills, adapted from ESCO."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from pathlib import Path

import numpy as np

FIELDS = Path(__file__).parent / "fields.tsv"  # made by make_fields.py, frozen
SKILLS_PER_FIELD = 12
# Of the members, by the first digit of ISCO (managers, professionals, ..): those of a professional network.
MAJOR_SHARES = {"1": 0.16, "2": 0.38, "3": 0.20, "4": 0.10, "5": 0.07, "6": 0.01, "7": 0.04, "8": 0.02, "9": 0.02}


@dataclasses.dataclass(frozen=True)
class Fields:
    """The ISCO groups, with the words for what is done in them.

    Attributes:
      code: int64 [fields], four digits: fields that share the first one, two or three are akin.
      name: of each field, "Software developers".
      share: float64 [fields], of the members.
      titles: of all occupations; those of field f are `first_title[f]` to `first_title[f + 1]`.
      first_title: int64 [fields + 1].
      skill_names: of all skills, "monitor financial accounts".
      skills: int64 [fields, SKILLS_PER_FIELD], rows of `skill_names`, the most typical first; -1 behind the last.
    """

    code: np.ndarray
    name: list[str]
    share: np.ndarray
    titles: list[str]
    first_title: np.ndarray
    skill_names: list[str]
    skills: np.ndarray

    @staticmethod
    @functools.cache
    def load() -> Fields:
        """Reads the frozen table: ISCO code, name, titles and skills, the latter two divided by bars."""
        rows = [line.split("\t") for line in FIELDS.read_text(encoding="utf-8").splitlines()]
        rows = [row for row in rows if row[0][0] in MAJOR_SHARES]
        codes, names, titles, skills = zip(*rows, strict=True)
        titles_by_field = [cell.split("|") for cell in titles]
        skills_by_field = [cell.split("|")[:SKILLS_PER_FIELD] for cell in skills]
        skill_names = sorted({name for names in skills_by_field for name in names})
        row_by_skill = {name: row for row, name in enumerate(skill_names)}
        padded = np.full((len(codes), SKILLS_PER_FIELD), -1)
        for row, labels in enumerate(skills_by_field):
            padded[row, : len(labels)] = [row_by_skill[label] for label in labels]
        return Fields(
            np.array(codes, int),
            list(names),
            _shares(codes),
            [title for titles in titles_by_field for title in titles],
            np.cumsum([0, *map(len, titles_by_field)]),
            skill_names,
            padded,
        )

    def shared_digits(self, field: np.ndarray, other: np.ndarray) -> np.ndarray:
        """int64, broadcast: how many leading digits of their codes two fields share, 0 to 4."""
        first, second = self.code[field], self.code[other]
        return sum((first // unit == second // unit).astype(np.int64) for unit in (1000, 100, 10, 1))


def _shares(codes: tuple[str, ...]) -> np.ndarray:
    """Within a major group, shares fall with the rank in an arbitrary but fixed order (Zipf's law)."""
    share = np.zeros(len(codes))
    for major, total in MAJOR_SHARES.items():
        rows = sorted(
            (row for row, code in enumerate(codes) if code[0] == major), key=lambda r: zlib.crc32(codes[r].encode())
        )
        weights = 1 / np.arange(1, len(rows) + 1) ** 1.1
        share[rows] = total * weights / weights.sum()
    return share / share.sum()
