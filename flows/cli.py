"""The command line: ``mlorq COMMAND …``.

Results go to standard output, everything else to standard error. Exit status: 0 for success, 2 for wrong input (one
line, no traceback), 130 after Ctrl-C, 143 after SIGTERM, 1 for a defect, with a traceback.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

# The registries are imported in ``main``: an interrupt while they are is then one line, as at any other time.
from flows.terminal import Interrupt, interruptible, quiet_stdout
from mlorq import __version__
from mlorq.errors import MlorqError, hide_secrets

# Set before torch is imported: its threads then sleep instead of spinning while they wait for work. Spinning threads
# slow down every other process of the machine, such as the server that records the run.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: arguments; default: those of the process.

    Returns:
        The exit status.
    """
    interrupted = Interrupt()
    try:
        with interruptible() as interrupted:
            try:
                arguments = _parser().parse_args(argv)
            except SystemExit as exit_:  # argparse has printed its message, or the help that was asked for
                return int(exit_.code or 0)
            arguments.interrupted = interrupted
            return _dispatch(arguments)
    except KeyboardInterrupt:
        return _interrupted(interrupted)
    except Exception as error:
        # An interrupt between two states of a task makes Prefect raise an error of its own.
        if interrupted.is_set():
            return _interrupted(interrupted)
        if isinstance(error, BrokenPipeError):  # the reader of the output (a pager, `head`) has closed it
            sys.stderr.close()
            return 1
        if isinstance(error, MlorqError):
            return _wrong_input(error)
        raise


def script(argv: Sequence[str] | None = None) -> NoReturn:
    """The command ``mlorq``: ``main`` in a process of its own."""
    status = main(argv)
    # The result is printed: an interrupt while Python ends does not show where it does.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(status)


def _wrong_input(error: MlorqError) -> int:
    print(f"mlorq: error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def _interrupted(interrupted: Interrupt) -> int:
    print("mlorq: interrupted; run the same command again to resume", file=sys.stderr)
    return interrupted.status


def _dispatch(arguments: argparse.Namespace) -> int:
    # Imported here to keep `mlorq --help` and errors in arguments fast.
    from flows import benchmark_command, commands, result_commands, store_commands

    modules = (commands, result_commands, store_commands, benchmark_command)
    home = next(module for module in modules if hasattr(module, arguments.command))
    with quiet_stdout():
        finish = getattr(home, arguments.command)(arguments)
    # The result is printed after standard output is restored.
    return int(finish())


def _parser() -> argparse.ArgumentParser:
    from flows.comparison_methods import known_methods
    from mlorq.models.family import FAMILIES

    parser = argparse.ArgumentParser(
        prog="mlorq",
        description="Compress a trained transformer to a memory budget by mixed-precision quantization and "
        "quantized low-rank factors.",
    )
    parser.add_argument("--version", action="version", version=f"mlorq {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    init = commands.add_parser("init", help="write or print a commented configuration")
    init.add_argument("path", nargs="?", metavar="PATH", help="file to write; default: print it")
    init.add_argument(
        "--model",
        metavar="FAMILY[:NAME]",
        help=", ".join(f"{family.name}:{family.example().named}" for family in FAMILIES) + "; default: the first",
    )

    compress = commands.add_parser("compress", help="the full flow: search, allocation, rounding, evaluation")
    _configured(compress)
    compress.add_argument("--output", metavar="DIR", help="copy the checkpoint to this folder or fsspec URL")
    compress.add_argument("--dry-run", action="store_true", help="show what a run would do, and do nothing")
    _running(compress)

    rebudget = commands.add_parser("rebudget", help="further budgets for a searched model")
    _configured(rebudget)
    rebudget.add_argument(
        "--allocate-only",
        action="store_true",
        help="solve the integer programs only, without loading the model; without Prefect if PREFECT_API_URL is not "
        "set",
    )
    _running(rebudget)

    sweep = commands.add_parser("sweep", help="several budgets with one search, and the size-accuracy curve")
    _configured(sweep)
    sweep.add_argument("--output", metavar="DIR", help="write the curve to this folder: picture, page and table")
    _running(sweep)

    compare = commands.add_parser("compare", help="compare several methods on one model at the same size")
    _configured(compare)
    known = known_methods()
    compare.add_argument(
        "--methods",
        metavar="M,M",
        help=f"of {', '.join(known)}; default: {', '.join(name for name, method in known.items() if method.shown)}",
    )
    compare.add_argument("--activations", type=int, metavar="BITS", help="bit-width of activations")
    compare.add_argument("--output", metavar="DIR", help="write the table to this folder: Parquet, page and JSON")
    _running(compare)

    evaluate = commands.add_parser("evaluate", help="measure a checkpoint on a configuration's evaluation data")
    evaluate.add_argument("checkpoint", metavar="CHECKPOINT", help="folder or fsspec URL")
    _configured(evaluate, budget=False)
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")

    inspect = commands.add_parser("inspect", help="show the contents of a checkpoint")
    inspect.add_argument("checkpoint", metavar="CHECKPOINT", help="folder or fsspec URL")
    inspect.add_argument("--json", action="store_true", help="print one JSON object")

    export = commands.add_parser("export", help="convert a checkpoint to a format of other software")
    export.add_argument("checkpoint", metavar="CHECKPOINT", help="folder or fsspec URL")
    export.add_argument("--to", metavar="TARGET", help="default: the target for the file extension of --output")
    export.add_argument("--output", required=True, metavar="PATH", help="file or folder to write, or its fsspec URL")
    export.add_argument(
        "--precision",
        choices=["exact", "fast"],
        help="of graphs: the outputs of mlorq.load, or products by 8-bit integers (the NMSE that they add is printed)",
    )
    export.add_argument(
        "--option",
        action="append",
        default=[],
        type=_setting,
        metavar="KEY=VALUE",
        help="an option of the target (the value is YAML); can be repeated",
    )
    export.add_argument("--json", action="store_true", help="print one JSON object")

    benchmark = commands.add_parser("benchmark", help="bytes, memory and time of a checkpoint against the float model")
    benchmark.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of a checkpoint")
    benchmark.add_argument(
        "--runtime", action="append", metavar="NAME", help="can be repeated; default: all that are installed"
    )
    benchmark.add_argument(
        "--batch", action="append", type=int, metavar="N", help="samples in a batch; can be repeated; default: 1 and 32"
    )
    benchmark.add_argument("--threads", type=int, default=1, help="threads of a runtime (default: %(default)s)")
    benchmark.add_argument("--turns", type=int, default=5, help="cold processes per model (default: %(default)s)")
    benchmark.add_argument(
        "--seconds", type=float, default=1.0, help="time for the calls of one batch (default: %(default)s)"
    )
    benchmark.add_argument("--output", metavar="FILE.json", help="write the result, for mlorq report --benchmark")
    benchmark.add_argument("--picture", metavar="FILE.png", help="write a picture of memory and time")
    benchmark.add_argument("--json", action="store_true", help="print one JSON object")

    runs = commands.add_parser("runs", help="list the finished runs in a store")
    runs.add_argument("config", nargs="?", metavar="CONFIG", help="configuration that names the store")
    runs.add_argument("--store", metavar="URL", help="URL of the store")
    runs.add_argument("--json", action="store_true", help="print one JSON object")

    report = commands.add_parser(
        "report", help="the report of a run, with a comparison with the other runs of the model"
    )
    report.add_argument("run", metavar="RUN", help="name of the run (see mlorq runs)")
    report.add_argument("config", nargs="?", metavar="CONFIG", help="configuration that names the store")
    report.add_argument("--store", metavar="URL", help="URL of the store")
    report.add_argument("--output", metavar="FILE.html", help="write the report as one self-contained page")
    report.add_argument(
        "--benchmark", metavar="FILE.json", help="show this result of mlorq benchmark on the page (see its --output)"
    )
    report.add_argument("--json", action="store_true", help="print one JSON object")

    _store_commands(commands.add_parser("store", help="list, verify and clean up a store"))

    models = commands.add_parser("models", help="list the tested models")
    models.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _store_commands(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="store_command", required=True, metavar="COMMAND")
    ls = commands.add_parser("ls", help="artifacts by step")
    ls.add_argument("--step", metavar="NAME", help="list the artifacts of one step")
    verify = commands.add_parser("verify", help="check every file against its manifest")
    verify.add_argument(
        "--repair", action="store_true", help="remove damaged artifacts and all that was made from them"
    )
    gc = commands.add_parser("gc", help="remove the artifacts that none of the kept runs needs")
    gc.add_argument("--keep", action="append", metavar="RUN", help="a run to keep; can be repeated")
    gc.add_argument("--dry-run", action="store_true", help="show what would be removed, and remove nothing")
    for command in (ls, verify, gc):
        command.add_argument("config", nargs="?", metavar="CONFIG", help="configuration that names the store")
        command.add_argument("--store", metavar="URL", help="URL of the store")
        command.add_argument("--json", action="store_true", help="print one JSON object")


def _configured(parser: argparse.ArgumentParser, *, budget: bool = True) -> None:
    parser.add_argument("config", metavar="CONFIG", help="configuration (YAML; see mlorq init)")
    if budget:
        parser.add_argument(
            "--budget",
            action="append",
            metavar="B",
            help='overrides the configuration\'s budget: "3bit", "12.5%%", "25MB"; can be repeated',
        )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        type=_setting,
        metavar="KEY=VALUE",
        help="override a key, as in search.samples=32 (the value is YAML); can be repeated",
    )


def _running(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--verbose", action="store_true", help="show Prefect's log as well")


def _setting(text: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise argparse.ArgumentTypeError(f"{hide_secrets(text)!r}: expected KEY=VALUE")
    return key.strip(), value.strip()


if __name__ == "__main__":
    script()
