"""Every architecture of timm and of transformers' ``AutoModel``: no tracebacks, and most are compressed nearly whole.

All with ``-m long``; one with ``-m long -k timm-resnet``.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.architectures import GOAL, LISTS, line, measure, run_all, summary
from tests.long import few

TINY = {("timm", "convnext"), ("transformers", "bert")}  # also in the default run
TRAINED = ("llama", "t5", "vit")  # a decoder, an encoder-decoder, a vision model
SAMPLE = 15  # every so many are trained in the run of long tests
LIMIT, MEMORY = 600, 6  # seconds of CPU time, GB


def pytest_generate_tests(metafunc: Any) -> None:
    """One test per architecture. Their names take seconds to list, so that runs without long tests do not."""
    for fixture, step in (("architecture", 1), ("sampled", SAMPLE)):
        if fixture in metafunc.fixturenames:
            without = "not long" in metafunc.config.getoption("markexpr")
            every = [] if without else [(kind, name) for kind, (names, _) in LISTS.items() for name in names()[::step]]
            metafunc.parametrize(fixture, every, ids="-".join)


@pytest.mark.parametrize(("kind", "name"), sorted(TINY))
def test_a_tiny_one_is_compressed(kind: str, name: str) -> None:
    row = measure(kind, name, "layers")
    assert row["status"] == "ok", row
    assert row["share"] >= GOAL, line(row)
    assert sum(row["left"].values()) + round(row["share"] * row["weights"]) == pytest.approx(row["weights"], rel=1e-3)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of several outputs, of few samples
@pytest.mark.parametrize("name", few(TRAINED, "llama", "t5"))  # tests/steps/test_trained_norms.py trains a ViT
def test_a_tiny_one_is_trained_saved_and_loaded(name: str) -> None:
    row = measure("transformers", name, "trained")
    assert row["status"] == "ok", row
    assert row["trained"] == 2, "its blocks"
    assert row["equal"], line(row)
    assert row["nmse"] < row["closed"] < 0.05, line(row)


@pytest.mark.long
def test_an_architecture_ends_without_a_traceback(architecture: tuple[str, str]) -> None:
    kind, name = architecture
    (row,) = run_all(kind, [name], "whole", LIMIT, MEMORY)
    if row["status"] in ("not built", "limit"):
        pytest.skip(row["error"])
    assert row["status"] != "traceback", row
    assert row["status"] == "refused" or row["equal"], line(row)


@pytest.mark.long
def test_a_sampled_one_is_trained(sampled: tuple[str, str]) -> None:
    kind, name = sampled
    (row,) = run_all(kind, [name], "trained", LIMIT, MEMORY)
    if row["status"] in ("not built", "limit"):
        pytest.skip(row["error"])
    assert row["status"] != "traceback", row
    assert row["status"] == "refused" or (row["equal"] and not row["worse"]), line(row)


@pytest.mark.long
@pytest.mark.parametrize("kind", sorted(LISTS))
def test_most_are_compressed_nearly_whole(kind: str) -> None:
    rows = list(run_all(kind, LISTS[kind][0](), "layers", LIMIT, MEMORY))
    built = [row for row in rows if row["status"] not in ("not built", "limit")]
    good = [row for row in built if row["status"] == "ok" and row["share_run"] >= GOAL]
    assert len(good) >= 0.95 * len(built), "\n".join(summary(rows))
