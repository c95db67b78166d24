"""Steps say what they read: their records go through messages whole, and their functions reach nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlorq.artifacts.store import ArtifactRef, Store
from mlorq.config.budget import parse_budgets
from mlorq.config.run import RunConfig
from mlorq.errors import ConfigError, StoreError
from steps import REGISTRY
from steps.allocations import run_allocations
from steps.base import Outcome, StepSpec
from steps.context import Context
from steps.handles import DataRef, ModelRef, inputs_of, roles_of
from steps.inprocess import InProcess
from steps.measuring import measuring
from steps.pipeline import run_budget, run_pipeline, run_search
from steps.protocol import Description
from steps.session import Session
from tests.steps.test_pipeline import BEST, folder  # noqa: F401  (a fixture)

WIDTHS = {"activations": {"bits": 6, "choices": [4, 6, 8], "compute": "4x6", "samples": 8}}
EVERYTHING = {**BEST, "embeddings": {"bits": 8}}
EXPORT = {"export": [{"to": "dense"}]}


def session(folder: Path, **overrides: Any) -> Session:  # noqa: F811
    config = RunConfig.from_yaml(folder / "run.yaml", {k.replace("__", "."): v for k, v in overrides.items()})
    return Session(config, Store(config.resolve(config.store)))


class Noting(InProcess):
    """Runs steps, and keeps their specs."""

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self.specs: list[StepSpec] = []

    def run(self, spec: StepSpec) -> Outcome:
        self.specs.append(spec)
        return super().run(spec)

    def map(self, specs: Sequence[StepSpec]) -> list[Outcome]:
        return [self.run(spec) for spec in specs]


def specs_of(made: Session, budgets: Sequence[str]) -> list[StepSpec]:
    executor = Noting(made)
    run_pipeline(made, executor, parse_budgets(budgets))
    return executor.specs


def test_records_of_every_step_go_through_a_message_whole(folder, tmp_path_factory):  # noqa: F811
    chosen = {"embeddings": {"bits": "auto"}}
    runs = [EVERYTHING, {**BEST, **WIDTHS, "rounding__tuning": 0}, {"rounding__method": "nearest", **EXPORT, **chosen}]
    specs = [(made, spec) for made in (session(folder, **one) for one in runs) for spec in specs_of(made, ["4bit"])]
    assert {spec.step for _, spec in specs} == set(REGISTRY)
    path = tmp_path_factory.mktemp("message") / "step.json"
    for made, spec in specs:
        step = REGISTRY[spec.step]
        params, inputs = step.read(spec)
        path.write_bytes(Description(spec, made.config).to_bytes())
        read = Description.read(str(path), spec.step).spec
        assert (read.params, read.inputs, read.key) == (spec.params, spec.inputs, spec.key), spec.label
        assert step.read(read) == (params, inputs)
        assert step.ref(*step.read(read)) == spec.ref
        assert type(params) is step.params
        assert type(inputs) is step.inputs
        # Frozen: what a key was made from cannot be changed afterwards.
        for record in (params, inputs):
            for field in dataclasses.fields(record):
                with pytest.raises(dataclasses.FrozenInstanceError):
                    setattr(record, field.name, None)


def reachable(value: Any, seen: set[int], depth: int = 6) -> Iterator[Any]:
    """An object and what its attributes and containers hold; what loads model and data is a function, and is closed."""
    if id(value) in seen or depth == 0 or isinstance(value, (str, bytes, int, float)):
        return
    seen.add(id(value))
    yield value
    parts: list[Any] = list(getattr(value, "__dict__", {}).values())
    parts += list(value.values()) if isinstance(value, dict) else []
    parts += list(value) if isinstance(value, (list, tuple)) else []
    for part in parts:
        yield from reachable(part, seen, depth - 1)


def test_a_step_gets_no_configuration_and_no_session(folder, monkeypatch):  # noqa: F811
    seen: list[str] = []

    def watched(step):
        def run(params, inputs, context, progress):
            assert isinstance(context, Context)
            for found in reachable((params, inputs, context), set()):
                assert not isinstance(found, (RunConfig, Session)), (step.name, type(found))
            seen.append(step.name)
            return step.run(params, inputs, context, progress)

        return replace(step, run=run)

    for name, step in list(REGISTRY.items()):
        monkeypatch.setitem(REGISTRY, name, watched(step))
    specs_of(session(folder, **EVERYTHING, **WIDTHS), ["4bit"])
    specs_of(session(folder, **EXPORT), ["4bit"])  # a state dict cannot represent quantized activations
    assert {"export", "layers", "capture", "round", "reconstruct", "joint", "compressed", "summary"} <= set(seen)


def test_no_step_function_names_the_configuration_or_a_session():
    """What a run is told reaches a step by its parameters alone."""
    for step in REGISTRY.values():
        names = set(step.run.__code__.co_names) | set(step.run.__code__.co_freevars)
        assert not names & {"Session", "RunConfig", "config", "session"}, step.name


def test_another_models_or_other_datas_handle_is_refused(folder):  # noqa: F811
    made = session(folder)
    context = made.worker.context
    assert context.model(made.model_ref) is made.model
    assert context.calibration(made.calibration_ref) is made.calibration
    assert context.evaluation(made.evaluation_ref) is made.evaluation
    other = "0" * 64
    for ask, what in (
        (lambda: context.model(ModelRef(other)), "float model"),
        (lambda: context.model(ModelRef(other, ArtifactRef("activations", other))), "float model"),
        (lambda: context.calibration(DataRef(other)), "calibration data"),
        (lambda: context.evaluation(DataRef(other)), "evaluation data"),
        (lambda: context.calibration(made.evaluation_ref), "calibration data"),
    ):
        with pytest.raises(ConfigError, match=f"asks for the {what} .*, but the configuration gives") as caught:
            ask()
        assert "\n" not in str(caught.value)


def test_inputs_of_another_shape_are_refused():
    ref = ArtifactRef("layers", "a")
    programs = REGISTRY["allocate"].inputs
    inputs = programs({"x": ref, "y.0": ref}, {"x": ref})
    roles = roles_of(inputs)
    assert list(roles) == ["candidates/x", "candidates/y.0", "sensitivity/x"]
    assert inputs_of(programs, roles) == inputs
    step = REGISTRY["compressed"]
    inputs = step.inputs(ModelRef("m"), DataRef("d"), ref, ref, (ref, ref))
    roles = roles_of(inputs)
    assert list(roles)[-2:] == ["rounded/0", "rounded/1"]
    assert inputs_of(step.inputs, roles) == inputs
    with pytest.raises(StoreError, match="'model' is missing"):
        inputs_of(step.inputs, {role: handle for role, handle in roles.items() if role != "model"})
    with pytest.raises(StoreError, match="'model' has type DataRef, not ModelRef"):
        inputs_of(step.inputs, roles | {"model": DataRef("d")})
    with pytest.raises(StoreError, match="unknown input 'model_'"):
        inputs_of(step.inputs, roles | {"model_": ModelRef("m")})


def test_keys_do_not_depend_on_what_the_process_ran_before(folder):  # noqa: F811
    """A budget whose activation widths are chosen, before or after one with others."""
    widths = {**BEST, **WIDTHS}

    def keys(made: Session, budgets: Sequence[str]) -> dict[str, list[str]]:
        """By budget: the specs of its allocation, rounding, checkpoint, evaluation and summary."""
        executor = Noting(made)
        search = run_search(made, executor)
        baseline = ArtifactRef("baseline", "")
        found = {}
        for budget in budgets:
            executor.specs.clear()
            (result,) = run_allocations(made, executor, search, parse_budgets(budget))
            with pytest.raises(StoreError):  # the evaluation, which has no baseline here
                run_budget(made, executor, search, result, baseline)
            found[budget] = [spec.key for spec in executor.specs]
        return found

    alone = keys(session(folder, **widths), ["4bit"]) | keys(session(folder, **widths), ["6bit"])
    assert keys(session(folder, **widths), ["4bit", "6bit"]) == alone
    assert keys(session(folder, **widths), ["6bit", "4bit"]) == alone
    assert not set(alone["4bit"]) & set(alone["6bit"])

    # In one session: after a budget has decided widths, the model as given and the plan of all widths are as before.
    made = session(folder, **widths)
    executor = Noting(made)
    run_pipeline(made, executor, parse_budgets("4bit"))
    first = [spec.key for spec in executor.specs]
    executor.specs.clear()
    run_pipeline(made, executor, parse_budgets("4bit"))
    assert [spec.key for spec in executor.specs] == first
    plain = [spec.key for spec in specs_of(session(folder, **BEST), ["4bit"])]
    again = Session(session(folder, **BEST).config, made.store, model=made.model, calibration=made.calibration)
    assert [spec.key for spec in specs_of(again, ["4bit"])] == plain


def test_held_out_samples_are_those_nothing_was_fitted_to(folder):  # noqa: F811
    fitted, paper = session(folder, **BEST), session(folder)
    layers = run_search(paper, InProcess(paper)).layers
    grouped = replace(layers[0], groups=2)
    assert measuring(fitted, layers).held_out
    assert measuring(fitted, [layers[0]]).held_out
    assert not measuring(fitted, [grouped]).held_out  # fitted under its Hessian
    assert measuring(fitted, [grouped, layers[1]]).held_out
    assert not measuring(paper, layers).held_out
    batches, labels = measuring(fitted, layers).of(fitted.calibration)
    everything = measuring(paper, layers).of(paper.calibration)[0]
    assert sum(len(batch) for batch in batches) == 6  # every other of 12
    assert sum(len(batch) for batch in everything) == 8
    assert labels is None
