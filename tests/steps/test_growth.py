"""The benchmark of growth: its exponents, and that it measures every stage of a small model."""

from __future__ import annotations

import sys

import pytest

from benchmarks.growth import STAGES, Size, exponent, line, measure


def test_exponents_are_slopes_of_logarithms():
    assert exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    assert exponent([5, 50], [7, 7]) == pytest.approx(0)
    with pytest.raises(ValueError, match="two sizes"):
        exponent([1], [1])


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
def test_every_stage_is_measured():
    size = Size("encoder", width=64, depth=1, samples=8, ranks=2)
    found = measure(size, ["preset=quick", "engine.memory=50MB", "engine.weights=1MB"], "bfloat16")
    assert found["parameters"] > 64 * 64 * 4
    assert set(STAGES) < set(found["seconds"]) == set(found["gigabytes"])
    assert all(found["seconds"][stage] > 0 for stage in STAGES)
    assert (
        line("ranks", {"width": 64, "depth": 1, "samples": 8, "ranks": 2, **found}).count("|")
        == 6 + 2 * len(STAGES) + 1
    )


def test_ranks_are_those_that_a_size_has() -> None:
    assert Size("decoder", width=256, ranks=8).settings == {"search.forms": ["Q", "LR"], "search.rank_multiple": 32}
    assert Size("decoder").settings == {}
