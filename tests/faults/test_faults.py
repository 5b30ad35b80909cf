"""The fault matrix as tests. CI runs a part; `make faults` runs all and writes the table."""

from __future__ import annotations

import pytest

from faults.bench import Bench
from faults.scenarios import SCENARIOS

IN_CI = ("workers", "repeated")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("faults"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name if name in IN_CI else pytest.param(name, marks=pytest.mark.faults) for name in SCENARIOS]
)
def test_every_row_holds(bench: Bench, name: str, record_property: pytest.RecordProperty) -> None:
    before = len(bench.rows)
    SCENARIOS[name](bench)
    rows = bench.rows[before:]
    record_property("rows", str(rows))
    assert rows and not [(row.injected, row.problems) for row in rows if row.problems]
