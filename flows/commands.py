"""One function a command: does the work and returns what prints the result and gives the exit status."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from flows.store_commands import named_store
from mlorq.config import RunConfig, resolve_location
from mlorq.errors import CheckpointError, ConfigError, MlorqError, StoreError

if TYPE_CHECKING:
    from mlorq.store import ArtifactRef, Store
    from steps.workbench import Workbench

Finish = Callable[[], int]


def print_json(value: Any) -> None:
    """One JSON object on standard output."""
    print(json.dumps(value, indent=1, ensure_ascii=False))


def _read_config(arguments: argparse.Namespace) -> RunConfig:
    overrides = {}
    for key, text in arguments.set:
        try:
            overrides[key] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {key}={text}: the value is not YAML: {error}") from None
    return RunConfig.from_yaml(arguments.config, overrides)


def _say(text: str) -> None:
    print(f"mlorq: {text}", file=sys.stderr)


# -- init -------------------------------------------------------------------------------------------------------


def init(arguments: argparse.Namespace) -> Finish:
    """Write or print a configuration."""
    from flows.template import template

    text = template(arguments.model)
    if arguments.path is None:

        def finish() -> int:
            print(text, end="")
            return 0

        return finish
    path = Path(arguments.path)
    try:
        with path.open("x") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(f"{path} exists already; it is not overwritten") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error}") from error
    _say(f"wrote {path}; next: mlorq compress {path} --dry-run")
    return lambda: 0


# -- compress and rebudget --------------------------------------------------------------------------------------


def compress(arguments: argparse.Namespace) -> Finish:
    """The full flow, or a dry run of it."""
    config = _read_config(arguments)
    budgets = _budgets(arguments, config)
    if arguments.dry_run:
        return _dry_run(arguments, config, budgets)
    if arguments.output is not None:
        _check_output(arguments.output)
    found = _flow(arguments, config, budgets)
    results: list[dict[str, Any]] = found["results"]
    if arguments.output is not None:
        _copy_checkpoints(arguments.output, results)
    if len(results) == 1:
        results[0] |= {"wall_seconds": found["wall_seconds"]}

    def finish() -> int:
        if arguments.json:
            print_json(results[0] if len(results) == 1 else found)
        else:
            _print_results(results, found["wall_seconds"], custom=config.model.family == "custom")
        return 0

    return finish


def rebudget(arguments: argparse.Namespace) -> Finish:
    """Further budgets."""
    config = _read_config(arguments)
    budgets = _budgets(arguments, config)
    # The embedded server takes longer to start than the integer programs to solve: with none configured, they are
    # run directly. The steps and the store are the same.
    if arguments.allocate_only and not os.environ.get("PREFECT_API_URL"):
        found = _allocate_only(arguments, config, budgets)
    else:
        found = _flow(arguments, config, budgets)

    def finish() -> int:
        if arguments.json:
            print_json(found)
        else:
            _print_results(found["results"], found["wall_seconds"], custom=config.model.family == "custom")
        return 0

    return finish


def sweep(arguments: argparse.Namespace) -> Finish:
    """A ladder of budgets and its size-accuracy curve."""
    from mlorq.memory import parse_budget

    config = _read_config(arguments)
    for budget in arguments.budget or []:
        parse_budget(budget)
    if arguments.output is not None:
        _check_output(arguments.output)
    found = _flow(arguments, config, arguments.budget)
    if arguments.output is not None:
        from flows.sweep import curve_files
        from mlorq.checkpoint import save

        files = curve_files(found["results"])
        save(files, arguments.output)
        found["output"] = [f"{arguments.output.rstrip('/')}/{name}" for name in files]

    def finish() -> int:
        from flows.render import console, print_budgets

        if arguments.json:
            print_json(found)
            return 0
        out = console()
        print_budgets(found["results"], out)
        for location in found.get("output") or (found["curve"] or {}).values():
            out.print(location, markup=False, soft_wrap=True)
        return 0

    return finish


def _budgets(arguments: argparse.Namespace, config: RunConfig) -> list[str]:
    from mlorq.memory import parse_budget

    budgets = list(arguments.budget or config.budgets)
    if not budgets:
        raise ConfigError("budget: none is given")
    for budget in budgets:
        parse_budget(budget)
    return budgets


def _command(arguments: argparse.Namespace) -> str:
    """The command line that computes what ``--allocate-only`` misses."""
    import shlex

    changed = [f"--set {shlex.quote(f'{key}={text}')}" for key, text in arguments.set]
    return " ".join(["mlorq compress", shlex.quote(str(arguments.config)), *changed])


def _flow(arguments: argparse.Namespace, config: RunConfig, budgets: list[str] | None) -> dict[str, Any]:
    """Run the command's flow on a configured Prefect server or an embedded one."""
    from flows.server import PrefectSession

    allocate_only = bool(getattr(arguments, "allocate_only", False))
    with PrefectSession(verbose=arguments.verbose) as session:
        # The embedded server comes up while this loads the model.
        from flows.progress import terminal_progress
        from flows.run import Handed, handing, prepare

        sweeping = arguments.command == "sweep"
        bench = prepare(config, [] if sweeping else budgets or [], allocate_only=allocate_only)
        from flows.compress import compress_flow
        from flows.rebudget import rebudget_flow
        from flows.sweep import ladder, sweep_flow

        if sweeping:
            budgets, left_out = ladder(bench, budgets)
            if left_out:
                _say(f"left out, smaller than the model can be made: {', '.join(left_out)}")
        session.ready()
        values = config.model_dump(mode="json")
        with handing(Handed(bench, terminal_progress(), _command(arguments), session.expect, arguments.interrupted)):
            if arguments.command == "compress":
                return compress_flow(values, config.folder, budgets)
            if sweeping:
                return sweep_flow(values, config.folder, budgets)
            return rebudget_flow(values, config.folder, budgets, allocate_only)


def _allocate_only(arguments: argparse.Namespace, config: RunConfig, budgets: list[str]) -> dict[str, Any]:
    from contextlib import closing

    from flows.progress import terminal_progress
    from flows.run import AllocateOnly, prepare, results_json
    from steps.pipeline import run_pipeline

    started = time.perf_counter()
    bench = prepare(config, budgets, allocate_only=True)
    with closing(terminal_progress()) as observer:
        executor = AllocateOnly(bench, observer, _command(arguments))
        results = run_pipeline(bench, executor, budgets, allocate_only=True)
    return results_json(bench, executor.ledger, results, started)


def _print_results(results: Sequence[dict[str, Any]], wall_seconds: float, *, custom: bool) -> None:
    from flows.progress import format_seconds
    from flows.render import console, print_result

    out = console()
    for result in results:
        load = None
        if result["checkpoint"]:
            location = str(result.get("output") or result["checkpoint"]).removeprefix("file://")
            instance = ", model=instance" if custom else ""
            load = f'model = mlorq.load("{location}"{instance})'
        print_result(result, out, load=load)
        out.print()
    out.print(f"took {format_seconds(wall_seconds)}", markup=False)


def _check_output(location: str) -> None:
    """Refuse a folder that cannot be written before hours of work."""
    from mlorq.store import Store

    try:
        Store(resolve_location(location, os.getcwd())).check_writable()
    except StoreError as error:
        raise CheckpointError(f"--output {location} cannot be written: {error.__cause__ or error}") from error


def _copy_checkpoints(location: str, results: Sequence[dict[str, Any]]) -> None:
    """Copy one checkpoint to ``location``, several to folders in it that are named after the budgets."""
    import fsspec

    from mlorq.checkpoint import CONFIG, TENSORS, save

    for result in results:
        target = location if len(results) == 1 else f"{location.rstrip('/')}/{result['budget'].replace(' ', '')}"
        files = {}
        for name in (TENSORS, CONFIG):
            with fsspec.open(f"{result['checkpoint']}/{name}", "rb") as file:
                files[name] = file.read()
        save(files, target)
        result["output"] = target


def _dry_run(arguments: argparse.Namespace, config: RunConfig, budgets: list[str]) -> Finish:
    from flows.plan import make_plan
    from flows.run import check_budgets, known_layers, open_bench

    bench = open_bench(config)
    layers = known_layers(bench)
    plan = make_plan(bench, layers, budgets)

    def finish() -> int:
        from flows.render import console, print_plan

        if arguments.json:
            print_json(plan)
        else:
            print_plan(plan, console())
        check_budgets(bench, layers, budgets)
        return 0

    return finish


# -- looking at results -----------------------------------------------------------------------------------------


def evaluate(arguments: argparse.Namespace) -> Finish:
    """Measure a checkpoint."""
    from flows.run import open_bench
    from mlorq.checkpoint import inspect as inspect_checkpoint

    config = _read_config(arguments)
    hashes = inspect_checkpoint(arguments.checkpoint)["hashes"]
    bench = open_bench(config)
    if hashes.get("model") not in (None, bench.model.key):
        _say("note: the checkpoint was made from another float model than the configuration's")
    result = _measure(arguments.checkpoint, bench)

    def finish() -> int:
        from flows.render import console, facts

        if arguments.json:
            print_json(result)
            return 0
        pairs = [("checkpoint", result["checkpoint"]), ("output NMSE", f"{result['nmse']:.6f}")]
        for name, value in result["metrics"]["compressed"].items():
            before = result["metrics"]["float"].get(name, float("nan"))
            pairs.append((name, f"float {before:.4f}, compressed {value:.4f}"))
        console().print(facts(pairs))
        return 0

    return finish


def _measure(checkpoint: str, bench: Workbench) -> dict[str, Any]:
    """A checkpoint's metrics and NMSE beside the float model's, which are kept in the store."""
    import torch

    from flows.progress import terminal_progress
    from mlorq.checkpoint import load
    from mlorq.evaluate import model_outputs, output_nmse
    from mlorq.tables import table_matrix
    from steps import baseline
    from steps.base import execute

    model = bench.model
    module = load(checkpoint, model=model.module if model.family == "custom" else None, device=bench.device)
    observer = terminal_progress()
    spec = baseline.spec(bench)
    observer.phase("baseline", 1)
    try:
        observer.step_started(spec)
        outcome = execute(spec, bench, lambda done, total: observer.step_progress(spec, done, total))
        observer.step_finished(spec, outcome)
    finally:
        observer.close()
    data = baseline.nmse_data(bench)
    bench.use_threads()
    outputs = model_outputs(model, module, data.batches, device=bench.device)
    reference = torch.from_numpy(table_matrix(bench.store.read_table(outcome.ref, "outputs.parquet"), "output").copy())
    float_info = bench.store.read_json(outcome.ref, "metrics.json")
    compressed = baseline.measure(bench.evaluation, outputs, module)
    name = float_info["name"] or next(iter(compressed), None)
    return {
        "checkpoint": checkpoint,
        "nmse": output_nmse(outputs, reference),
        "nmse_data": "evaluation" if bench.evaluation.batches else "calibration",
        "metric": None
        if name is None
        else {"name": name, "float": float_info["metrics"].get(name), "compressed": compressed.get(name)},
        "metrics": {"float": float_info["metrics"], "compressed": compressed},
    }


def inspect(arguments: argparse.Namespace) -> Finish:
    """Show what a checkpoint holds."""
    from mlorq.checkpoint import inspect as inspect_checkpoint

    info = inspect_checkpoint(arguments.checkpoint)

    def finish() -> int:
        from flows.render import console, print_checkpoint

        if arguments.json:
            print_json(info)
        else:
            print_checkpoint(info, console())
        return 0

    return finish


def runs(arguments: argparse.Namespace) -> Finish:
    """List finished runs, oldest first; damaged ones are named at the end."""
    store = named_store(arguments)
    found, damaged = [], []
    sizes = ("budget_bytes", "bytes", "file_bytes", "float_bytes")
    keys = ("run", "model", "budget", *sizes, "nmse", "metric", "checkpoint")
    for ref in store.refs("summary"):
        try:
            run = store.read_json(ref, "run.json")
            created = (store.manifest(ref) or {}).get("created", "")
            found.append({key: run[key] for key in keys} | {"created": created})
        except (MlorqError, KeyError) as error:
            damaged.append(str(error))
    found.sort(key=lambda run: str(run["created"]))

    def finish() -> int:
        from flows.render import console, print_runs

        if arguments.json:
            print_json({"store": store.url, "runs": found})
        else:
            print_runs(found, console())
        if damaged:
            raise StoreError("; ".join(damaged))
        return 0

    return finish


def report(arguments: argparse.Namespace) -> Finish:
    """Where a run's page and picture are, or one page of it, with its place among the runs of the same model."""
    from mlorq.report import render_report, size_accuracy_picture

    if arguments.output is not None:
        _check_output(os.path.dirname(arguments.output) or ".")
    store = named_store(arguments)
    known = {run["run"]: (ref, run) for ref, run in _results(store)}
    if arguments.run not in known:
        near = difflib.get_close_matches(arguments.run, known, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise StoreError(f"no run {arguments.run!r} in the store {store.url} (see mlorq runs){hint}")
    ref, result = known[arguments.run]
    # The float model's evaluation is one of a model and of evaluation data: who shares it can be compared.
    same = [run for _, run in known.values() if run["artifacts"]["baseline"] == result["artifacts"]["baseline"]]
    found = {
        "run": result["run"],
        "page": store.uri(ref, "report.html"),
        "picture": store.uri(ref, "report.png"),
        "compared_with": sorted(run["run"] for run in same if run is not result),
        "output": arguments.output,
    }
    if arguments.output is not None:
        title = f"{result['model']}: {result['run']} (orange) among {len(same)} runs"
        curve = size_accuracy_picture(same, title, highlight=result["run"]) if len(same) > 1 else None
        _write_file(arguments.output, render_report(result, store.read_bytes(ref, "report.png"), curve))

    def finish() -> int:
        if arguments.json:
            print_json(found)
        else:
            print(arguments.output or f"{found['page']}\n{found['picture']}")
        return 0

    return finish


def _results(store: Store) -> Iterator[tuple[ArtifactRef, dict[str, Any]]]:
    """Result objects of the store's runs; damaged ones are told about and left out."""
    for ref in store.refs("summary"):
        try:
            yield ref, store.read_json(ref, "run.json")
        except MlorqError as error:
            _say(f"note: {error}")


def _write_file(location: str, data: bytes) -> None:
    import fsspec

    try:
        with fsspec.open(resolve_location(location, os.getcwd()), "wb") as file:
            file.write(data)
    except OSError as error:
        raise StoreError(f"{location} cannot be written: {error}") from error


def models(arguments: argparse.Namespace) -> Finish:
    """List models that are known to work."""
    from mlorq.models import known_models

    rows = known_models()

    def finish() -> int:
        from flows.render import console, grid

        if arguments.json:
            print_json({"models": rows})
        else:
            columns = tuple(rows[0])
            console().print(grid(columns, [tuple(row[name] for name in columns) for row in rows]))
        return 0

    return finish
