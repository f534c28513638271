"""Who and what there is in the network: companies, members, jobs and posts, each a function of the seed and its id."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import TypeVar

import numpy as np

from brewjax.data.simulate.draws import Draws
from brewjax.data.simulate.fields import Fields

DAYS_PER_MONTH = 30.4375
COLLEAGUES = 50  # members with consecutive ids, who may know each other
COMPANY_FIELDS = 4  # fields of work of a company
CITIES = {  # city: (country, share of members)
    "London": ("United Kingdom", 0.10), "Manchester": ("United Kingdom", 0.03), "Edinburgh": ("United Kingdom", 0.02),
    "Paris": ("France", 0.09), "Lyon": ("France", 0.03), "Toulouse": ("France", 0.02), "Berlin": ("Germany", 0.07),
    "Munich": ("Germany", 0.05), "Hamburg": ("Germany", 0.03), "Cologne": ("Germany", 0.02), "Madrid": ("Spain", 0.06),
    "Barcelona": ("Spain", 0.05), "Valencia": ("Spain", 0.02), "Milan": ("Italy", 0.05), "Rome": ("Italy", 0.04),
    "Turin": ("Italy", 0.02), "Amsterdam": ("Netherlands", 0.05), "Rotterdam": ("Netherlands", 0.02),
    "Brussels": ("Belgium", 0.03), "Antwerp": ("Belgium", 0.01), "Warsaw": ("Poland", 0.04), "Krakow": ("Poland", 0.02),
    "Stockholm": ("Sweden", 0.03), "Gothenburg": ("Sweden", 0.01), "Vienna": ("Austria", 0.03),
    "Lisbon": ("Portugal", 0.02), "Porto": ("Portugal", 0.01), "Dublin": ("Ireland", 0.03), "Cork": ("Ireland", 0.01),
}  # fmt: skip
LEVELS = {"entry": 0.18, "junior": 0.24, "senior": 0.34, "lead": 0.16, "director": 0.08}  # shares of members and jobs
WORKPLACES = {"on-site": 0.5, "hybrid": 0.3, "remote": 0.2}  # shares of jobs
KINDS = {"article": 0.3, "video": 0.2, "poll": 0.15, "question": 0.2, "announcement": 0.15}  # shares of posts
CITY_SHARES = np.array([share for _, share in CITIES.values()])
COUNTRY = np.unique([country for country, _ in CITIES.values()], return_inverse=True)[1]  # int [cities]
LEVEL_SHARES, WORKPLACE_SHARES, KIND_SHARES = (np.array([*shares.values()]) for shares in (LEVELS, WORKPLACES, KINDS))
YEARS = np.array([0, 2, 6, 11, 16])  # of experience, the least of each level
SALARY = np.array([26, 34, 48, 66, 92]) * 1000.0  # euros a year, typical of each level
SALARY_SPREAD = 0.15  # deviation of its logarithm

MEMBER_SKILLS, JOB_SKILLS, POST_SKILLS = 7, 5, 2
COMMON_SKILLS = 5  # the most typical of a field are no new words
NEW_SKILL_SHARE = 0.3  # of the less typical skills: nobody has heard of them before a day of the period
NEW_SKILL_DAYS = 60  # a word is new for so long, and then in fashion
JOIN_LATER = 0.25  # members who join during the period
JOB_LIFE, POST_LIFE = (30, 60), (10, 14)  # days, least and most
FIRST_DAY = -30  # of jobs and posts, before the period


@dataclasses.dataclass(frozen=True)
class MemberTable:
    """Members. Arrays are [members], `skills` is [members, MEMBER_SKILLS].

    Attributes:
      id, company, city, field, title, level, years, skills: what their profiles say, as rows of the world's tables.
      joined: day; below 0 before the period.
      sociability: float64, mean about 1: how many of their colleagues they know.
    """

    id: np.ndarray
    company: np.ndarray
    city: np.ndarray
    field: np.ndarray
    title: np.ndarray
    level: np.ndarray
    years: np.ndarray
    skills: np.ndarray
    joined: np.ndarray
    sociability: np.ndarray


@dataclasses.dataclass(frozen=True)
class JobTable:
    """Jobs. Arrays are [jobs], `skills` is [jobs, JOB_SKILLS].

    Attributes:
      id, company, city, field, title, level, workplace, skills: what they say, as rows of the world's tables.
      salary: euros a year.
      posted, closes: days.
      quality: float64, mean 0: what makes everybody like it, in part its company's.
    """

    id: np.ndarray
    company: np.ndarray
    city: np.ndarray
    field: np.ndarray
    title: np.ndarray
    level: np.ndarray
    workplace: np.ndarray
    skills: np.ndarray
    salary: np.ndarray
    posted: np.ndarray
    closes: np.ndarray
    quality: np.ndarray


@dataclasses.dataclass(frozen=True)
class PostTable:
    """Posts. Arrays are [posts], `skills` is [posts, POST_SKILLS]: what they are about.

    Attributes:
      id, author, field, kind, skills: what they say; the author is a member.
      posted, expires: days.
      quality: float64, mean 0: what makes everybody like it.
    """

    id: np.ndarray
    author: np.ndarray
    field: np.ndarray
    kind: np.ndarray
    skills: np.ndarray
    posted: np.ndarray
    expires: np.ndarray
    quality: np.ndarray


T = TypeVar("T")


def take(table: T, rows: np.ndarray) -> T:
    """Rows of a dataclass of columns: of members, jobs, posts or exposures."""
    columns = dataclasses.fields(table)  # type: ignore[arg-type]
    return type(table)(*(getattr(table, column.name)[rows] for column in columns))


class World:
    """All that exists, by id. Nothing is kept but what was asked about: a million members take no memory.

    Args:
      seed: of everything.
      members: how many there are.
      months: of the period; jobs and posts come and go in it.
    """

    def __init__(self, seed: int, members: int, months: int):
        self.seed, self.draws, self.fields = seed, Draws(seed), Fields.load()
        self.num_members, self.months, self.days = members, months, months * DAYS_PER_MONTH
        self.num_companies = -(-members // COLLEAGUES)
        self.num_jobs, self.num_posts = max(60, members * months // 12), max(60, members * months // 4)
        self._first_of_sub_major = np.searchsorted(self.fields.code // 100, self.fields.code // 100)
        self._size_of_sub_major = np.searchsorted(self.fields.code // 100, self.fields.code // 100, "right")
        self._size_of_sub_major -= self._first_of_sub_major

    @cached_property
    def skill_born(self) -> np.ndarray:
        """float64 [skills]: the day from which a skill is in use; below 0 for those that always were."""
        skill = np.arange(len(self.fields.skill_names))
        born = self.draws.uniform("skill born", skill) * self.days
        born[self.draws.uniform("skill is new", skill) > NEW_SKILL_SHARE] = -np.inf
        born[self.fields.skills[:, :COMMON_SKILLS].ravel()] = -np.inf
        return born

    def akin(self, purpose: str, field: np.ndarray, *ids: np.ndarray | int) -> np.ndarray:
        """A field that shares the first two digits."""
        return self._first_of_sub_major[field] + self.draws.integer(purpose, self._size_of_sub_major[field], *ids)

    def company_city(self, company: np.ndarray) -> np.ndarray:
        """int64: where a company is."""
        return self.draws.choice("company city", CITY_SHARES, company)

    def company_field(self, company: np.ndarray, which: np.ndarray) -> np.ndarray:
        """int64: one of the fields of a company, which are akin; `which` is below COMPANY_FIELDS."""
        first = self.draws.choice("company field", self.fields.share, company)
        return np.where(which == 0, first, self.akin("company field", first, company, which))

    def member_field(self, ids: np.ndarray) -> np.ndarray:
        """int64: what members work in; most in a field of their colleagues' company."""
        which = self.draws.integer("member company field", COMPANY_FIELDS, ids)
        return np.where(
            self.draws.uniform("member in field", ids) < 0.7,
            self.company_field(ids // COLLEAGUES, which),
            self.draws.choice("member field", self.fields.share, ids),
        )

    def members(self, ids: np.ndarray) -> MemberTable:
        """Members by id, from 0."""
        draws, colleagues = self.draws, ids // COLLEAGUES
        company = np.where(
            draws.uniform("member moved on", ids) < 0.7,
            colleagues,
            draws.integer("member company", self.num_companies, ids),
        )
        city = np.where(
            draws.uniform("member stays", ids) < 0.6,
            self.company_city(colleagues),
            draws.choice("member city", CITY_SHARES, ids),
        )
        field, level = self.member_field(ids), draws.choice("member level", LEVEL_SHARES, ids)
        joined = np.where(draws.uniform("member joins", ids) < JOIN_LATER, 0.9, -2) * self.days
        joined *= draws.uniform("member joined", ids)
        second = self.akin("member second field", field, ids)
        today = np.maximum(joined, 0)
        main = self._choose_skills("member skills", ids, field, today, MEMBER_SKILLS - 2)
        skills = np.concatenate(
            [main, self._choose_skills("member second skills", ids, second, today, 2, besides=main)], axis=1
        )
        years = YEARS[level] + draws.integer("member years", 2 + 2 * level, ids)
        sociability = np.exp(0.5 * draws.normal("member sociability", ids) - 0.125)
        title = self._title("member title", field, ids)
        return MemberTable(ids, company, city, field, title, level, years, skills, joined, sociability)

    def jobs(self, ids: np.ndarray) -> JobTable:
        """Jobs by id, from 0."""
        draws = self.draws
        company = draws.integer("job company", self.num_companies, ids)
        city = np.where(
            draws.uniform("job at home", ids) < 0.75,
            self.company_city(company),
            draws.choice("job city", CITY_SHARES, ids),
        )
        field = np.where(
            draws.uniform("job in field", ids) < 0.85,
            self.company_field(company, draws.integer("job company field", COMPANY_FIELDS, ids)),
            draws.choice("job field", self.fields.share, ids),
        )
        level = draws.choice("job level", LEVEL_SHARES, ids)
        workplace = draws.choice("job workplace", WORKPLACE_SHARES, ids)
        salary = SALARY[level] * np.exp(SALARY_SPREAD * draws.normal("job salary", ids))
        posted = FIRST_DAY + (self.days - FIRST_DAY) * draws.uniform("job posted", ids)
        closes = posted + JOB_LIFE[0] + (JOB_LIFE[1] - JOB_LIFE[0]) * draws.uniform("job closes", ids)
        quality = 0.5 * draws.normal("company quality", company) + np.sqrt(0.75) * draws.normal("job quality", ids)
        skills = self._choose_skills("job skills", ids, field, posted, JOB_SKILLS)
        title = self._title("job title", field, ids)
        salary = np.round(salary, -3)
        return JobTable(ids, company, city, field, title, level, workplace, skills, salary, posted, closes, quality)

    def posts(self, ids: np.ndarray) -> PostTable:
        """Posts by id, from 0."""
        draws = self.draws
        author = self.post_author(ids)
        topical = draws.uniform("post on topic", ids) < 0.8
        field = np.where(topical, self.member_field(author), draws.choice("post field", self.fields.share, ids))
        kind = draws.choice("post kind", KIND_SHARES, ids)
        posted = FIRST_DAY + (self.days - FIRST_DAY) * draws.uniform("post posted", ids)
        expires = posted + POST_LIFE[0] + (POST_LIFE[1] - POST_LIFE[0]) * draws.uniform("post expires", ids)
        skills = self._choose_skills("post skills", ids, field, posted, POST_SKILLS)
        return PostTable(ids, author, field, kind, skills, posted, expires, draws.normal("post quality", ids))

    def post_author(self, ids: np.ndarray) -> np.ndarray:
        """int64: the members who wrote posts."""
        return self.draws.integer("post author", self.num_members, ids)

    def ties(self, first_company: int, companies: int) -> np.ndarray:
        """bool [companies, COLLEAGUES, COLLEAGUES]: who knows whom among the colleagues of consecutive companies."""
        member = (first_company + np.arange(companies))[:, None] * COLLEAGUES + np.arange(COLLEAGUES)
        low = np.minimum(member[:, :, None], member[:, None, :])
        high = np.maximum(member[:, :, None], member[:, None, :])
        sociability = np.exp(0.5 * self.draws.normal("member sociability", member) - 0.125)
        chance = 0.15 * sociability[:, :, None] * sociability[:, None, :]
        return (self.draws.uniform("tie", low, high) < chance) & (low < high) & (high < self.num_members)

    def _title(self, purpose: str, field: np.ndarray, ids: np.ndarray) -> np.ndarray:
        first = self.fields.first_title
        return first[field] + self.draws.integer(purpose, first[field + 1] - first[field], ids)

    def _choose_skills(
        self,
        purpose: str,
        ids: np.ndarray,
        field: np.ndarray,
        day: np.ndarray,
        count: int,
        besides: np.ndarray | None = None,
    ) -> np.ndarray:
        """int64 [ids, count]: different skills of a field that are in use on a day, and not in `besides`, int64
        [ids, skills]; new ones are in fashion."""
        skills = self.fields.skills[field]
        rank = self.draws.uniform(purpose, ids[:, None], np.arange(skills.shape[1]))
        age = day[:, None] - self.skill_born[skills]
        rank = np.where(age < NEW_SKILL_DAYS, 0.4 * rank, rank)
        excluded = (age < 0) | (skills < 0)
        if besides is not None:
            excluded |= (skills[:, :, None] == besides[:, None, :]).any(axis=2)
        return np.take_along_axis(skills, np.argsort(rank + excluded, axis=1)[:, :count], axis=1)
