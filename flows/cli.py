"""The command line: ``mlorq COMMAND …``.

Results go to standard output, everything else to standard error. Exit status: 0 for success, 2 for wrong input (one
line, no traceback), 130 after Ctrl-C, 143 after SIGTERM, 1 for a defect, with a traceback.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from flows.command_group import COMPLETION, Group, Home
from flows.terminal import Interrupt, interruptible
from flows.verbosity import complain
from mlorq import __version__
from mlorq.errors import MlorqError

# Set before torch is imported: its threads then sleep instead of spinning while they wait for work. Spinning threads
# slow down every other process of the machine, such as the server that records the run.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

COMMANDS = {
    "init": Home("flows.setup_commands", "write or print a commented configuration"),
    "compress": Home("flows.commands", "the full flow: search, allocation, rounding, evaluation"),
    "rebudget": Home("flows.commands", "further budgets for a searched model"),
    "sweep": Home("flows.commands", "several budgets with one search, and the size-accuracy curve"),
    "compare": Home("flows.commands", "compare several methods on one model at the same size"),
    "evaluate": Home("flows.result_commands", "measure a checkpoint on a configuration's evaluation data"),
    "inspect": Home("flows.result_commands", "show the contents of a checkpoint"),
    "export": Home("flows.result_commands", "convert a checkpoint to a format of other software"),
    "benchmark": Home("flows.benchmark_command", "bytes, memory and time of a checkpoint against the float model"),
    "runs": Home("flows.result_commands", "list the finished runs in a store"),
    "report": Home("flows.result_commands", "the report of a run, with a comparison with the other runs of the model"),
    "store": Home("flows.store_commands", "list, verify and clean up a store"),
    "models": Home("flows.setup_commands", "list the tested models"),
    "schema": Home("flows.setup_commands", "the JSON schema of configurations, for editors"),
    "notify": Home("flows.notify_command", "messages about runs, by Prefect's notification blocks"),
    "doctor": Home("flows.doctor_command", "check the installation, the services and what a configuration needs"),
    "completion": Home("flows.completion", "print a shell's script for the completion of commands"),
}

ROOT = click.version_option(__version__, message="mlorq %(version)s")(
    Group(
        "mlorq",
        COMMANDS,
        help="Compress a trained transformer to a memory budget by mixed-precision quantization and quantized low-rank "
        "factors.",
    )
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: arguments; default: those of the process.

    Returns:
        The exit status.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    interrupted = Interrupt()
    try:
        with interruptible() as interrupted:
            return _run(arguments, interrupted)
    except click.exceptions.Exit as exit_:  # after help or the version
        return exit_.exit_code
    except click.UsageError as error:
        if error.ctx is not None:
            print(error.ctx.get_usage(), file=sys.stderr)
        message = error.format_message()
        return _wrong_input(message[:1].lower() + message[1:].removesuffix("."))
    except KeyboardInterrupt:
        return _interrupted(interrupted)
    except Exception as error:
        from flows.server import refusal

        # An interrupt between two states of a task makes Prefect raise an error of its own.
        if interrupted.caused(error):
            return _interrupted(interrupted)
        if isinstance(error, BrokenPipeError):  # the reader of the output (a pager, `head`) has closed it
            sys.stderr.close()
            return 1
        if isinstance(error, MlorqError):
            return _wrong_input(str(error))
        if refused := refusal(error):
            return _wrong_input(refused)
        raise


def script(argv: Sequence[str] | None = None) -> NoReturn:
    """The command ``mlorq``: ``main`` in a process of its own."""
    status = main(argv)
    # The result is printed: an interrupt while Python ends does not show where it does.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(status)


def _run(arguments: list[str], interrupted: Interrupt) -> int:
    if instruction := os.environ.get(COMPLETION):
        from flows.completion import answer

        return answer(ROOT, instruction)
    # Not by Click's own `main`, which would answer to Ctrl-C and closed pipes itself.
    with ROOT.make_context("mlorq", arguments, obj=interrupted) as context:
        return int(ROOT.invoke(context) or 0)


def _wrong_input(message: str) -> int:
    complain(f"error: {' '.join(message.split())}")
    return 2


def _interrupted(interrupted: Interrupt) -> int:
    complain("interrupted; run the same command again to resume")
    return interrupted.status


if __name__ == "__main__":
    script()
