"""The command line: ``mlorq COMMAND …``.

Results go to standard output, everything else to standard error. Exit status: 0 when all that was asked was done, 2 for
a mistake in the input (one line, no traceback), 130 after Ctrl-C, 1 for a defect, which keeps its traceback.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from flows.comparison_methods import known_methods
from flows.terminal import interruptible, quiet_stdout
from mlorq import __version__
from mlorq.errors import MlorqError
from mlorq.models.family import FAMILIES

# Torch is not imported yet. Its threads shall sleep while they wait for work, where they would spin: what else runs on
# the machine (the server that records the run, to begin with) then costs its share of time and not several times that.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: arguments; default: the process's own.

    Returns:
        The exit status.
    """
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as exit_:  # argparse has printed its message, or the help that was asked for
        return int(exit_.code or 0)
    except MlorqError as error:  # a plugin that cannot be imported
        return _mistake(error)
    interrupted = None
    try:
        with interruptible() as interrupted:
            arguments.interrupted = interrupted
            return _dispatch(arguments)
    except MlorqError as error:
        return _mistake(error)
    except KeyboardInterrupt:
        return _interrupted()
    except BrokenPipeError:  # the reader of our output (a pager, `head`) has enough
        sys.stderr.close()
        return 1
    except Exception:
        # An interrupt that hits Prefect between two states of a task ends in an error of Prefect's own.
        if interrupted is not None and interrupted.is_set():
            return _interrupted()
        raise


def _mistake(error: MlorqError) -> int:
    print(f"mlorq: error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def _interrupted() -> int:
    print("mlorq: interrupted; the same command goes on from what is finished", file=sys.stderr)
    return 130


def _dispatch(arguments: argparse.Namespace) -> int:
    # Imported late: `mlorq --help` and mistakes in arguments answer at once.
    from flows import commands, result_commands, store_commands

    modules = (commands, result_commands, store_commands)
    home = next(module for module in modules if hasattr(module, arguments.command))
    with quiet_stdout():
        finish = getattr(home, arguments.command)(arguments)
    # Only now, with standard output our own again, the result is printed.
    return int(finish())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlorq",
        description="Compress a trained transformer to a memory budget by mixed-precision quantization and "
        "quantized low-rank factors.",
    )
    parser.add_argument("--version", action="version", version=f"mlorq {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    init = commands.add_parser("init", help="a commented configuration to start from")
    init.add_argument("path", nargs="?", metavar="PATH", help="file to write; default: print it")
    init.add_argument(
        "--model",
        metavar="FAMILY[:NAME]",
        help=", ".join(f"{family.name}:{family.example().named}" for family in FAMILIES) + "; default: the first",
    )

    compress = commands.add_parser("compress", help="the full flow: search, allocation, rounding, evaluation")
    _configured(compress)
    compress.add_argument("--output", metavar="DIR", help="copy the checkpoint there (folder or fsspec URL)")
    compress.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
    _running(compress)

    rebudget = commands.add_parser("rebudget", help="further budgets; only what depends on the budget is computed")
    _configured(rebudget)
    rebudget.add_argument(
        "--allocate-only",
        action="store_true",
        help="nothing but the integer programs; without Prefect where PREFECT_API_URL is not set",
    )
    _running(rebudget)

    sweep = commands.add_parser("sweep", help="a ladder of budgets on one search, and the size-accuracy curve")
    _configured(sweep)
    sweep.add_argument("--output", metavar="DIR", help="write the curve there: picture, page and table")
    _running(sweep)

    compare = commands.add_parser("compare", help="one model by several methods at the same size, in one table")
    _configured(compare)
    known = known_methods()
    compare.add_argument(
        "--methods",
        metavar="M,M",
        help=f"of {', '.join(known)}; default: {', '.join(name for name, method in known.items() if method.shown)}",
    )
    compare.add_argument("--activations", type=int, metavar="BITS", help="quantize activations to so many bits")
    compare.add_argument("--output", metavar="DIR", help="write the table there: Parquet, page and JSON")
    _running(compare)

    evaluate = commands.add_parser("evaluate", help="measure a checkpoint on a configuration's evaluation data")
    evaluate.add_argument("checkpoint", metavar="CHECKPOINT", help="folder or fsspec URL")
    _configured(evaluate, budget=False)
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")

    inspect = commands.add_parser("inspect", help="what a checkpoint holds")
    inspect.add_argument("checkpoint", metavar="CHECKPOINT", help="folder or fsspec URL")
    inspect.add_argument("--json", action="store_true", help="print one JSON object")

    export = commands.add_parser("export", help="turn a checkpoint into a file that other software reads")
    export.add_argument("checkpoint", metavar="CHECKPOINT", help="folder or fsspec URL")
    export.add_argument("--to", metavar="TARGET", help="default: the target that the ending of --output means")
    export.add_argument("--output", required=True, metavar="PATH", help="file or folder to write, or its fsspec URL")
    export.add_argument(
        "--option",
        action="append",
        default=[],
        type=_setting,
        metavar="KEY=VALUE",
        help="an option of the target (the value is YAML); may be given several times",
    )
    export.add_argument("--json", action="store_true", help="print one JSON object")

    runs = commands.add_parser("runs", help="finished runs in a store")
    runs.add_argument("config", nargs="?", metavar="CONFIG", help="configuration that names the store")
    runs.add_argument("--store", metavar="URL", help="the store itself")
    runs.add_argument("--json", action="store_true", help="print one JSON object")

    report = commands.add_parser("report", help="a run's page, with its place among the runs of the same model")
    report.add_argument("run", metavar="RUN", help="name of a run, as mlorq runs lists it")
    report.add_argument("config", nargs="?", metavar="CONFIG", help="configuration that names the store")
    report.add_argument("--store", metavar="URL", help="the store itself")
    report.add_argument("--output", metavar="FILE.html", help="write one page that needs no other file")
    report.add_argument("--json", action="store_true", help="print one JSON object")

    _store_commands(commands.add_parser("store", help="what a store holds, whether it is whole, what of it can go"))

    models = commands.add_parser("models", help="models that are known to work")
    models.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _store_commands(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="store_command", required=True, metavar="COMMAND")
    ls = commands.add_parser("ls", help="artifacts by step")
    ls.add_argument("--step", metavar="NAME", help="the artifacts of one step, one by one")
    verify = commands.add_parser("verify", help="compare every file with its manifest")
    gc = commands.add_parser("gc", help="remove what none of the named runs needs")
    gc.add_argument("--keep", action="append", metavar="RUN", help="a run that stays; may be given several times")
    gc.add_argument("--dry-run", action="store_true", help="say what would be removed, and remove nothing")
    for command in (ls, verify, gc):
        command.add_argument("config", nargs="?", metavar="CONFIG", help="configuration that names the store")
        command.add_argument("--store", metavar="URL", help="the store itself")
        command.add_argument("--json", action="store_true", help="print one JSON object")


def _configured(parser: argparse.ArgumentParser, *, budget: bool = True) -> None:
    parser.add_argument("config", metavar="CONFIG", help="configuration (YAML; see mlorq init)")
    if budget:
        parser.add_argument(
            "--budget",
            action="append",
            metavar="B",
            help='instead of the configuration\'s: "3bit", "12.5%%", "25MB"; may be given several times',
        )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        type=_setting,
        metavar="KEY=VALUE",
        help="override a key, as in search.samples=32 (the value is YAML); may be given several times",
    )


def _running(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--verbose", action="store_true", help="show Prefect's log as well")


def _setting(text: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form key=value")
    return key.strip(), value.strip()


if __name__ == "__main__":
    sys.exit(main())
