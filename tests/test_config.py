from __future__ import annotations

import pydantic
import pytest

from brewjax.config import Config, ConfigError, nearest, refuse_twice, suggest


class Optimizer(Config):
    learning_rate: float = pydantic.Field(default=0.001, gt=0)
    warmup: int = 0


class Stage(Config):
    kind: str
    steps: int = 10


class Recipe(Config):
    name: str
    seed: int = 0
    optimizer: Optimizer = Optimizer()
    stages: tuple[Stage, ...] = ()


RECIPE = """\
# A comment, so that lines and keys are not the same thing.
name: tiny
optimizer:
  learning_rate: 0.1
  warmup: 5
stages:
  - {kind: train, steps: 20}
  - kind: prune
    steps: 30
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def refused(text: str, *overrides: str) -> list[str]:
    """The lines of the error."""
    with pytest.raises(ConfigError) as error:
        Recipe.parse(text, "recipe.yaml", overrides)
    return str(error.value).splitlines()


def test_reads_what_the_file_says_and_the_defaults(recipe):
    assert Recipe.load(recipe) == Recipe(
        name="tiny",
        seed=0,
        optimizer=Optimizer(learning_rate=0.1, warmup=5),
        stages=(Stage(kind="train", steps=20), Stage(kind="prune", steps=30)),
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  warmup", "  warm_up", "recipe.yaml:5: optimizer.warm_up: unknown key 'warm_up'; did you mean 'warmup'?"),
        ("name:", "nmae:", "recipe.yaml:2: nmae: unknown key 'nmae'; did you mean 'name'?"),
        ("    steps", "    size", "recipe.yaml:9: stages.1.size: unknown key 'size'; valid keys: kind, steps"),
        ("0.1", "fast", "recipe.yaml:4: optimizer.learning_rate: expected a number, found 'fast'"),
        ("0.1", "-1", "recipe.yaml:4: optimizer.learning_rate: expected more than 0, found -1"),
        ("steps: 20", "steps: [20]", "recipe.yaml:7: stages.0.steps: expected a whole number, found [20]"),
        ("name: tiny\n", "", "recipe.yaml:2: name: missing; this key is needed"),
        ("kind: train, ", "", "recipe.yaml:7: stages.0.kind: missing; this key is needed"),
        ("  warmup: 5", "  learning_rate: 5", "recipe.yaml:5: 'learning_rate' is given twice, first on line 4"),
        ("steps: 20", "steps: true", "recipe.yaml:7: stages.0.steps: expected a number, found true"),
        ("0.1", ".inf", "recipe.yaml:4: optimizer.learning_rate: expected a finite number, found inf"),
        (
            "  - {kind: train, steps: 20}",
            "  - train",
            "recipe.yaml:7: stages.0: expected keys and values such as {kind:",
        ),
        ("kind: train, ", "steps: 1, ", "recipe.yaml:7: 'steps' is given twice, first on line 7"),
    ],
)
def test_a_mistake_is_named_by_file_line_and_key(old, new, message):
    (line,) = refused(RECIPE.replace(old, new))
    assert line.startswith(message)


def test_all_mistakes_are_reported_at_once():
    assert [
        line.split(" ")[0] for line in refused(RECIPE.replace("0.1", "fast").replace("steps: 30", "steps: few"))
    ] == [
        "recipe.yaml:4:",
        "recipe.yaml:9:",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [tiny\nseed: 1\n", "recipe.yaml:2: not valid YAML: expected ',' or ']'"),
        ("name: !!python/object:os.system tiny\n", "recipe.yaml:1: not valid YAML: could not determine a constructor"),
        ("", "recipe.yaml: expected KEY: VALUE lines with name, found an empty file"),
        ("- name\n- tiny\n", "recipe.yaml: expected KEY: VALUE lines with name, found ['name', 'tiny']"),
    ],
)
def test_a_file_that_is_no_config_is_refused(text, message):
    assert refused(text)[0].startswith(message)


def test_bad_yaml_names_the_line():
    (line,) = refused("name: tiny\n\tseed: 1\n")
    assert line.startswith("recipe.yaml:2: not valid YAML: ")
    assert line.endswith("indent with spaces, not tabs")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such file"):
        Recipe.load(tmp_path / "nowhere.yaml")


def test_dates_stay_text():
    assert Recipe.parse("name: 1998-13-07").name == "1998-13-07"


def test_overrides_are_yaml_and_reach_into_groups(recipe):
    config = Recipe.load(
        recipe, ["seed=3", "optimizer.learning_rate=1e-2", "stages=[{kind: quantise}]", "name=a=b", "seed=4"]
    )
    assert config == Recipe(
        name="a=b", seed=4, optimizer=Optimizer(learning_rate=0.01, warmup=5), stages=(Stage(kind="quantise"),)
    )


def test_an_override_may_open_a_group_that_the_file_leaves_out():
    assert Recipe.parse("name: tiny", overrides=["optimizer.warmup=7"]).optimizer == Optimizer(warmup=7)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "--set seed: expected KEY=VALUE, for example train.steps=100"),
        ("name.first=a", "--set name.first=a: 'name' is not a group of keys"),
        ("stages.0.steps=1", "--set stages.0.steps=1: 'stages' is not a group of keys"),
        ("seed=[1", "--set seed=[1: not valid YAML: expected ',' or ']'"),
        ("sed=1", "--set sed=1: sed: unknown key 'sed'; did you mean 'seed'?"),
        (
            "optimizer.warmup=long",
            "--set optimizer.warmup=long: optimizer.warmup: expected a whole number, found 'long'",
        ),
    ],
)
def test_a_bad_override_is_named(override, message):
    assert refused(RECIPE, override)[0].startswith(message)


def test_what_is_saved_loads_as_the_same(recipe, tmp_path):
    config = Recipe.load(recipe, ["name='Zoë: \"a\"\n1998-03-07 \U0001f37a'"])
    config.save(tmp_path / "saved.yaml")
    assert Recipe.load(tmp_path / "saved.yaml") == config
    assert "seed: 0" in (tmp_path / "saved.yaml").read_text(), "defaults are spelled out"


def test_configs_are_frozen(recipe):
    with pytest.raises(pydantic.ValidationError):
        Recipe.load(recipe).seed = 1


def test_equal_configs_have_one_hash(recipe):
    assert len({Recipe.load(recipe), Recipe.load(recipe), Recipe.load(recipe, ["seed=1"])}) == 2


def test_a_config_names_its_own_lines(recipe):
    config = Recipe.load(recipe)
    assert str(config.error("too slow", "stages", 1, "steps")) == f"{recipe}:9: stages.1.steps: too slow"
    assert str(config.error("not said in the file", "stages", 0, "kind", "x")).startswith(f"{recipe}:7: ")
    assert str(config.error("a default", "seed")) == f"{recipe}:2: seed: a default"
    assert str(Recipe(name="no file").error("wrong", "seed")) == "<config>: seed: wrong"


def test_a_validator_names_the_key_that_it_means():
    class Pair(Config):
        parts: tuple[Stage, ...]

        @pydantic.model_validator(mode="after")
        def _differ(self) -> Pair:
            refuse_twice([part.kind for part in self.parts], "kind", "parts")
            return self

    with pytest.raises(ConfigError, match=r"^pair.yaml:3: parts\.1: the kind 'a' is given twice$"):
        Pair.parse("parts:\n  - {kind: a}\n  - {kind: a, steps: 2}", "pair.yaml")


def test_an_alias_in_itself_and_another_encoding_are_refused(tmp_path):
    assert refused("name: tiny\nstages: &a [*a]") == ["recipe.yaml:2: an alias (*name) stands within what it names"]
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"name: tiny\n# caf\xe9\n")
    with pytest.raises(ConfigError, match=r"latin\.yaml:2: not UTF-8: byte 0xe9; save it as UTF-8"):
        Recipe.load(path)
    path.write_bytes(b"\xef\xbb\xbfname: tiny\n")
    assert Recipe.load(path).name == "tiny", "a byte order mark is none of the text"


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("Salary", "salary"),
        ("salry", "salary"),
        ("user-id", "user_id"),
        ("id", "user_id"),
        ("wage", "salary"),
        ("nothing like it", None),
        ("", None),
    ],
)
def test_the_nearest_name(name, meant):
    assert nearest(name, ["salary", "user_id", "city"], {"wage": "salary", "town": "country"}) == meant


def test_what_is_there_is_listed_but_not_at_any_length():
    assert suggest("x", ["a", "b"]) == "there are: a, b"
    assert suggest("x", []) == "there are: none"
    assert suggest("x", [f"key{n}" for n in range(1000)]).endswith("key19 and 980 more")
