"""A whole run on a small custom model: what is reused, what is recomputed, and what a resumed run still has to do."""

from __future__ import annotations

import hashlib
import itertools
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

import mlorq
import steps.pipeline as pipeline
from mlorq.artifacts.gc import needed_by
from mlorq.artifacts.store import ArtifactRef, Store
from mlorq.config.budget import parse_budgets
from mlorq.config.run import RunConfig
from mlorq.errors import BudgetError, ConfigError, DataError, ModelError, StoreError
from mlorq.export_targets import TARGETS
from steps import REGISTRY
from steps.base import Outcome, StepSpec, execute
from steps.inprocess import InProcess
from steps.pipeline import result_json, run_pipeline
from steps.session import Session
from tests.long import few
from tests.nets import images

MODEL = """
import torch
from tests.nets import TokenNet, images

def build(seed=0):
    torch.manual_seed(seed)
    return TokenNet(width=16, blocks=2)

def calibration_batches():
    return [images(4, 1), images(4, 2), images(4, 3)]

def evaluate(model):
    return {"mean": float(model(images(8, 9)).mean().detach()), "other": 1.0}
"""

CONFIG = {
    "model": {"family": "custom", "factory": "small_model:build"},
    "data": {
        "calibration": {"source": "custom", "factory": "small_model:calibration_batches"},
        "evaluation": {"source": "custom", "factory": "small_model:evaluate"},
    },
    "budget": "4bit",
    "preset": "quick",
    "search": {"samples": 8, "points": 2, "hessian_mode": "exact", "factor_bits": [4, 8]},
    "rounding": {"iterations": 20},
    "engine": {"devices": "cpu", "threads": 1},
}


def _write(folder: Path) -> Path:
    (folder / "small_model.py").write_text(MODEL)
    (folder / "run.yaml").write_text(yaml.safe_dump(CONFIG))
    return folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a configuration and the code it names, imported afresh."""
    _forget(monkeypatch)
    return _write(tmp_path)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """The store and the result of one run, made once."""
    with pytest.MonkeyPatch.context() as patch:
        _forget(patch)
        folder = _write(tmp_path_factory.mktemp("first"))
        (result,), done = run(folder)
        assert computed(done) == ALL
        return folder / ".mlorq", result


@pytest.fixture
def ran(folder: Path, first: tuple[Path, dict]) -> Path:
    """A folder whose configuration has run: its store is a copy of that of ``first``, for keys hold no paths."""
    shutil.copytree(first[0], folder / ".mlorq")
    return folder


def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib
    import sys

    importlib.invalidate_caches()
    monkeypatch.delitem(sys.modules, "small_model", raising=False)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)


def run(folder: Path, budgets: list[str] | None = None, **overrides) -> tuple[list[dict], list[tuple[str, bool]]]:
    """One run as a new process would do it: everything loaded afresh."""
    config = RunConfig.from_yaml(folder / "run.yaml", {k.replace("__", "."): v for k, v in overrides.items()})
    session = Session(config, Store(config.resolve(config.store)))
    outcomes: list[Outcome] = []
    results = run_pipeline(session, InProcess(session, record=outcomes.append), parse_budgets(budgets or config.budget))
    done = [(outcome.ref.step, outcome.reused) for outcome in outcomes]
    return [result_json(session, result) for result in results], done


def fingerprint(store: Path) -> dict[str, tuple[int, str]]:
    """Every file and folder of a store with its time of change, and every file's content."""
    return {
        str(path.relative_to(store)): (
            path.stat().st_mtime_ns,
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "",
        )
        for path in sorted(store.rglob("*"))
    }


def computed(done: list[tuple[str, bool]]) -> set[str]:
    return {step for step, reused in done if not reused}


def test_second_run_touches_nothing(folder):
    first, done = run(folder)
    assert computed(done) == ALL
    before = fingerprint(folder / ".mlorq")
    second, done = run(folder)
    assert computed(done) == set()
    assert fingerprint(folder / ".mlorq") == before
    assert second == first


def test_a_step_found_again_says_the_seconds_that_making_it_took(folder, monkeypatch):
    config = RunConfig.from_yaml(folder / "run.yaml")
    session = Session(config, Store(config.resolve(config.store)))
    clock = itertools.count()
    # Times that rounding twice (four digits, then three) and rounding once tell apart. Computing has three of the
    # clock's intervals, before and between the two files and after them; writing has two.
    monkeypatch.setattr("steps.base.time.perf_counter", lambda: 0.0425367 / 3 * next(clock))
    spec = pipeline.layers.spec(session)
    made, found = execute(spec, session.worker), execute(spec, session.worker)
    assert (made.reused, found.reused) == (False, True)
    assert made.seconds == found.seconds == 0.043


def test_same_inputs_give_the_same_keys_and_bytes_elsewhere(folder, first):
    run(folder)
    here, elsewhere = folder / ".mlorq", first[0]
    files = {
        store: {
            name: digest
            for name, (_, digest) in fingerprint(store).items()
            # Manifests hold times, and the index of a search holds paths.
            if digest and not name.endswith("manifest.json") and not name.startswith("search/")
        }
        for store in (here, elsewhere)
    }
    assert files[here] == files[elsewhere]


ALL = set(REGISTRY) - {
    "activations",
    "embeddings",
    "export",
    "joint",
    "reconstruct",
    "table_costs",
    "tune",
    "width_costs",
}  # which other settings bring
AFTER_ROUNDING = ("compressed", "evaluate", "calibration", "summary")
FROM_CANDIDATES = {"candidates", "sensitivity", "allocate"}


@pytest.mark.parametrize(
    ("overrides", "expected", "allowed"),
    [
        ({"search__bits": [2, 4, 8]}, FROM_CANDIDATES, ALL - {"layers", "capture", "baseline"}),
        ({"search__points": 3}, {"sensitivity", "allocate"}, ALL - {"layers", "capture", "candidates", "baseline"}),
        ({"search__hessian_samples": 4}, {"capture", *FROM_CANDIDATES}, ALL - {"layers", "baseline"}),
        ({"search__exclude": ["head"]}, {"layers", "capture", *FROM_CANDIDATES}, ALL - {"baseline"}),
        (
            {"search__objective": "sqnr"},
            {"allocate"},
            {"allocate", "round", *AFTER_ROUNDING},
        ),
        (
            {"rounding__iterations": 21},
            {"round", "compressed"},
            {"round", *AFTER_ROUNDING},
        ),
        (
            {"rounding__method": "nearest"},
            {"round", "compressed"},
            {"round", *AFTER_ROUNDING},
        ),
        ({"seed": 5}, {"capture"}, ALL - {"layers", "baseline"}),
        ({"engine__threads": 2}, set(), set()),
        ({"model__arguments": {"seed": 1}}, ALL, ALL),
    ],
)
def test_a_change_recomputes_what_depends_on_it(ran, overrides, expected, allowed):
    before = fingerprint(ran / ".mlorq")
    _, done = run(ran, **overrides)
    assert expected <= computed(done) <= allowed
    after = fingerprint(ran / ".mlorq")
    assert all(after[name] == entry for name, entry in before.items() if entry[1]), "nothing computed is lost"


def test_a_changed_calibration_sample_recomputes_all_but_the_baseline(ran, monkeypatch):
    (ran / "small_model.py").write_text(MODEL.replace("images(4, 3)", "images(4, 30)"))
    _forget(monkeypatch)
    _, done = run(ran)
    # The NMSE is measured on calibration data here, so the float outputs are new too.
    assert computed(done) == ALL


def test_a_changed_evaluation_recomputes_no_search(ran, monkeypatch):
    (ran / "small_model.py").write_text(MODEL.replace("images(8, 9)", "images(8, 10)"))
    _forget(monkeypatch)
    _, done = run(ran)
    assert computed(done) == {"baseline", "evaluate", "calibration", "summary"}


@pytest.mark.parametrize("name", sorted(ALL))
def test_a_step_of_a_new_version_recomputes_it_and_what_reads_it(ran, name, monkeypatch):
    REGISTRY[name]
    module = next(m for m in sys.modules.values() if getattr(getattr(m, "STEP", None), "name", None) == name)
    new = replace(module.STEP, version=module.STEP.version + 1)
    monkeypatch.setattr(module, "STEP", new)
    monkeypatch.setitem(REGISTRY, name, new)
    _, done = run(ran)
    after = {
        "layers": ALL - {"baseline"},
        "capture": ALL - {"layers", "baseline"},
        "candidates": ALL - {"layers", "capture", "baseline"},
        "sensitivity": ALL - {"layers", "capture", "candidates", "baseline"},
        "allocate": {"allocate", *AFTER_ROUNDING},
        "round": {"round", *AFTER_ROUNDING},
        "compressed": {*AFTER_ROUNDING},
        "baseline": {"baseline", "evaluate", "calibration", "summary"},
        "evaluate": {"evaluate", "calibration", "summary"},
        "calibration": {"calibration", "summary"},
        "summary": {"summary"},
    }[name]
    if name in ("candidates", "sensitivity"):
        # The same candidates are chosen, and rounding depends on the choice alone.
        after = after - {"round"}
    assert computed(done) == after


BEST = {
    "preset": "best",
    "search__sum_ranks": [2, 4],
    "search__samples": 8,
    "rounding__iterations": 8,
    "rounding__batch_size": 2,
    "rounding__tuning": 6,
}


def test_the_best_preset_reconstructs_blocks_and_goes_on_where_it_was_stopped(folder):
    (first,), done = run(folder, **BEST)
    assert computed(done) == set(REGISTRY) - {
        "activations",
        "embeddings",
        "export",
        "joint",
        "table_costs",
        "width_costs",
    }
    assert sum(step == "reconstruct" for step, _ in done) == 2
    assert first["bytes"] <= first["budget_bytes"]
    assert run(folder, **BEST)[1] == [(step, True) for step, _ in done]
    store = folder / ".mlorq"
    before = fingerprint(store)
    # The second block and all after it are gone: float and compressed model are rebuilt from what is there.
    by_age = sorted(store.glob("reconstruct/*/manifest.json"), key=lambda path: path.stat().st_mtime_ns)
    for step in ("tune", *AFTER_ROUNDING):
        shutil.rmtree(store / step)
    shutil.rmtree(by_age[-1].parent)
    _, done = run(folder, **BEST)
    assert computed(done) == {"reconstruct", "tune", *AFTER_ROUNDING}
    after = fingerprint(store)
    for name, (_, digest) in before.items():
        if name.endswith((".safetensors", ".parquet")):
            assert after[name][1] == digest, name


def test_held_out_costs_are_measured_and_scaled_in_the_best_preset(folder):
    (result,), _ = run(folder, **BEST, search__bits=[2, 3, 4, 5, 6, 8])
    store = Store(f"file://{folder / '.mlorq'}")
    for role, value in result["artifacts"].items():
        if role.startswith("sensitivity/"):
            rows = store.read_table(ArtifactRef.from_json(value), "sensitivity.parquet").to_pylist()
            assert [row["how"] for row in rows].count("measured") == 1
            assert {row["how"] for row in rows} == {"measured", "closed_form"}
            assert all(row["global_cost"] >= 0 for row in rows)


def test_local_costs_are_taken_as_they_are_where_asked(folder):
    (result,), _ = run(folder, **BEST, search__sensitivity="local")
    store = Store(f"file://{folder / '.mlorq'}")
    references = {role: ArtifactRef(value["step"], value["key"]) for role, value in result["artifacts"].items()}
    for layer in (role.removeprefix("sensitivity/") for role in references if role.startswith("sensitivity/")):
        rows = store.read_table(references[f"candidates/{layer}"], "candidates.parquet").to_pylist()
        local = {row["candidate_id"]: row["local_cost"] for row in rows if row["on_front"]}
        found = store.read_table(references[f"sensitivity/{layer}"], "sensitivity.parquet").to_pylist()
        assert {row["candidate_id"]: row["global_cost"] for row in found} == local
        assert {row["how"] for row in found} == {"local"}


def test_other_costs_of_the_output_change_costs_and_nothing_before_them(ran):
    (result,), done = run(ran, search__cost="kl")
    assert computed(done) >= {"sensitivity", "allocate"}
    assert not computed(done) & {"layers", "capture", "candidates", "baseline"}
    assert result["predicted_cost"] > 0
    with pytest.raises(DataError, match="task needs calibration data with labels"):
        run(ran, search__cost="task", seed=1)


def test_another_budget_computes_only_what_depends_on_it(ran):
    results, done = run(ran, ["4bit", "30%", "3.5bit"])
    assert computed(done) <= {"allocate", "round", *AFTER_ROUNDING}
    assert [result["budget"] for result in results] == ["4bit", "30%", "3.5bit"]
    for result in results:
        assert result["bytes"] <= result["budget_bytes"]
        assert sum(row["bytes"] for row in result["allocation"]) == result["bytes"]
        assert result["bytes"] + result["rest_bytes"] + result["overhead_bytes"] == result["file_bytes"]


def test_result_object_has_what_it_promises(first):
    _, result = first
    for name in [
        "run",
        "budget",
        "budget_bytes",
        "bytes",
        "rest_bytes",
        "file_bytes",
        "float_bytes",
        "predicted_cost",
        "nmse",
        "metric",
        "allocation",
        "seconds",
        "checkpoint",
        "solver",
    ]:
        assert result[name] is not None, name
    assert result["metric"]["name"] == "mean"
    assert 0 < result["nmse"] < 1
    assert set(result["solver"]) == {"name", "status", "objective", "bound", "gap", "seconds"}
    files = {path.name: path.stat().st_size for path in Path(result["checkpoint"].removeprefix("file://")).iterdir()}
    assert files["model.safetensors"] + files["mlorq.json"] == result["file_bytes"]


def test_the_checkpoint_gives_the_outputs_that_were_evaluated(ran):
    (result,), _ = run(ran)
    import small_model

    model = mlorq.load(result["checkpoint"], model=small_model.build())
    assert small_model.evaluate(model)["mean"] == result["metric"]["compressed"]


STOPS = ["layers", "capture", "candidates", "sensitivity", "round", "compressed"]


# One step, a fan-out of the search, and one of a budget.
@pytest.mark.parametrize("after", few(STOPS, "capture", "candidates", "round"))
def test_an_interrupted_run_goes_on_where_it_stopped(folder, first, after, monkeypatch):
    real = execute
    seen: list[str] = []

    def dies(spec: StepSpec, worker, progress=None):
        outcome = real(spec, worker, progress)
        seen.append(spec.step)
        if seen.count(after) == (2 if after in ("candidates", "sensitivity", "round") else 1):
            raise KeyboardInterrupt
        return outcome

    monkeypatch.setattr("steps.inprocess.execute", dies)
    with pytest.raises(KeyboardInterrupt):
        run(folder)
    monkeypatch.undo()
    before = fingerprint(folder / ".mlorq")
    (resumed,), done = run(folder)
    assert sum(reused for _, reused in done) == len(seen)
    now = fingerprint(folder / ".mlorq")
    assert all(now[name] == entry for name, entry in before.items() if entry[1])
    _, whole = first
    for name in ("nmse", "metric", "allocation", "bytes"):
        assert resumed[name] == whole[name]


def test_impossible_budget_names_the_smallest_and_keeps_the_search(folder):
    with pytest.raises(BudgetError, match="smallest possible is"):
        run(folder, ["0.5bit"])
    _, done = run(folder)
    assert not computed(done) & {"layers", "capture", "candidates", "sensitivity"}
    with pytest.raises(BudgetError, match="3 bits please"):
        run(folder, ["3 bits please"])
    with pytest.raises(BudgetError):
        run(folder, ["1kB"])


def test_a_damaged_artifact_is_named(ran):
    victim = next((ran / ".mlorq" / "candidates").glob("*/candidates.parquet"))
    victim.write_bytes(victim.read_bytes()[:-7])
    with pytest.raises(StoreError, match=victim.parent.name):
        run(ran)
    shutil.rmtree(victim.parent)
    _, done = run(ran)
    assert [step for step, reused in done if not reused] == ["candidates"]


def test_models_and_data_at_fault_are_named_before_any_artifact(folder, monkeypatch):
    (folder / "small_model.py").write_text(
        MODEL.replace(
            "return TokenNet(width=16, blocks=2)",
            "net = TokenNet(); net.head.weight.data[0, 0] = float('nan'); return net",
        )
    )
    _forget(monkeypatch)
    with pytest.raises(ModelError, match=r"head\.weight"):
        run(folder)
    (folder / "small_model.py").write_text(
        MODEL.replace("[images(4, 1), images(4, 2), images(4, 3)]", "[images(1, 1)]")
    )
    _forget(monkeypatch)
    with pytest.raises(DataError, match="1 samples"):
        run(folder)
    (folder / "small_model.py").write_text(MODEL.replace("TokenNet(width=16, blocks=2)", "torch.nn.LayerNorm(6)"))
    _forget(monkeypatch)
    with pytest.raises(ModelError, match="no compressible layers"):
        run(folder)
    assert not (folder / ".mlorq").exists()


def test_a_step_in_a_process_of_its_own_makes_the_same_artifact(ran, tmp_path_factory):
    import json
    import os
    import subprocess
    import sys

    config = RunConfig.from_yaml(ran / "run.yaml")
    store = Store(config.resolve(config.store))
    ref = next(store.refs("sensitivity"))
    manifest = store.manifest(ref)
    spec = StepSpec("sensitivity", REGISTRY["sensitivity"].version, manifest["details"]["params"], {}, "x")
    spec = StepSpec.from_json({**spec.to_json(), "inputs": manifest["details"]["inputs"]})
    assert spec.ref == ref
    before = store.read_bytes(ref, "sensitivity.parquet")
    shutil.rmtree(ran / ".mlorq" / "sensitivity" / ref.key)
    message = tmp_path_factory.mktemp("spec") / "spec.json"
    values = config.model_dump(mode="json", exclude={"folder"})
    message.write_text(json.dumps({"config": values, "folder": str(ran), "device": "cpu", "spec": spec.to_json()}))
    found = subprocess.run(
        [sys.executable, "-m", "steps", "sensitivity", "--spec", str(message)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert json.loads(found.stdout)["key"] == ref.key
    assert store.read_bytes(ref, "sensitivity.parquet") == before


def test_nothing_in_the_library_knows_of_prefect_or_docker():
    import ast

    root = Path(mlorq.__file__).parents[1]
    for package in ("mlorq", "steps"):
        for file in (root / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                names = (
                    [alias.name for alias in node.names]
                    if isinstance(node, ast.Import)
                    else [node.module or ""]
                    if isinstance(node, ast.ImportFrom)
                    else []
                )
                for name in names:
                    assert name.split(".")[0] not in ("prefect", "docker", "flows"), (file, name)
                    if package == "mlorq":
                        # The front door alone: ``mlorq.compress`` is that of ``steps.api``.
                        front = file == root / "mlorq" / "__init__.py" and name == "steps.api"
                        assert front or name.split(".")[0] != "steps", (file, name)


# -- exports ----------------------------------------------------------------------------------------------------------

EXPORT = {"export": [{"to": "onnx"}, {"to": "dense", "dtype": "float16"}]}


@pytest.fixture(scope="module")
def exported(first: tuple[Path, dict], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A folder whose configuration has run without exports, then with them, and the latter's result."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="needs the extra onnx")
    with pytest.MonkeyPatch.context() as patch:
        _forget(patch)
        folder = _write(tmp_path_factory.mktemp("exported"))
        shutil.copytree(first[0], folder / ".mlorq")
        (result,), done = run(folder, **EXPORT)
        assert computed(done) == {"export", "summary"}, "all else is of the first run"
        return folder, result


def test_a_run_ends_in_the_files_that_export_asks_for(first, exported):
    _, plain = first
    assert plain["exports"] == []
    folder, result = exported
    assert result["bytes"] == plain["bytes"]
    graph, state = result["exports"]
    assert (graph["to"], state["to"], state["options"]) == ("onnx", "dense", {"dtype": "float16"})
    assert [file["name"] for file in (*graph["files"], *state["files"])] == ["model.onnx", "model.safetensors"]
    for exported in (graph, state):
        (file,) = exported["files"]
        assert file["uri"] == f"{exported['uri']}/{file['name']}"
        size = Path(file["uri"].removeprefix("file://")).stat().st_size
        assert exported["bytes"] == file["bytes"] == size
    config = RunConfig.from_yaml(folder / "run.yaml")
    module = Session(config, Store(config.resolve(config.store))).model.module
    model, x = mlorq.load(result["checkpoint"], model=module), images(5, 7)
    file = graph["files"][0]["uri"].removeprefix("file://")
    assert torch.allclose(mlorq.load(file, runtime="onnxruntime")(x), model(x), rtol=1e-4, atol=1e-5)
    assert graph["about"]["precision"] == "exact"
    from safetensors.torch import load_file

    written = load_file(state["files"][0]["uri"].removeprefix("file://"))
    assert {value.dtype for value in written.values()} == {torch.float16}
    kept = needed_by(Store(config.resolve(config.store)), [result["run"]])
    assert sum(ref.step == "export" for ref in kept) == 2
    before = fingerprint(folder / ".mlorq")
    again, done = run(folder, **EXPORT)
    assert computed(done) == set()
    assert again == [result]
    assert fingerprint(folder / ".mlorq") == before


def test_a_change_of_one_export_recomputes_it_alone(folder, exported):
    shutil.copytree(exported[0] / ".mlorq", folder / ".mlorq")
    _, done = run(folder, export=[{"to": "onnx"}, {"to": "dense"}])
    assert sorted(done, key=lambda item: item[1])[:2] == [("export", False), ("summary", False)]
    assert done.count(("export", True)) == 1


def test_every_budget_has_its_export(ran):
    found, done = run(ran, ["4bit", "6bit"], export=[{"to": "dense"}])
    assert done.count(("export", False)) == 2
    first, second = (result["exports"][0]["uri"] for result in found)
    assert first != second


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"to": "onxx"}, "export.0.to"),
        ({"to": "onnx", "precison": "fast"}, "did you mean 'precision'"),
        ({"to": "onnx", "precision": "faster"}, "export.0.precision"),
        ({"to": "onnx", "opset": 9}, "opset 9"),
        ({"to": "dense", "precision": "fast"}, "target dense has no option 'precision'; known: dtype"),
        ({"to": "transformers", "push_to_hub": "me/it"}, "export.0.push_to_hub"),
        ({"to": "onnx", "model": 1}, "export.0.model"),
        ({"to": "openvino", "example": 1}, "export.0.example"),
        ({"precision": "fast"}, "export.0.to"),
    ],
)
def test_wrong_exports_are_refused_with_the_configuration(folder, entry, said):
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        run(folder, export=[entry])
    assert "\n" not in str(caught.value)
    assert not (folder / ".mlorq").exists()


def test_what_an_export_needs_is_checked_before_anything_is_computed(folder, monkeypatch):
    with pytest.raises(ConfigError, match=r"tokenizer: folder .*nothing does not exist"):
        run(folder, export=[{"to": "onnx", "tokenizer": "./nothing"}])
    monkeypatch.setattr(TARGETS["dense"], "packages", ("not_installed",), raising=False)
    with pytest.raises(ConfigError, match="pip install not_installed"):
        run(folder, export=[{"to": "dense"}])
    assert not (folder / ".mlorq").exists()


def test_exports_survive_the_round_trip_of_a_configuration(folder):
    config = RunConfig.from_yaml(folder / "run.yaml", EXPORT)
    assert RunConfig.from_mapping(yaml.safe_load(config.to_yaml()), config.folder) == config
    assert [entry.to for entry in config.export] == ["onnx", "dense"]


def test_files_that_an_option_names_are_part_of_the_key(folder):
    (folder / "words").mkdir()
    (folder / "words" / "tokenizer.json").write_text("{}")
    config = RunConfig.from_yaml(folder / "run.yaml", {"export": [{"to": "onnx", "tokenizer": "words"}]})
    session = Session(config, Store(config.resolve(config.store)))
    checkpoint = ArtifactRef("compressed", "0" * 64)
    (first,) = pipeline.export.specs(session, checkpoint)
    assert first.params["options"]["tokenizer"] == str(folder / "words")
    (folder / "words" / "model.safetensors").write_bytes(b"weights are not read")
    assert pipeline.export.specs(session, checkpoint) == [first]
    (folder / "words" / "tokenizer.json").write_text('{"other": 1}')
    assert pipeline.export.specs(session, checkpoint)[0].key != first.key
