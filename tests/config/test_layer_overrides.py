"""Settings of single layers: which pattern decides, what a mistake says, and what a change computes anew."""

from __future__ import annotations

import pytest

import mlorq
from flows.dry_run import smallest_layer
from mlorq.artifacts.store import Store
from mlorq.config.layer_overrides import check_overrides, layer_search, search_json
from mlorq.config.run import SearchConfig
from mlorq.costs.local import candidate_table
from mlorq.errors import ConfigError
from mlorq.forms.base import Shape
from mlorq.models.layers import find_layers, weight_matrix
from tests.layers import hessian_fit, search_config
from tests.nets import images, token_net
from tests.steps.test_pipeline import folder, run  # noqa: F401  (a fixture)

FIXED = {"bits": [8], "forms": ["Q"]}


def search(**layers) -> SearchConfig:
    return search_config(layers=layers)


def listed():
    model = token_net(0)
    return model, find_layers(model, images(4, 0))


def test_the_more_specific_pattern_decides_key_by_key():
    _, found = listed()
    patterns = {
        "*": {"bits": [2, 3]},
        "blocks.*": {"bits": [4], "sum_ranks": [8]},
        "blocks.1.up": {"forms": ["Q"]},
        "blocks.[01].up": {"forms": ["Q", "LR"], "rank_multiple": 4},
    }
    for order in (patterns, dict(reversed(patterns.items()))):
        merged = search(**order)
        check_overrides(merged, found)
        inner = layer_search(merged, found["blocks.1.up"])
        assert (inner.bits, inner.sum_ranks, inner.forms, inner.rank_multiple) == ([4], [8], ["Q"], 4)
        assert layer_search(merged, found["blocks.0.up"]).forms == ["Q", "LR"]
        assert layer_search(merged, found["head"]).bits == [2, 3]
        assert layer_search(merged, found["blocks.2.down"]).factor_bits == search_config().factor_bits


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ({"haed": FIXED}, ["'haed'", "did you mean 'head'"]),
        ({"unused": FIXED}, ["'unused'", "never reached"]),
        ({"blocks.9.*": FIXED}, ["'blocks.9.*'", "matches no layer"]),
        ({"blocks.*.up": FIXED, "blocks.0.*p": {"bits": [4]}}, ["'blocks.*.up'", "'blocks.0.*p'", "'blocks.0.up'"]),
    ],
)
def test_patterns_that_cannot_be_meant_are_named(layers, words):
    with pytest.raises(ConfigError) as caught:
        check_overrides(search(**layers), listed()[1])
    assert all(word in str(caught.value) for word in ["search.layers", *words])


def test_an_unchanged_section_has_the_json_that_it_had():
    assert "layers" not in search_json(search_config())
    assert search_json(search(head=FIXED))["layers"]["head"]["bits"] == [8]


@pytest.mark.parametrize(
    "override",
    [{}, FIXED, {"bits": [8]}, {"bits": [8], "forms": ["Q", "QLR"]}, {"forms": ["Q", "LR"], "factor_bits": [8]}],
)
def test_the_smallest_size_is_that_of_the_candidates(override):
    model, found = listed()
    merged = search_config(forms=["Q", "LR", "QLR"], layers={"*": override})
    for layer in found.layers:
        own = layer_search(merged, layer)
        weight = weight_matrix(model.module.get_submodule(layer.name))
        fit, shape = hessian_fit(weight, weight.abs() + 1), Shape(*weight.shape, layer.groups)
        table = candidate_table(fit, shape, own.form_settings, own.storage)
        assert smallest_layer(layer, merged).bytes == min(table["bytes"].to_pylist()), layer.name


def test_an_override_computes_its_own_layers_candidates_anew_and_no_others(folder):  # noqa: F811
    (first,), _ = run(folder)
    store = Store(str(folder / ".mlorq"))
    before = {step: set(store.refs(step)) for step in ("layers", "capture", "candidates", "sensitivity")}
    (second,), _ = run(folder, search__layers={"head": FIXED})
    after = {step: set(store.refs(step)) - refs for step, refs in before.items()}
    assert {step: len(refs) for step, refs in after.items()} == {
        "layers": 0, "capture": 0, "candidates": 1, "sensitivity": 1,
    }  # fmt: skip
    (new,) = after["candidates"]
    assert store.manifest(new)["details"]["layer"] == "head"
    assert {row["layer"]: row["candidate_id"] for row in second["allocation"]}["head"] == "Q8"
    assert second["bytes"] <= second["budget_bytes"] == first["budget_bytes"]
    _, done = run(folder, search__layers={"head": FIXED})
    assert all(reused for _, reused in done)
    _, done = run(folder)
    assert all(reused for _, reused in done)


def test_a_pattern_without_a_layer_stops_a_run_before_its_search(folder):  # noqa: F811
    with pytest.raises(ConfigError, match=r"'heat'.*'head'"):
        run(folder, search__layers={"heat": FIXED})
    assert not (folder / ".mlorq" / "capture").exists()


def test_layers_by_name_in_python():
    model = token_net(1).module
    options = {"samples": 4, "points": 2, "hessian_samples": 4, "sensitivity": "closed_form"}
    result = mlorq.compress(
        model,
        [images(4, 1), images(4, 2)],
        budget="7bit",
        rounding="closed_form",
        search={**options, "layers": {"head": FIXED, "blocks.*": {"forms": ["Q"], "bits": [3, 4]}}},
        device="cpu",
    )
    chosen = {row["layer"]: row for row in result.allocation.to_pylist()}
    assert chosen["head"]["candidate_id"] == "Q8"
    assert all(row["form"] == "Q" and row["bits"] in (3, 4) for name, row in chosen.items() if "blocks" in name)
    with pytest.raises(ConfigError, match="did you mean 'bits'"):
        mlorq.compress(model, [images(4, 1)], search={"layers": {"head": {"bit": [8]}}})
