"""Commands that read results: checkpoints, finished runs, known models."""

from __future__ import annotations

import difflib
import os
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from flows.command_tools import check_output, named_store, print_json, read_arguments, shown
from flows.completion_values import target_options, targets
from flows.options import (
    PATH,
    Arguments,
    Finish,
    checkpoint_argument,
    command,
    configured,
    json_option,
    settings,
    stored,
)
from flows.verbosity import say
from mlorq.artifacts.locations import resolve_location
from mlorq.errors import ConfigError, StoreError, hide_secrets

if TYPE_CHECKING:
    from mlorq.artifacts.store import Store
    from steps.session import Session


@command
@checkpoint_argument
@configured
@json_option
def evaluate(arguments: Arguments) -> Finish:
    """Measure a checkpoint."""
    from flows.run import open_session
    from mlorq.checkpoint.io import inspect as inspect_checkpoint

    config = read_arguments(arguments)
    hashes = inspect_checkpoint(arguments.checkpoint)["hashes"]
    session = open_session(config)
    if hashes.get("model") not in (None, session.model.key):
        say("note: the checkpoint was made from a float model other than the configuration's")
    result = _measure(arguments.checkpoint, session)

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


def _measure(checkpoint: str, session: Session) -> dict[str, Any]:
    """Metrics and output NMSE of a checkpoint, with the metrics of the float model, which the store keeps."""
    import torch

    from flows.progress import terminal_progress
    from mlorq.artifacts.schemas import table_matrix
    from mlorq.checkpoint.io import load
    from mlorq.evaluation.outputs import model_outputs, output_nmse
    from steps import baseline
    from steps.base import execute

    model = session.model
    module = load(checkpoint, model=None if model.rebuilds else model.module, device=session.device)
    observer = terminal_progress()
    spec = baseline.spec(session)
    observer.phase("baseline", 1)
    try:
        observer.step_started(spec)
        outcome = execute(spec, session.worker, lambda done, total: observer.step_progress(spec, done, total))
        observer.step_finished(spec, outcome)
    finally:
        observer.close()
    data = baseline.nmse_data(session)
    session.worker.context.use_threads()
    outputs = model_outputs(model, module, data.batches, device=session.device)
    reference = table_matrix(session.artifacts.table(outcome.ref, "outputs.parquet"), "output")
    float_info = session.artifacts.json(outcome.ref, "metrics.json")
    compressed = baseline.measure(session.evaluation, outputs, module)
    name = float_info["name"] or next(iter(compressed), None)
    return {
        "checkpoint": checkpoint,
        "nmse": output_nmse(outputs, torch.from_numpy(reference.copy())),
        "nmse_data": "evaluation" if session.evaluation.batches else "calibration",
        "metric": None
        if name is None
        else {"name": name, "float": float_info["metrics"].get(name), "compressed": compressed.get(name)},
        "metrics": {"float": float_info["metrics"], "compressed": compressed},
    }


@command
@checkpoint_argument
@json_option
def inspect(arguments: Arguments) -> Finish:
    """Show what a checkpoint holds."""
    from mlorq.checkpoint.io import inspect as inspect_checkpoint

    info = inspect_checkpoint(arguments.checkpoint)

    def finish() -> int:
        from flows.render import console
        from flows.render_checkpoint import print_checkpoint

        if arguments.json:
            print_json(info)
        else:
            print_checkpoint(info, console())
        return 0

    return finish


@command
@checkpoint_argument
@click.option(
    "--to", metavar="TARGET", help="default: the target for the file extension of --output", shell_complete=targets
)
@click.option("--output", required=True, metavar="PATH", type=PATH, help="file or folder to write, or its fsspec URL")
@click.option(
    "--precision",
    type=click.Choice(["exact", "fast"]),
    help="of graphs: the outputs of mlorq.load, or products by 8-bit integers (the NMSE that they add is printed)",
)
@click.option(
    "--option",
    multiple=True,
    callback=settings,
    metavar="KEY=VALUE",
    help="an option of the target (the value is YAML); can be repeated",
    shell_complete=target_options,
)
@json_option
def export(arguments: Arguments) -> Finish:
    """Convert a checkpoint to files of another format."""
    from mlorq.config.bounded import read_value
    from mlorq.export_targets import export as write
    from mlorq.export_targets.base import target_of

    options = {key: read_value(text, f"--option {key}={shown(text)}: the value") for key, text in arguments.option}
    if arguments.precision is not None:
        options["precision"] = arguments.precision
    files = write(arguments.checkpoint, arguments.output, arguments.to, **options)
    target = target_of(arguments.output, arguments.to)
    summary = target.summary(files)

    def finish() -> int:
        from flows.render import figure_lines

        if arguments.json:
            print_json({"checkpoint": arguments.checkpoint, "files": files, **summary})
        else:
            print("\n".join([*files, *figure_lines(summary, target.meanings)]))
        return 0

    return finish


@command
@stored
@json_option
def runs(arguments: Arguments) -> Finish:
    """List finished runs and allocations alone, oldest first; damaged ones are reported at the end."""
    from flows.stored_runs import SHOWN, allocations, finished_runs

    store = named_store(arguments)
    damaged: list[str] = []
    finished = list(finished_runs(store, damaged))
    found = [
        {key: run[key] for key in SHOWN} | {"created": (store.manifest(ref) or {}).get("created", "")}
        for ref, run in finished
    ]
    found.sort(key=lambda run: str(run["created"]))
    alone = allocations(store, [run for _, run in finished], damaged)

    def finish() -> int:
        from flows.render import console, print_allocations, print_runs

        if arguments.json:
            print_json({"store": hide_secrets(store.url), "runs": found, "allocations": alone})
        else:
            print_runs(found, console())
            print_allocations(alone, console())
        if damaged:
            raise StoreError("; ".join(damaged))
        return 0

    return finish


@command
@click.argument("run", metavar="RUN")
@stored
@click.option("--output", metavar="FILE.html", type=PATH, help="write the report as one self-contained page")
@click.option(
    "--benchmark",
    metavar="FILE.json",
    type=PATH,
    help="show this result of mlorq benchmark on the page (see its --output)",
)
@json_option
def report(arguments: Arguments) -> Finish:
    """Print where a run's page and picture are, or write one page that compares it with the runs of the same model."""
    from flows.page import PAGE, keep_page, known_made, made_of, page_parts, page_ref
    from flows.stored_runs import finished_runs
    from mlorq.evaluation.page import render_report
    from mlorq.evaluation.report import Measured
    from mlorq.runtimes.benchmark import legend, picture, read_result, table

    if arguments.output is not None:
        check_output(os.path.dirname(arguments.output) or ".")
    elif arguments.benchmark is not None:
        raise ConfigError("--benchmark: add --output FILE.html, the page that shows it")
    measured = None if arguments.benchmark is None else read_result(arguments.benchmark)
    store = named_store(arguments)
    damaged: list[str] = []
    known = {run["run"]: (ref, run) for ref, run in finished_runs(store, damaged)}
    for line in damaged:
        say(f"note: {line}")
    if arguments.run not in known:
        raise _no_run(arguments.run, store, [run for _, run in known.values()])
    ref, result = known[arguments.run]
    if measured is not None and measured.get("description") != _description_digest(store, result):
        raise ConfigError(f"benchmark {arguments.benchmark} is of another checkpoint than that of run {arguments.run}")
    # Runs with the same baseline have the same float model and evaluation data, and are comparable.
    same = [run for _, run in known.values() if run["artifacts"]["baseline"] == result["artifacts"]["baseline"]]
    page = keep_page(store, ref, result) if arguments.output is None else page_ref(ref)
    found = {
        "run": result["run"],
        "page": store.uri(page, PAGE) if store.exists(page) else None,
        "picture": store.uri(ref, "report.png"),
        "compared_with": sorted(run["run"] for run in same if run is not result),
        "output": arguments.output,
        "benchmark": arguments.benchmark,
    }
    if arguments.output is not None:
        shown = None if measured is None else Measured(picture(measured), table(measured), legend(measured))
        made = made_of(store, ref, result, known_made(store, ref))
        parts = page_parts(store, ref, result)
        write_file(arguments.output, render_report(result, **parts, runs=same, made=made, measured=shown))

    def finish() -> int:
        if arguments.json:
            print_json(found)
        else:
            print(arguments.output or f"{found['page']}\n{found['picture']}")
        return 0

    return finish


def _no_run(name: str, store: Store, finished: Sequence[dict[str, Any]]) -> StoreError:
    """The error for a name that is not that of a finished run; an allocation is told apart by its key alone."""
    from flows.stored_runs import allocations

    alone = allocations(store, finished, [])
    for row in alone:
        if name.rpartition("-")[2] == row["run"].rpartition("-")[2]:
            budget = shlex.quote(row["budget"])
            return StoreError(
                f"{name!r} is an allocation alone, with a predicted cost of {row['predicted_cost']:.4e} and nothing "
                f"measured; mlorq rebudget CONFIG --budget {budget} makes the model and its report"
            )
    names = [row["run"] for row in (*finished, *alone)]
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return StoreError(f"no run {name!r} in the store {hide_secrets(store.url)} (see mlorq runs){hint}")


def _description_digest(store: Store, result: dict[str, Any]) -> str:
    """The digest of ``mlorq.json`` in a run's checkpoint."""
    from mlorq.artifacts.store import ArtifactRef
    from mlorq.checkpoint.places import DESCRIPTION
    from mlorq.checkpoint.tensor_file import digest

    return digest(store.read_bytes(ArtifactRef.from_json(result["artifacts"]["checkpoint"]), DESCRIPTION))


def write_file(location: str, data: bytes) -> None:
    """Write a file, or to an fsspec URL.

    Raises:
        StoreError: it cannot be written.
    """
    import fsspec

    from mlorq.artifacts.transfer import os_errors

    try:
        with os_errors(), fsspec.open(resolve_location(location, os.getcwd()), "wb") as file:
            file.write(data)
    except (OSError, ImportError) as error:
        raise StoreError(f"{location} cannot be written: {error}") from error
