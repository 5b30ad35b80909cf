from __future__ import annotations

import pytest

from manta.patience import Patience


@pytest.mark.parametrize(
    ("evaluations", "threshold", "values", "stops_after"),
    [
        (2, 0.0, [0.1, 0.2, 0.2, 0.1], 4),
        (2, 0.0, [0.1, 0.1, 0.2, 0.1, 0.1], 5),
        (2, 0.05, [0.1, 0.14, 0.149], 3),
        (0, 0.0, [0.5] * 9, None),
        (1, 0.0, [0.1, 0.2, 0.3], None),
    ],
)
def test_it_ends_after_so_many_figures_without_a_rise(evaluations, threshold, values, stops_after):
    patience = Patience(evaluations, threshold)
    heard = [patience.heard(value) for value in values]
    assert (heard.index(True) + 1 if True in heard else None) == stops_after
