"""Norms that blocks and tuning train: how they travel through the artifacts into the checkpoint."""

from __future__ import annotations

import hashlib
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mlorq
from mlorq.artifacts.store import ArtifactRef, Store
from mlorq.config.run import RunConfig
from mlorq.forms.modules import replace_layers
from mlorq.models.norms import norm_parameters, set_parameters
from mlorq.rounding.trainable import Trained
from mlorq.rounding.trainable_range import trainable_ranges
from steps.artifacts import ArtifactReader
from steps.handles import ModelRef
from steps.inprocess import InProcess
from steps.pipeline import result_json, run_pipeline
from steps.reconstruct import trained_files
from steps.session import Session
from tests import zoo
from tests.long import few

VIT = """
import torch
from tests import zoo

def build():
    return zoo.timm_model(zoo.VIT, {**zoo.VIT_ARGUMENTS, "init_values": 0.5}, seed=3)

def calibration_batches():
    return [zoo.pixels(8, seed) for seed in range(6)]

def evaluate(model):
    return {"mean": float(model(zoo.pixels(8, 9)).mean().detach())}
"""
TEXTS = {"source": "table", "path": "texts.csv", "batch_size": 4, "text": [0], "label": 1}
MODELS: dict[str, dict[str, Any]] = {
    "vit": {
        "model": {"family": "custom", "factory": "vit_with_scales:build"},
        "data": {
            "calibration": {"source": "custom", "factory": "vit_with_scales:calibration_batches"},
            "evaluation": {"source": "custom", "factory": "vit_with_scales:evaluate"},
        },
    },
    "bert": {
        "model": {"family": "transformers", "name": "model", "task": "text-classification"},
        "data": {"calibration": TEXTS, "evaluation": TEXTS},
    },
}
# Names of norms inside and outside the blocks.
NORMS = {
    "vit": (
        [f"blocks.{i}.{name}" for i in range(2) for name in
         ("norm1.weight", "norm1.bias", "ls1.gamma", "norm2.weight", "norm2.bias", "ls2.gamma")],
        ["norm.weight", "norm.bias"],
    ),
    "bert": (
        [f"bert.encoder.layer.{i}.{name}.LayerNorm.{part}" for i in range(2)
         for name in ("attention.output", "output") for part in ("weight", "bias")],
        ["bert.embeddings.LayerNorm.weight", "bert.embeddings.LayerNorm.bias"],
    ),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import sys

    (tmp_path / "vit_with_scales.py").write_text(VIT)
    monkeypatch.delitem(sys.modules, "vit_with_scales", raising=False)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    zoo.save_text_model(tmp_path / "model", "bert-classifier", seed=6)
    lines = [f"{first} {second},{i % 2}\n" for i, first in enumerate(zoo.SENTENCES) for second in zoo.SENTENCES[:4]]
    (tmp_path / "texts.csv").write_text("".join(lines))
    return tmp_path


def run(folder: Path, kind: str, **changes: Any) -> tuple[dict[str, Any], set[str], Session]:
    """One run as a new process would do it; the result object, the steps computed, and the session."""
    # Small step sizes of the codes: with few samples, the held-out loss seldom falls if everything moves.
    rates = {"code_rate": 1e-4, "tuning_rate": 1e-4, "norm_rate": 1e-3}
    rounding = {"method": "block", "iterations": 60, "batch_size": 4, **rates, **changes.pop("rounding", {})}
    values = {
        **MODELS[kind],
        "preset": "quick",
        "search": zoo.QUICK,
        "budget": "3bit",
        "rounding": rounding,
        "engine": {"devices": "cpu", "threads": 1},
        **changes,
    }
    config = RunConfig.from_mapping(values, str(folder))
    session = Session(config, Store(config.resolve(config.store)))
    done: list[tuple[str, bool]] = []
    record = InProcess(session, record=lambda outcome: done.append((outcome.ref.step, outcome.reused)))
    (found,) = run_pipeline(session, record, config.budgets)
    return result_json(session, found), {step for step, reused in done if not reused}, session


def chain(session: Session, result: dict[str, Any]) -> dict[str, ArtifactRef]:
    return {role: ArtifactRef.from_json(value) for role, value in result["artifacts"].items() if value}


def in_memory(session: Session, result: dict[str, Any], last: ArtifactRef, plan: Any = None) -> nn.Module:
    """The model that a chain of artifacts describes, assembled without the steps that train, pack and load."""
    refs = chain(session, result)
    model = session.worker.context.model(ModelRef(session.model_ref.key, refs.get("plan")))
    module = deepcopy(model.module)
    found = session.artifacts.all_rounded(last)
    replace_layers(module, found.layers)
    if plan is not None:
        plan.install(module)
    set_parameters(module, found.rest)
    return module


def float_norms(session: Session) -> dict[str, Tensor]:
    return {parameter.name: parameter.tensor.detach().clone() for parameter in norm_parameters(session.model.module)}


@pytest.mark.parametrize("kind", few(["vit", "bert"], "bert"))
@pytest.mark.parametrize("tuning", few([0, 60], 60))
def test_trained_norms_reach_the_checkpoint(folder: Path, kind: str, tuning: int) -> None:
    result, _, session = run(folder, kind, rounding={"tuning": tuning})
    refs, before = chain(session, result), float_norms(session)
    inside, outside = NORMS[kind]
    assert set(before) == {*inside, *outside}
    blocks = [refs[role] for role in refs if role.startswith("reconstruct/")]
    rests = [session.artifacts.rounded(ref).rest for ref in blocks]
    assert sorted(name for rest in rests for name in rest) == sorted(inside)
    assert any(not torch.equal(value, before[name]) for rest in rests for name, value in rest.items())
    expected = {name: value for rest in rests for name, value in rest.items()}
    if tuning:
        trained = session.artifacts.rounded(refs["tune"])
        assert session.store.read_json(refs["tune"], "block.json")["rest"] == sorted(before)
        assert any(not torch.equal(value, expected.get(name, before[name])) for name, value in trained.rest.items())
        expected = trained.rest
    loaded = mlorq.load(result["checkpoint"]) if kind == "bert" else mlorq.load(
        result["checkpoint"], model=session.model.module)  # fmt: skip
    for name, value in (before | expected).items():
        assert torch.equal(loaded.get_parameter(name), value), name
    assert float_norms(session).keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in float_norms(session).items())
    # The norms are float tensors as before: the budget is met with the same bytes around the layers.
    fixed, _, _ = run(folder, kind, rounding={"tuning": tuning, "norm_rate": 0.0})
    assert (fixed["rest_bytes"], fixed["file_bytes"]) == (result["rest_bytes"], result["file_bytes"])
    batch = session.evaluation.batches[0] if kind == "bert" else zoo.pixels(8, 77)
    ends = [refs["tune"]] if tuning else [ref for role, ref in refs.items() if role.startswith(("round/", "recon"))]
    module = in_memory(session, result, max(ends, key=lambda ref: depth(session, ref)))
    assert torch.equal(session.model.outputs(loaded, batch), session.model.outputs(module, batch))


def depth(session: Session, ref: ArtifactRef | None) -> int:
    return 0 if ref is None else 1 + depth(session, session.artifacts.rounded(ref).previous)


def test_folded_norms_are_trained_in_the_folded_model(folder: Path) -> None:
    settings = {"rounding": {"tuning": 60}, "activations": {"bits": 6, "method": "repq", "samples": 8}}
    result, _, session = run(folder, "vit", **settings)
    refs = chain(session, result)
    plan = session.artifacts.plan(refs["plan"])
    assert plan is not None
    assert plan.folds
    trained = session.artifacts.rounded(refs["tune"]).rest
    module = in_memory(session, result, refs["tune"], plan.without_folds())
    folded = session.worker.context.model(ModelRef(session.model_ref.key, refs["plan"])).module
    names = [f"{fold.norm}.{part}" for fold in plan.folds for part in ("weight", "bias")]
    assert any(not torch.equal(trained[name], folded.get_parameter(name)) for name in names)
    for name in (name for name in names if name.endswith("weight")):
        # Near the folded norm: 120 steps of 0.001, of falling size.
        start = folded.get_parameter(name)
        assert (trained[name] - start).norm() < 0.2 * start.norm()
    # Ranges of activations are trained with them.
    plan.install(installed := deepcopy(folded))
    learned = {one.name: one.given for one in trainable_ranges(installed)}
    assert learned
    assert learned.keys() <= trained.keys()
    assert any(not torch.equal(trained[name], value) for name, value in learned.items())
    loaded = mlorq.load(result["checkpoint"], model=session.model.module)
    state = loaded.state_dict()
    for name, value in trained.items():
        assert torch.equal(state[name], value), name
    batch = zoo.pixels(8, 77)
    assert torch.equal(session.model.outputs(loaded, batch), session.model.outputs(module, batch))
    fixed, _, _ = run(folder, "vit", rounding={"tuning": 60, "norm_rate": 0.0}, activations=settings["activations"])
    assert result["nmse"] < 2 * fixed["nmse"]


@pytest.mark.parametrize("kind", few(["vit", "bert"], "vit"))
def test_a_run_that_goes_on_elsewhere_gives_the_same_norms(folder: Path, kind: str) -> None:
    """After the first block: the next layer, block and the tuning read its norms from the store."""
    first, _, session = run(folder, kind, rounding={"tuning": 12})
    store, refs = folder / ".mlorq", chain(session, first)
    digests = {
        path.relative_to(store): hashlib.sha256(path.read_bytes()).hexdigest() for path in store.rglob("*.safetensors")
    }
    assert any("rest" in path.parts for path in digests)
    by_depth = sorted((ref for role, ref in refs.items() if role.startswith("reconstruct/")),
                      key=lambda ref: depth(session, ref))  # fmt: skip
    after = [ref for role, ref in refs.items() if role.startswith("round/")
             and depth(session, ref) > depth(session, by_depth[0])]  # fmt: skip
    assert after
    for ref in [*after, by_depth[-1]]:
        shutil.rmtree(store / ref.step / ref.key)
    for step in ("tune", "compressed", "evaluate", "calibration", "summary"):
        shutil.rmtree(store / step)
    again, computed, _ = run(folder, kind, rounding={"tuning": 12})
    assert computed == {"round", "reconstruct", "tune", "compressed", "evaluate", "calibration", "summary"}
    assert {**again, "seconds": None} == {**first, "seconds": None}
    for path, digest in digests.items():
        assert hashlib.sha256((store / path).read_bytes()).hexdigest() == digest, path


def test_norms_that_do_not_lower_the_loss_are_those_of_the_float_model(folder: Path) -> None:
    result, _, session = run(folder, "vit", rounding={"tuning": 4, "norm_rate": 100.0})
    trained = session.artifacts.rounded(chain(session, result)["tune"]).rest
    before = float_norms(session)
    assert trained.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in trained.items())


def test_the_last_artifact_of_a_chain_decides(tmp_path: Path) -> None:
    store = Store(f"file://{tmp_path}")
    start = ArtifactRef("round", "0" * 64)

    def write(step: str, key: str, rest: dict[str, Tensor], previous: ArtifactRef) -> ArtifactRef:
        return store.write(step, key * 64, trained_files(Trained([], 1.0, 0.5, 3, rest), previous))

    one, two = torch.tensor([1.0]), torch.tensor([2.0], dtype=torch.bfloat16)
    first = write("reconstruct", "1", {"a.weight": one, "a.bias": one.clone()}, start)
    second = write("reconstruct", "2", {"a.weight": two}, first)
    third = write("tune", "3", {}, second)
    reader = ArtifactReader(store)
    found = reader.rounded_since(first.key, third)
    assert found is not None
    assert found.rest.keys() == {"a.weight"}
    assert found.rest["a.weight"].dtype == torch.bfloat16
    assert reader.rounded(third).rest == {}
    found = reader.rounded_since(start.key, third)
    assert found is not None
    assert {name: float(value) for name, value in found.rest.items()} == {"a.weight": 2.0, "a.bias": 1.0}
