"""Command ``benchmark``: a checkpoint against the float model, by runtime."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from flows.command_tools import check_output, print_json
from flows.completion_values import runtimes
from flows.options import PATH, Arguments, Finish, command, json_option
from flows.verbosity import say, verbosity
from mlorq.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console


@command
@click.argument("checkpoint", metavar="CHECKPOINT", type=PATH)
@click.option(
    "--runtime",
    multiple=True,
    metavar="NAME",
    help="can be repeated; default: all that are installed",
    shell_complete=runtimes,
)
@click.option(
    "--batch", multiple=True, type=int, metavar="N", help="samples in a batch; can be repeated; default: 1 and 32"
)
@click.option("--threads", type=int, default=1, metavar="N", show_default=True, help="threads of a runtime")
@click.option("--turns", type=int, default=5, metavar="N", show_default=True, help="cold processes per model")
@click.option("--seconds", default=1.0, metavar="S", show_default=True, help="time for the calls of one batch")
@click.option("--output", metavar="FILE.json", type=PATH, help="write the result, for mlorq report --benchmark")
@click.option("--picture", metavar="FILE.png", type=PATH, help="write a picture of memory and time")
@json_option
def benchmark(arguments: Arguments) -> Finish:
    """Measure bytes, memory and time of a checkpoint in cold processes."""
    from mlorq.runtimes import RUNTIMES
    from mlorq.runtimes.benchmark import benchmark as measure
    from mlorq.runtimes.benchmark import picture

    names = arguments.runtime or _installed(RUNTIMES)
    batches = arguments.batch or [1, 32]
    for name, value in {"--batch": min(batches), "--turns": arguments.turns, "--threads": arguments.threads}.items():
        if value < 1:
            raise ConfigError(f"{name} {value}: must be at least 1")
    for file in (arguments.picture, arguments.output):
        if file is not None:
            check_output(file.rpartition("/")[0] or ".")
    with _progress() as advance:
        result = measure(
            arguments.checkpoint,
            names,
            batches=sorted(set(batches)),
            threads=arguments.threads,
            turns=arguments.turns,
            seconds=arguments.seconds,
            progress=advance,
        )
    if arguments.picture is not None:
        from flows.result_commands import write_file

        write_file(arguments.picture, picture(result))
    if arguments.output is not None:
        from flows.result_commands import write_file
        from mlorq.artifacts.store import json_bytes

        write_file(arguments.output, json_bytes(result))

    def finish() -> int:
        from flows.render import console

        if arguments.json:
            print_json(result)
        else:
            print_benchmark(result, console())
        return 0

    return finish


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A live line on a terminal, elsewhere a line per process."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal or verbosity().quiet) as progress:
        task = progress.add_task("benchmark", total=None)

        def advance(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)
            if not console.is_terminal:
                say(f"benchmark {done}/{total}")

        yield advance


def _installed(runtimes: Any) -> list[str]:
    """Names of the runtimes whose packages are installed; the others are named."""
    found = []
    for runtime in runtimes:
        try:
            runtime.check_packages()
        except ConfigError as error:
            say(f"note: {error}")
        else:
            found.append(runtime.name)
    return found


def print_benchmark(result: Mapping[str, Any], out: Console) -> None:
    """Print the table of ``mlorq benchmark``."""
    from flows.render import grid
    from mlorq.runtimes.benchmark import legend, table

    rows = table(result)
    columns = list(rows[0])
    out.print(grid(columns, [list(row.values()) for row in rows], right=columns[1:]))
    out.print(f"\n{legend(result)}", markup=False)
