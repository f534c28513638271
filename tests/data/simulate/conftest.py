"""A small network, simulated once."""

from __future__ import annotations

from pathlib import Path

import pytest

from brewjax.data.simulate.network import simulate_network
from brewjax.data.tables.dataset import Dataset

MEMBERS, SEED, MONTHS = 900, 3, 8


@pytest.fixture(scope="session")
def network(tmp_path_factory) -> Path:
    return simulate_network(tmp_path_factory.mktemp("networks") / "network", MEMBERS, SEED, MONTHS)


@pytest.fixture(scope="session")
def surfaces(network) -> dict[str, Dataset]:
    return {name: Dataset.load(network / name) for name in ("jobs", "posts", "people")}
