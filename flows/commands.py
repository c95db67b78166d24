"""Commands that compute. Each returns a function that prints the result and returns the exit status."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from flows.command_tools import check_output, overrides_of, print_json, read_arguments
from flows.completion_values import methods
from flows.options import PATH, Arguments, Finish, RegistryOption, budgeted, command, configured, json_option
from flows.verbosity import complain, say
from mlorq.errors import ConfigError

if TYPE_CHECKING:
    from mlorq.config.budget import Budget
    from mlorq.config.run import RunConfig

ASKED = ("max_drop", "min_metric", "max_metric", "metric")  # of ``sweep``: the metric to keep

# -- compress and rebudget --------------------------------------------------------------------------------------


@command
@configured
@budgeted
@click.option("--output", metavar="DIR", type=PATH, help="copy the checkpoint to this folder or fsspec URL")
@click.option("--dry-run", is_flag=True, help="show what a run would do, and do nothing")
@json_option
def compress(arguments: Arguments) -> Finish:
    """The full flow, or a dry run of it."""
    config = read_arguments(arguments)
    budgets = _budgets(arguments, config)
    if arguments.dry_run:
        return _dry_run(arguments, config, budgets)
    if arguments.output is not None:
        check_output(arguments.output)
    found = _flow(arguments, config, budgets)
    results: list[dict[str, Any]] = found["results"]
    if len(results) == 1:
        results[0] |= {"wall_seconds": found["wall_seconds"]}

    def finish() -> int:
        if arguments.json:
            print_json(results[0] if len(results) == 1 else found)
        else:
            _print_results(results, found["wall_seconds"], config=config)
        return 0

    return finish


@command
@configured
@budgeted
@click.option(
    "--allocate-only",
    is_flag=True,
    help="solve the integer programs only, without loading the model; without Prefect if PREFECT_API_URL is not set",
)
@json_option
def rebudget(arguments: Arguments) -> Finish:
    """Further budgets for a searched model."""
    config = read_arguments(arguments)
    budgets = _budgets(arguments, config)
    # Starting the embedded server takes longer than solving the integer programs: without a configured server they
    # run directly, with the same steps and store.
    if arguments.allocate_only and not os.environ.get("PREFECT_API_URL"):
        from flows.allocate_only import allocate_only

        found = allocate_only(config, budgets, _command(arguments))
    else:
        found = _flow(arguments, config, budgets)
    errors = [row["error"] for row in found.get("errors", ())]

    def finish() -> int:
        if arguments.json:
            print_json(found)
        else:
            _print_results(found["results"], found["wall_seconds"], config=config)
        for error in errors:
            complain(f"error: {error}")
        return 2 if errors else 0

    return finish


@command
@configured
@budgeted
@click.option(
    "--max-drop",
    metavar="D",
    help="find the smallest model whose metric is at most this much worse than the float model's: 1% of it, or 0.01",
)
@click.option("--min-metric", type=float, metavar="X", help="find the smallest model whose metric is at least X")
@click.option("--max-metric", type=float, metavar="X", help="the same for metrics of which less is better: at most X")
@click.option("--metric", metavar="NAME", help="the metric to keep; default: the main one of the evaluation data")
@click.option("--output", metavar="DIR", type=PATH, help="write the curve to this folder: picture, page and table")
@json_option
def sweep(arguments: Arguments) -> Finish:
    """Several budgets and the size-accuracy curve; or the smallest model that keeps a metric."""
    from mlorq.config.budget import parse_budgets
    from steps.smallest import Keep

    config = read_arguments(arguments)
    budgets = parse_budgets(arguments.budget) if arguments.budget else None
    keep = Keep.of(vars(arguments))
    if keep is not None and budgets:
        raise ConfigError(f"{keep}: the budget is what is looked for: leave out --budget")
    if arguments.output is not None:
        check_output(arguments.output)
    found = _flow(arguments, config, budgets)
    if arguments.output is not None:
        from flows.sweep import curve_files

        found["output"] = _written(curve_files(found["results"], found.get("smallest")), arguments.output)

    def show() -> None:
        from flows.render import console, print_budgets
        from flows.sweep import found_line

        print_budgets(found["results"], console())
        if "smallest" in found:
            console().print(found_line(found["smallest"]), markup=False, soft_wrap=True)

    return _finish(arguments, found, show, found["curve"])


def _about_methods() -> str:
    from flows.comparison_methods import known_methods

    known = known_methods()
    shown = ", ".join(name for name, method in known.items() if method.shown)
    return f"of {', '.join(known)}; default: {shown}"


@command
@configured
@budgeted
@click.option(
    "--methods",
    metavar="M,M",
    cls=RegistryOption,
    about=_about_methods,
    shell_complete=methods,
)
@click.option("--activations", type=int, metavar="BITS", help="bit-width of activations")
@click.option("--output", metavar="DIR", type=PATH, help="write the table to this folder: Parquet, page and JSON")
@json_option
def compare(arguments: Arguments) -> Finish:
    """Compare several methods on one model."""
    from flows.comparison_methods import chosen

    config = read_arguments(arguments)
    budgets = _budgets(arguments, config)
    chosen(_names(arguments))
    if arguments.activations is not None and not 2 <= arguments.activations <= 8:
        raise ConfigError(f"--activations {arguments.activations}: the bit-width must be from 2 to 8")
    if arguments.output is not None:
        check_output(arguments.output)
    found = _flow(arguments, config, budgets)
    if arguments.output is not None:
        from flows.compare import table_files

        found["output"] = _written(table_files(found["rows"]), arguments.output)

    def show() -> None:
        from flows.comparison import notes
        from flows.render import console, print_comparison

        print_comparison(found["rows"], console())
        for note in notes(found["rows"]):
            console().print(note, markup=False, soft_wrap=True)

    return _finish(arguments, found, show, found["files"])


def _written(files: dict[str, bytes], folder: str) -> list[str]:
    """Write files into a folder; returns their locations."""
    from mlorq.checkpoint.io import save

    save(files, folder)
    return [f"{folder.rstrip('/')}/{name}" for name in files]


def _finish(
    arguments: Arguments, found: dict[str, Any], show: Callable[[], None], stored: dict[str, str] | None
) -> Finish:
    """Print a result of several runs, and the locations of its files: in the output folder, or else in the store."""

    def finish() -> int:
        from flows.render import console

        if arguments.json:
            print_json(found)
            return 0
        show()
        for location in found.get("output") or (stored or {}).values():
            console().print(location, markup=False, soft_wrap=True)
        return 0

    return finish


def _names(arguments: Arguments) -> list[str] | None:
    if arguments.methods is None:
        return None
    return [name.strip() for name in arguments.methods.split(",") if name.strip()]


def _budgets(arguments: Arguments, config: RunConfig) -> list[Budget]:
    from mlorq.config.budget import parse_budgets

    budgets = parse_budgets(arguments.budget) if arguments.budget else config.budgets
    if not budgets:
        raise ConfigError("budget: none is given; set one in the configuration or with --budget")
    return budgets


def _command(arguments: Arguments) -> str:
    """The command line that computes the steps that ``--allocate-only`` needs."""
    import shlex

    changed = [f"--set {shlex.quote(f'{key}={text}')}" for key, text in arguments.set]
    return " ".join(["mlorq compress", shlex.quote(str(arguments.config)), *changed])


def _flow(arguments: Arguments, config: RunConfig, budgets: list[Budget] | None) -> dict[str, Any]:
    """Run the command's flow on the configured Prefect server, or on an embedded one."""
    from flows.server import PrefectSession

    allocate_only = bool(getattr(arguments, "allocate_only", False))
    with PrefectSession() as prefect:
        # The embedded server starts while the model is loaded.
        from flows.comparison import plan
        from flows.comparison_methods import chosen
        from flows.progress import terminal_progress
        from flows.run import Handed, handing, prepare

        sweeping = arguments.command == "sweep"
        own_checks = sweeping or arguments.command == "compare"  # these check budgets themselves
        session = prepare(config, [] if own_checks else budgets or [], allocate_only=allocate_only)
        from flows.compare import compare_flow
        from flows.compress import compress_flow
        from flows.rebudget import rebudget_flow
        from flows.sweep import ladder, left_out_note, sweep_flow

        asked = {name: getattr(arguments, name, None) for name in ASKED}
        searching = any(value is not None for value in asked.values())  # for the budget
        if sweeping and not searching:
            budgets, left_out = ladder(session, budgets)
            if left_out:
                say(left_out_note(left_out))
        values = config.model_dump(mode="json")
        if arguments.command == "compare":
            from mlorq.config.run import location_and_folder, read_values

            # Without the preset's defaults: each method has its own preset.
            values = read_values(location_and_folder(arguments.config)[0], overrides_of(arguments))
            plan(session, values, budgets or [], chosen(_names(arguments)), arguments.activations)
        prefect.ready()
        budgets = budgets or []
        shown = [budget.text for budget in budgets]
        observer, record = terminal_progress(), prefect.expect
        given = Handed(session, budgets, observer, _command(arguments), record, arguments.interrupted)
        with session.in_use(), handing(given):
            if arguments.command == "compress":
                found: dict[str, Any] = compress_flow(values, config.folder, shown)
                if arguments.output is not None:  # as long as nobody removes them
                    _copy_checkpoints(config, arguments.output, found["results"])
                return found
            if arguments.command == "compare":
                return compare_flow(values, config.folder, shown, _names(arguments), arguments.activations)
            if sweeping:
                return sweep_flow(values, config.folder, None if searching else shown, **asked)
            return rebudget_flow(values, config.folder, shown, allocate_only)


def _print_results(results: Sequence[dict[str, Any]], wall_seconds: float, *, config: RunConfig) -> None:
    from flows.progress import format_seconds
    from flows.render import console, print_result
    from mlorq.models.family import FAMILIES

    out = console()
    instance = "" if FAMILIES[config.model.family].rebuilds else ", model=instance"
    for result in results:
        load = None
        if result["checkpoint"]:
            location = str(result.get("output") or result["checkpoint"]).removeprefix("file://")
            load = f'model = mlorq.load("{location}"{instance})'
        print_result(result, out, load=load)
        out.print()
    out.print(f"took {format_seconds(wall_seconds)}", markup=False)


def _copy_checkpoints(config: RunConfig, location: str, results: Sequence[dict[str, Any]]) -> None:
    """Copy one checkpoint to ``location``; several to subfolders named after the budgets."""
    from mlorq.artifacts.store import ArtifactRef
    from mlorq.checkpoint.io import save
    from steps.artifacts import ArtifactReader
    from steps.session import open_store

    artifacts = ArtifactReader(open_store(config))

    for result in results:
        target = location if len(results) == 1 else f"{location.rstrip('/')}/{result['budget'].replace(' ', '')}"
        ref = ArtifactRef.from_json(result["artifacts"]["checkpoint"])
        save(artifacts.files(ref), target)
        result["output"] = target


def _dry_run(arguments: Arguments, config: RunConfig, budgets: list[Budget]) -> Finish:
    from flows.dry_run import make_plan
    from flows.run import check_budgets, known_layers, open_session

    session = open_session(config, to_estimate=True)
    layers = known_layers(session)
    plan = make_plan(session, layers, budgets)

    def finish() -> int:
        from flows.render import console, print_plan

        if arguments.json:
            print_json(plan)
        else:
            print_plan(plan, console())
        check_budgets(session, layers, budgets)
        return 0

    return finish
