"""Step ``capture`` within a bound of memory: the same bytes, the bound respected, and refused where it cannot be."""

from __future__ import annotations

import json
import os
import platform
import secrets
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import mlorq
from mlorq import memory
from mlorq.artifacts.hashing import digest_json
from mlorq.artifacts.store import ArtifactRef, Store
from mlorq.calibration import collect, covariance, label_free_hessian
from mlorq.calibration.covariance import OuterProducts
from mlorq.calibration.in_groups import Stops, groups_within, hessian_bytes, in_groups, inputs_bytes
from mlorq.codecs.affine import QuantizedMatrix, Rounded
from mlorq.config.run import RunConfig
from mlorq.data import from_batches
from mlorq.data.base import Dataset
from mlorq.errors import ConfigError
from mlorq.fitting import hessian_fit
from mlorq.fitting.scale_search import search_quantizer
from mlorq.forms import tcq, uniform_candidate
from mlorq.forms.modules import replace_layers
from mlorq.forms.stored_layer import CompressedLayer
from mlorq.memory import WIDEST
from mlorq.models.layer_list import Layer
from mlorq.models.layers import find_layers
from steps import capture, layers, pack
from steps.base import execute
from steps.session import Session
from tests.nets import float_model

WIDTH = 24


class Attention(torch.nn.Module):
    """Query, key and value of one input, and a block after them that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (torch.nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.up, self.down = torch.nn.Linear(WIDTH, 3 * WIDTH), torch.nn.Linear(3 * WIDTH, WIDTH)
        self.head = torch.nn.Linear(WIDTH, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = (self.q(x) @ self.k(x).transpose(1, 2)).softmax(-1)
        x = x + weights @ self.v(x)
        for _ in range(2):
            x = x + self.down(torch.relu_(self.up(x)))
        return self.head(x.mean(1))


def captured(folder: Path, bound: str | None, **search: Any) -> tuple[Session, ArtifactRef]:
    """The artifact of ``capture`` in a store of its own."""
    torch.manual_seed(0)
    model = float_model(Attention())
    batches = [torch.randn(3, 5, WIDTH), torch.randn(4, 5, WIDTH)]
    settings = {"metric": "moments", "token_weights": 0.5, "hessian_mode": "probes", "hessian_probes": 6, **search}
    config = RunConfig.from_mapping(
        {
            "model": {"family": "custom", "factory": "in:memory"},
            "data": {role: {"source": "custom", "factory": "in:memory"} for role in ("calibration", "evaluation")},
            "search": settings,
            "engine": {"memory": bound, "threads": 1},
            "store": f"file://{folder}",
        }
    )
    none = Dataset([], 0, digest_json("none"))
    session = Session(config, Store(config.store), model=model, calibration=from_batches(batches), evaluation=none)
    listed = execute(layers.spec(session), session.worker).ref
    spec = capture.spec(session, session.model_ref, listed, session.artifacts.layers(listed).layers)
    return session, execute(spec, session.worker).ref


def digests(session: Session, ref: ArtifactRef) -> Mapping[str, Any]:
    manifest = session.store.manifest(ref)
    assert manifest is not None
    return {name: file["digest"] for name, file in manifest["files"].items()}


@pytest.mark.parametrize(
    "search",
    [
        {},
        {"hessian_mode": "exact"},
        {"hessian_probes": 12, "hessian_min_probes": 2, "hessian_tolerance": 0.5},
        {"hessian_probes": 12, "hessian_min_probes": 2, "hessian_tolerance": 0.12},
        {"metric": "hessian", "token_weights": False},
    ],
)
def test_one_layer_at_a_time_gives_the_bytes_of_all_at_once(tmp_path, monkeypatch, search):
    session, ref = captured(tmp_path / "whole", "1GB", **search)
    calls: list[frozenset[str]] = []
    real = label_free_hessian.label_free_hessian
    monkeypatch.setattr(
        capture, "label_free_hessian", lambda *args, **options: calls.append(options["only"]) or real(*args, **options)
    )
    monkeypatch.setattr(capture, "groups_within", lambda found, sizes, bound: [[layer] for layer in found])
    bounded, other = captured(tmp_path / "bounded", "1GB", **search)
    assert set(calls) == {frozenset((name,)) for name in ("q", "k", "v", "up", "down", "head")}
    assert other == ref
    assert digests(bounded, other) == digests(session, ref)


def test_probing_stops_early_in_some_of_these_cases(tmp_path, monkeypatch):
    """That the cases above are what they are meant to be: all layers stop early, in some batch, and not at once."""
    counts: dict[float, int] = {}
    for tolerance in (0.5, 0.12, 0.0):
        seen: list[int] = []
        real = label_free_hessian._add_pass
        with monkeypatch.context() as patch:
            patch.setattr(
                label_free_hessian, "_add_pass", lambda *args, seen=seen, real=real: seen.append(1) or real(*args)
            )
            captured(
                tmp_path / str(tolerance), None, hessian_probes=12, hessian_min_probes=2, hessian_tolerance=tolerance
            )
        counts[tolerance] = len(seen)
    assert 4 <= counts[0.5] < counts[0.12] < counts[0.0] == 24


@pytest.mark.parametrize("bound", ["300kB", "310kB"])
def test_sums_keep_within_the_bound(tmp_path, monkeypatch, bound):
    session, ref = captured(tmp_path / "whole", None)
    alive: dict[int, int] = {}
    most = 0
    real = OuterProducts.__init__

    def made(self, *arguments):
        nonlocal most
        real(self, *arguments)
        alive[id(self)] = self.sums.nbytes
        most = max(most, sum(alive.values()))

    monkeypatch.setattr(OuterProducts, "__init__", made)
    monkeypatch.setattr(OuterProducts, "__del__", lambda self: alive.pop(id(self)), raising=False)
    bounded, other = captured(tmp_path / "bounded", bound)
    assert 0 < most <= int(bound.removesuffix("kB")) * 1000
    assert most < 16 * WIDTH**2 * (4 + 9)  # of the gradients of all layers
    assert digests(bounded, other) == digests(session, ref)


def test_a_bound_below_one_layer_is_refused_before_any_pass(tmp_path, monkeypatch):
    monkeypatch.setattr(collect, "capture", None)
    with pytest.raises(ConfigError, match=r"engine\.memory is 20,000 B.*'(up|down)' alone take [\d,]+ B.*: allow"):
        captured(tmp_path, "20kB")
    assert not list((tmp_path / "capture").glob("*/manifest.json"))


@pytest.mark.parametrize("bound", ["8", "8 apples", "-1GB", "0B", "3bit"])
def test_a_bound_that_is_no_size_is_refused(tmp_path, bound):
    with pytest.raises(ConfigError, match=r"engine\.memory: "):
        captured(tmp_path, bound)


def layer(name: str, rows: int, columns: int) -> Layer:
    return Layer(name, "linear", rows, columns, 1, rows * columns, 0, 0, 0)


def test_groups_are_successive_and_as_large_as_the_bound_allows():
    found = [layer(str(index), 4, 4) for index in range(5)]
    assert hessian_bytes(found[0], True) == (2 * 4 * 16 + 2 * 8 * 16, 4 * 4 * 48)
    assert inputs_bytes(found[0]) == (2 * 8 * 16, 4 * 4 * 32)
    sizes = lambda layer: (10, 5)  # noqa: E731
    names = [[one.name for one in group] for group in groups_within(found, sizes, 25)]
    assert names == [["0", "1"], ["2", "3"], ["4"]]
    assert len(groups_within(found, sizes, 55)) == 1
    assert [len(group) for group in groups_within(found, sizes, 1)] == [1] * 5
    assert groups_within([], sizes, 1) == []


def test_groups_stop_where_all_have_converged():
    """Four groups that converge after different passes: the first pass that all have is where each stops."""
    converges = {"a": {2, 4, 5}, "b": {1, 4, 5}, "c": {4}, "d": {3, 4, 5}}
    counts: list[tuple[str, int]] = []

    def estimate(group: list[Layer], stops: Stops | None) -> int:
        assert stops is not None
        done = 0
        for done in range(1, 7):
            if stops.after(0, done, stops.listens and done in converges[group[0].name]):
                break
        counts.append((group[0].name, done))
        return done

    groups = [[layer(name, 1, 1)] for name in converges]
    assert [found for _, found in in_groups(groups, estimate)] == [4] * 4
    assert counts == [("a", 6), ("b", 6), ("c", 6), ("d", 6), *((name, 4) for name in converges)]
    counts.clear()
    converges["b"] = set()
    assert [found for _, found in in_groups(groups, estimate)] == [6] * 4
    assert counts == [("a", 6), ("b", 6), *((name, 6) for name in converges)]
    counts.clear()
    converges["a"] = set()  # the rule: nothing is computed twice
    assert [found for _, found in in_groups(groups, estimate)] == [6] * 4
    assert counts == [(name, 6) for name in converges]


def test_compress_of_a_large_model_has_its_store_in_a_temporary_folder(tmp_path, monkeypatch):
    """Its results are those of a store in memory, and nothing of it is left."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    batches = [torch.randn(6, 8)]
    modes: list[int] = []

    def evaluate(_: torch.nn.Module) -> float:
        modes.extend(stat.S_IMODE(path.stat().st_mode) for path in tmp_path.glob("mlorq-*"))
        return 1.0

    found = []
    for free in (2**40, 8):
        monkeypatch.setattr(memory, "machine_memory", lambda free=free: (free, free))
        found.append(mlorq.compress(net, batches, preset="fast", evaluate=evaluate, memory="1MB"))
    assert modes == [0o700] * 2  # for the float and the compressed model, of the second call
    assert not list(tmp_path.glob("mlorq-*"))
    assert found[0].metrics["nmse"] == found[1].metrics["nmse"]
    assert torch.equal(found[0].model(batches[0]), found[1].model(batches[0]))


@pytest.mark.parametrize("moments", [True, False])
def test_the_bytes_of_the_sums_are_said(moments):
    """What the dry run shows: within the bound while every layer is, and never less than the largest layer's."""
    found = [Layer(str(index), "linear", 4 + index, 8, 1, 1, index, 0, index // 2) for index in range(6)]
    sizes = [sum(hessian_bytes(layer, moments)) for layer in found]
    whole = capture.Sums.within(2**40, found, moments)
    assert (len(whole.hessians), len(whole.inputs)) == (1, 1 if moments else 0)
    assert [layer.name for group in whole.inputs for layer in group] == (["0", "2", "4"] if moments else [])
    for bound in (max(sizes), 2 * max(sizes), whole.bytes):
        sums = capture.Sums.within(bound, found, moments)
        assert max(sizes) <= sums.bytes <= max(bound, sum(inputs_bytes(found[0])))
    assert capture.Sums.within(whole.bytes, found, moments) == whole
    assert len(capture.Sums.within(whole.bytes - 1, found, moments).hessians) == 2
    assert capture.Sums.within(1, found, moments).bytes == max(*sizes, sum(inputs_bytes(found[0])) if moments else 0)


def test_layers_with_very_many_outputs_have_no_moments_and_those_with_many_inputs_have_blocks():
    head, wide = Layer("head", "linear", WIDEST + 1, 8, 1, 1, 0, 0, 0), Layer("in", "linear", 8, 40960, 1, 1, 1, 0, 1)
    narrow = Layer("fine", "linear", WIDEST, 8, 1, 1, 2, 0, 0)  # which reads the same tensor as the head
    sums = capture.Sums.within(2**50, [head, wide, narrow], True)
    assert sums.leader == {"in": "in", "fine": "fine"}
    assert hessian_bytes(head, False)[0] == 8 * head.params
    doubled = replace(wide, in_features=81920)
    assert [inputs_bytes(each)[0] for each in (wide, doubled)] == [8 * 2 * 40960 * 4096, 8 * 2 * 81920 * 4096]


@pytest.mark.parametrize("rounding", ["closed_form", "block"])
def test_a_layer_too_wide_for_moments_is_compressed(monkeypatch, rounding):
    """A head with more outputs than a covariance may have takes forms that need none; other layers have theirs."""
    for module in (covariance, hessian_fit, tcq):
        monkeypatch.setattr(module, "WIDEST", 64)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 100))
    batches = list(torch.randn(64, 8).split(16))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "diag", None)  # a matrix of outputs
        found = mlorq.compress(net, batches, budget="4bit", preset="fast", rounding=rounding, rounding_iterations=3)
    forms = dict(zip(*(found.allocation[name].to_pylist() for name in ("layer", "form")), strict=True))
    assert forms["0"] == "TCQ"
    assert forms["2"] in ("Q", "LR")
    assert found.metrics["nmse"] < 0.1


@pytest.mark.parametrize("rounding", ["closed_form", "gptq", "erq", "lra", "block"])
def test_a_layer_in_blocks_is_compressed(monkeypatch, tmp_path, rounding):
    """Of a layer with many inputs no single matrix is made, in no step; its checkpoint decodes to the same weights."""
    monkeypatch.setattr(memory, "ONE_BLOCK", 64)
    monkeypatch.setattr(memory, "LARGEST_BLOCK", 32)
    torch.manual_seed(secrets.randbelow(2**31))
    net = torch.nn.Sequential(torch.nn.Linear(8, 24), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(96, 24))
    made = []
    zeros = torch.zeros

    def noted(*shape, **options):
        made.append(shape)
        return zeros(*shape, **options)

    x = torch.randn(128, 4, 8)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros", noted)
        found = mlorq.compress(
            net, list(x.split(16)), budget="3bit", preset="fast", rounding=rounding, rounding_iterations=3
        )
    assert (2, 3, 32, 32) in made
    assert not [shape for shape in made if shape[-2:] == (96, 96)]
    assert found.metrics["nmse"] < 0.3
    forms = dict(zip(*(found.allocation[name].to_pylist() for name in ("layer", "form")), strict=True))
    assert forms["3"] == "TCQ"
    rows = {one["layer"]: one for one in found.metrics["calibration"]["layers"]}
    assert rows["3"]["width"] == 96
    assert rows["3"]["ratio"] > 0
    found.save(tmp_path / "out")
    description = json.loads((tmp_path / "out" / "mlorq.json").read_text())
    assert description["format_version"] == 3  # version 2 would decode its rotation wrongly, and is refused there
    assert torch.equal(mlorq.load(tmp_path / "out", model=net)(x), found.model(x))


def test_blocks_have_a_key_of_their_own_and_other_layers_keep_theirs(monkeypatch, tmp_path):
    """What an artifact holds follows from its key."""
    found = [Layer("a", "linear", 8, 96, 1, 1, 0, 0, 0)]
    session, _ = captured(tmp_path, None)
    ref = session.model_ref, layers.spec(session).ref

    def key(listed):
        return capture.spec(session, *ref, listed).key

    assert key(found) == key([])
    monkeypatch.setattr(memory, "ONE_BLOCK", 64)
    monkeypatch.setattr(memory, "LARGEST_BLOCK", 32)
    assert key(found) != key([])
    assert key([replace(found[0], in_features=64)]) == key([])


def test_packing_shares_the_weights_that_it_replaces_and_leaves_the_model_alone():
    model = float_model(Attention())
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    found = find_layers(model, torch.randn(2, 5, WIDTH)).layers
    copied = pack._without_weights(model.module, found)
    for layer in found:
        ours, theirs = (module.get_submodule(layer.name) for module in (model.module, copied))
        assert ours is not theirs
        assert ours.weight.data_ptr() == theirs.weight.data_ptr()
        assert ours.bias.data_ptr() != theirs.bias.data_ptr()
    replaced = {one.name: CompressedLayer(one.name, uniform_candidate(4), matrices(one)) for one in found}
    replace_layers(copied, replaced)
    assert all(torch.equal(value, before[name]) for name, value in model.module.state_dict().items())
    assert isinstance(model.module.q, torch.nn.Linear)


def matrices(layer: Layer) -> dict[str, QuantizedMatrix]:
    values = torch.randn(layer.out_features, layer.in_features)
    return {"weight": Rounded.nearest(values, search_quantizer(values, 4, [1.0])).store()}


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other libraries of C return what is freed, or cannot")
def test_freed_memory_is_returned():
    """Blocks below the size that glibc maps by themselves, with one kept above them."""
    blocks = [torch.ones(25_000) for _ in range(2000)]  # 200 MB
    kept = torch.ones(25_000)
    before = resident()
    del blocks
    memory.return_freed()
    assert before - resident() > 100_000_000
    assert float(kept.sum()) == 25_000


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_process_that_may_take_less_than_the_machine_has_takes_a_share_of_that() -> None:
    before = memory.usable_bytes("cpu")
    with memory.at_most(1000):
        assert memory.usable_bytes("cpu") == 500
        with memory.at_most(None):
            assert memory.usable_bytes("cpu") > 500
    with memory.at_most(10**18):
        assert 500 < memory.usable_bytes("cpu") < 10**17
    assert before > 500
