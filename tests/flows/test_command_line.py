"""What the command line accepts and answers: abbreviations, suggestions, verbosity, completion, and what it imports."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import click
import pytest

from flows.cli import COMMANDS, ROOT, main
from flows.command_group import Command, Group, Home
from flows.completion import SHELLS
from flows.completion_values import setting_values
from flows.options import Arguments, Finish, command
from flows.progress import terminal_progress
from flows.server import _Quiet
from flows.terminal import quiet_stdout
from flows.verbosity import LEVELS, Verbosity, say, showing, verbosity
from tests.flows.test_cli import fails, write_project

HEAVY = ("torch", "prefect", "transformers", "timm")


def parsed(name: str, *arguments: str) -> dict[str, Any]:
    """The values of a command's parameters; the command does not run."""
    found = ROOT.get_command(click.Context(ROOT), name)
    assert found is not None
    return found.make_context(name, list(arguments)).params


@command
def show(arguments: Arguments) -> Finish:
    """A command that tells what it shows."""
    found = verbosity()
    return lambda: print(found) or 0  # type: ignore[func-returns-value]


inner = Group("inner", {"show": Home(__name__, "")})


# -- arguments --------------------------------------------------------------------------------------------------


def test_options_may_be_abbreviated_and_have_values_that_look_like_numbers() -> None:
    values = parsed("compress", "run.yaml", "--bud", "3bit", "--bud=10%", "--dry", "--set", "a=-1")
    assert values["budget"] == ("3bit", "10%")
    assert values["dry_run"] is True
    assert values["set"] == [("a", "-1")]
    assert parsed("benchmark", "out", "--seconds", "-1.5")["seconds"] == -1.5
    assert parsed("inspect", "--", "--out")["checkpoint"] == "--out"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "missing command"),
        ("cmpress run.yaml", "unknown command 'cmpress'; did you mean 'compress'?"),
        ("xyz", "unknown command 'xyz'; known: init, compress, "),
        ("store veryfi", "unknown command 'veryfi'; did you mean 'verify'?"),
        ("compress", "missing argument 'CONFIG'"),
        ("compress run.yaml more", "unexpected extra argument"),
        ("compress run.yaml --outptu x", "unknown option --outptu; did you mean '--output'?"),
        ("compress run.yaml --output --json", "option --output needs a value"),
        ("compress run.yaml --output", "option --output needs a value"),
        ("compress run.yaml --set no_value", "'no_value': expected KEY=VALUE"),
        ("compare run.yaml --activations four", "'four' is not a valid integer"),
        ("export out --output x --precision best", "'best' is not one of 'exact', 'fast'"),
        ("export out", "missing option '--output'"),
        ("benchmark out --t 3", "option --t is ambiguous: --threads, --turns"),
        ("--quiet models --verbose", "--quiet and --verbose exclude each other"),
        ("models --log-level loud", "'loud' is not one of 'debug', "),
    ],
)
def test_wrong_usage_is_one_line_with_the_usage_above_it(
    line: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(line.split()) == 2
    out, err = capsys.readouterr()
    usage, error = err.splitlines()
    assert (out, usage.split()[:2]) == ("", ["usage:", "mlorq"])
    assert error.startswith("mlorq: error: ")
    assert said in error


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("serach.samples=3", "unknown key 'serach'; did you mean 'search'?"),
        ("search.layers.head.btis=[8]", "unknown key 'search.layers.head.btis'; did you mean 'bits'?"),
        ("engine.docker.imgae=x", "unknown key 'engine.docker.imgae'; did you mean 'image'?"),
        ("folder=elsewhere", "unknown key 'folder'"),
    ],
)
def test_unknown_keys_are_answered_with_the_nearest_one(
    setting: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in fails(capsys, "compress", write_project(tmp_path), "--dry-run", "--set", setting)


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for name, home in COMMANDS.items():
        assert main([name, "-h"]) == 0
        out = capsys.readouterr().out
        assert f"usage: mlorq {name} " in out
        assert home.about in " ".join(out.split())
        assert isinstance(ROOT.get_command(click.Context(ROOT), name), Command)


# -- verbosity --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("inner show", Verbosity()),
        ("--quiet inner show", Verbosity(quiet=True)),
        ("inner --quiet show", Verbosity(quiet=True)),
        ("inner show --quiet", Verbosity(quiet=True)),
        ("-v inner show --verbose", Verbosity(verbose=True)),
        ("--log-level error inner show -v --log-level=DEBUG", Verbosity(verbose=True, level="debug")),
    ],
)
def test_options_of_verbosity_stand_before_or_after_the_command(
    line: str, expected: Verbosity, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Group("root", {"inner": Home(__name__, "")})
    assert root.invoke(root.make_context("root", line.split())) == 0
    assert capsys.readouterr().out == f"{expected}\n"


def test_a_quiet_command_prints_its_result_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    project = write_project(tmp_path)
    said = "a library that prints"
    assert main(["compress", str(project), "--dry-run"]) == 0
    assert said in capfd.readouterr().err
    assert main(["compress", str(project), "--dry-run", "--quiet", "--json"]) == 0
    out, err = capfd.readouterr()
    assert (json.loads(out)["layers"][0]["layer"], err) == ("stem", "")
    assert main(["compress", str(project), "--dry-run", "--quiet", "--budget", "0.5bit"]) == 2
    assert "mlorq: error: " in capfd.readouterr().err


def test_quiet_hides_notes_warnings_progress_and_child_processes(capfd: pytest.CaptureFixture[str]) -> None:
    with showing(Verbosity(quiet=True)), quiet_stdout():
        say("a note")
        warnings.warn("a warning", UserWarning, stacklevel=1)
        progress = terminal_progress()
        progress.phase("round", 1)
        progress.close()
        subprocess.run(["echo", "a solver"], check=True)
    assert capfd.readouterr() == ("", "")
    assert verbosity() == Verbosity()
    with quiet_stdout():
        say("a note")
        subprocess.run(["echo", "a solver"], check=True)
    assert capfd.readouterr() == ("", "mlorq: a note\na solver\n")


def test_prefects_warnings_are_shown_unless_the_command_is_quiet() -> None:
    def shown(least: int) -> list[tuple[str, int]]:
        records = [
            (name, level)
            for name in ("prefect.events", "prefect.flow_runs")
            for level in (logging.INFO, logging.WARNING, logging.ERROR)
        ]
        prefect_filter = _Quiet(least)
        return [one for one in records if prefect_filter.filter(logging.LogRecord(*one, "", 0, "", None, None))]

    assert shown(logging.WARNING) == [("prefect.events", logging.WARNING), ("prefect.events", logging.ERROR)]
    assert shown(logging.ERROR) == [("prefect.events", logging.ERROR)]


@pytest.mark.parametrize("level", LEVELS)
def test_log_lines_of_a_level_and_above_are_shown(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_LOGGING_LEVEL", raising=False)
    logger = logging.getLogger("flows.anything")
    with showing(Verbosity(level=level)):
        assert [name for name in LEVELS if logger.isEnabledFor(getattr(logging, name.upper()))] == list(
            LEVELS[LEVELS.index(level) :]
        )
        assert os.environ["PREFECT_LOGGING_LEVEL"] == level.upper()
    assert "PREFECT_LOGGING_LEVEL" not in os.environ
    assert not logger.isEnabledFor(logging.INFO)


def test_log_lines_are_printed_on_standard_error() -> None:
    program = (
        "import logging; from flows.verbosity import Verbosity, showing\n"
        "with showing(Verbosity(level='info')):\n"
        "    logging.getLogger('flows.x').info('shown'); logging.getLogger('flows.x').debug('hidden')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr == "INFO flows.x: shown\n"


# -- completion -------------------------------------------------------------------------------------------------


def complete(line: str) -> None:
    """Print what bash is offered for an unfinished line."""
    environment = os.environ | {"_MLORQ_COMPLETE": "bash_complete", "COMP_LINE": line, "COMP_WORDBREAKS": " =:"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        assert main([]) == 0


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("mlorq re", ["rebudget", "report"]),
        ("mlorq store v", ["verify"]),
        ("mlorq --log-level de", ["debug"]),
        ("mlorq -v compress run.yaml --dr", ["--dry-run"]),
        ("mlorq export out --to on", ["onnx"]),
        ("mlorq export out --to=on", ["onnx"]),
        ("mlorq export out --to onnx --option prec", ["precision="]),
        ("mlorq compare run.yaml --methods gptq,er", ["gptq,erq"]),
        ("mlorq compress run.yaml --set pres", ["preset="]),
        ("mlorq compress run.yaml --set preset=q", ["quick"]),
        ("mlorq compress run.yaml --set=preset=q", ["quick"]),
        ("mlorq compress run.yaml --set engine.docker.i", ["engine.docker.image="]),
        ("mlorq benchmark out --runtime open", ["openvino"]),
        ("mlorq init --model cust", ["custom"]),
        ("mlorq completion z", ["zsh"]),
    ],
)
def test_completions(line: str, offered: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    complete(line)
    assert [item.split(",", 1) for item in capsys.readouterr().out.split()] == [["plain", name] for name in offered]


@pytest.mark.parametrize("line", ["mlorq compress ", "mlorq compress ./ru", "mlorq report RUN ", "mlorq runs --store "])
def test_files_are_completed_by_the_shell(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    complete(line)
    assert capsys.readouterr().out.startswith("file,")


def test_completed_keys_are_those_of_the_configuration() -> None:
    context = click.Context(ROOT)
    option = click.Option(["--set"])
    keys = setting_values(context, option, "")
    assert {"model.family=", "data.calibration.source=", "activations.bits=", "store=", "search.bits="} <= set(keys)
    assert not any(key.startswith(("folder", "export.")) for key in keys)
    assert setting_values(context, option, "rounding.method=lr") == ["rounding.method=lra"]
    assert setting_values(context, option, "nothing=") == []


@pytest.mark.parametrize("shell", SHELLS)
def test_scripts_are_valid(shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "_MLORQ_COMPLETE" in script
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed: its script is Click's own")
    (tmp_path / "script").write_text(script)
    subprocess.run([shell, "-n", str(tmp_path / "script")], check=True)


def test_bash_completes_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As readline does it: the function fills COMPREPLY."""
    assert main(["completion", "bash"]) == 0
    program = tmp_path / "mlorq"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m flows.cli "$@"\n')
    program.chmod(0o755)
    line = "mlorq compress run.yaml --set preset=q"
    asks = f"""{capsys.readouterr().out}
compopt() {{ :; }}
COMP_WORDBREAKS=' =:' COMP_LINE='{line}' COMP_POINT={len(line)}
_mlorq_completion {program} q =
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash", "-c", asks], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["quick"], done.stderr


def test_fish_completes_values_with_commas(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if shutil.which("fish") is None:
        pytest.skip("fish is not installed")
    assert main(["completion", "fish"]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    program = tmp_path / "mlorq"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m flows.cli "$@"\n')
    program.chmod(0o755)
    asks = f"source {tmp_path}/script; complete -C 'mlorq compare run.yaml --methods gptq,er'; complete -C 'mlorq comp'"
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    done = subprocess.run(["fish", "-c", asks], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.splitlines()[0] == "gptq,erq", done.stderr
    assert "rounding, evaluation" in done.stdout  # descriptions are whole


# -- start-up ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "status"),
    [
        ("--help", 0),
        ("models", 0),
        ("schema", 0),
        ("init", 0),
        ("completion bash", 0),
        ("compress --help", 0),
        ("compress run.yaml --bogus", 2),
        ("cmpress", 2),
    ],
)
def test_what_answers_at_once_imports_no_heavy_package(line: str, status: int) -> None:
    program = f"""
import sys
from flows.cli import main
status = main({line.split()!r})
print(status, *[name for name in {HEAVY!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == str(status)
