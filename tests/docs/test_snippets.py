"""Every fenced block of every page: configurations are valid, commands exist, all runs in a test or has a reason."""

from __future__ import annotations

import re
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from flows.cli import ROOT as COMMANDS
from mlorq.config.run import RunConfig
from tests.docs import not_run
from tests.docs.pages import PAGES, ROOT, Block, blocks
from tests.docs.scenarios import SCENARIOS

BLOCKS = [block for page in PAGES for block in blocks(page)]
# What completes the sections that a block of YAML shows.
SOURCE = {"source": "table", "path": "pairs.csv", "text": ["first", "second"]}
RUN: dict[str, Any] = {
    "model": {"family": "transformers", "name": "encoder/", "task": "sentence-similarity"},
    "data": {"calibration": SOURCE, "evaluation": SOURCE | {"label": "score"}},
    "budget": "3bit",
}


def of(language: str) -> list[Block]:
    return [block for block in BLOCKS if block.language == language]


def commands() -> list[tuple[Block, str]]:
    return [(block, command) for block in of("console") for command in block.commands]


def test_blocks_have_languages_that_are_checked() -> None:
    assert {block.language for block in BLOCKS} == {"console", "python", "yaml", "toml", "", "{eval-rst}", "{toctree}"}
    assert len(BLOCKS) > 90
    for page in PAGES:  # a fence that is not closed, or is indented, is no block
        assert len(re.findall(r"^\s*```", page.read_text(), re.MULTILINE)) == 2 * len(blocks(page)), page


@pytest.mark.parametrize("block", of("yaml"), ids=str)
def test_configurations_are_valid(block: Block, tmp_path: Path) -> None:
    documents = list(yaml.safe_load_all(block.text))
    if documents == [None]:
        assert block.text.startswith("# yaml-language-server: $schema=")
        return
    for values in documents:
        assert set(values) <= set(RunConfig.model_fields)
        if str(values.get("store", "")).startswith("block:"):  # of a Prefect server: tests/flows/test_blocks.py
            continue
        values = RUN | values | {"data": RUN["data"] | values.get("data", {})}
        known = RunConfig.from_mapping(values, str(tmp_path))
        # Strict, so that a misspelt key of any section would have been refused.
        assert RunConfig.from_mapping(yaml.safe_load(known.to_yaml()), str(tmp_path)) == known


@pytest.mark.parametrize("block", of("python"), ids=str)
def test_python_compiles(block: Block) -> None:
    compile(block.text, str(block), "exec")


@pytest.mark.parametrize(("block", "command"), commands(), ids=lambda value: str(value)[:70])
def test_commands_exist(block: Block, command: str) -> None:
    words = shlex.split(command)
    while "=" in words[0] and not words[0].startswith("-"):
        words = words[1:]
    program, *arguments = words
    if program in ("mlorq", ".venv/bin/mlorq"):
        _check_arguments(COMMANDS, arguments[: arguments.index(">")] if ">" in arguments else arguments)
    elif program == "make":
        assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif program == "prefect" and arguments[:2] == ["deployment", "run"]:
        _check_deployment(arguments[2:])
    elif program == "eval":
        inner = re.findall(r"\$\(mlorq (.*)\)", command)
        _check_arguments(COMMANDS, shlex.split(inner[0]))
    elif program == "python" and arguments[0] != "-m":
        shown = {block.file_name for block in of("python")}
        assert arguments[0] in shown or (ROOT / arguments[0]).is_file()
    else:
        assert program in not_run.PROGRAMS or program == "python"
    for file in re.findall(r"(?<![\w/.-])(?:examples|docker|benchmarks|scripts)/[\w./-]+", command):
        assert (ROOT / file).exists() or file == "examples/IMAGENET", file


def _check_arguments(group: click.Group, arguments: list[str]) -> None:
    """Parse the arguments of a command, which does not run."""
    name, *rest = arguments
    found = group.get_command(click.Context(group), name)
    assert found is not None, name
    if isinstance(found, click.Group):
        _check_arguments(found, rest)
    else:
        found.make_context(name, rest)


def _check_deployment(arguments: list[str]) -> None:
    from tests.flows.test_deployments import DEPLOYMENTS, flow_of

    name, *rest = arguments
    flow, _, deployment = name.partition("/")
    assert flow_of(DEPLOYMENTS[deployment]).name == flow
    parameters = {value.partition("=")[0] for key, value in pairwise(rest) if key == "-p"}
    assert parameters <= set(flow_of(DEPLOYMENTS[deployment]).parameters.properties)


def test_everything_is_run_or_has_a_reason() -> None:
    """The scenarios run all of a page but what ``not_run`` names, so a page without one may have nothing else."""
    unused: set[Any] = set(not_run.COMMANDS) | set(not_run.PYTHON) | set(not_run.ELSEWHERE) | set(not_run.PROGRAMS)
    for block in BLOCKS:
        if block.page in not_run.ELSEWHERE and block.language in ("console", "python"):
            test = ROOT / not_run.ELSEWHERE[block.page]
            assert Path(block.page).name in test.read_text(), test
            unused.discard(block.page)
        if block.language == "console":
            for command in block.commands:
                reason = not_run.command_reason(block.page, command)
                unused -= {key for key in not_run.COMMANDS if key[0] == block.page and command.startswith(key[1])}
                unused -= {word for word in command.split() if word in not_run.PROGRAMS}
                assert reason or block.page in SCENARIOS or block.page in not_run.ELSEWHERE, (str(block), command)
        elif block.language == "python":
            unused.discard((block.page, block.number))
            known = (block.page, block.number) in not_run.PYTHON
            assert known or block.page in SCENARIOS or block.page in not_run.ELSEWHERE, str(block)
    assert not unused, "reasons for what is not there any more"
    assert set(SCENARIOS) <= {block.page for block in BLOCKS}
    reasons = [*not_run.COMMANDS.values(), *not_run.PROGRAMS.values(), *not_run.PYTHON.values()]
    named = {name for reason in reasons for name in re.findall(r"(?:tests|docs)/[\w./-]+\.(?:py|md)", reason)}
    assert all((ROOT / name).is_file() for name in named), named


def test_files_that_pages_name_in_code_exist() -> None:
    """Also in the indented commands of the benchmarks, and in running text."""
    for page in PAGES:
        for code in re.findall(r"`([^`\n]+)`|^    (\S[^\n]*)$", page.read_text(), re.MULTILINE):
            if page.name == "CHANGELOG.md":  # of files as they were
                continue
            for file in re.findall(
                r"(?<![\w/.<>{}-])(?:benchmarks|examples|scripts|tests|docker)/[\w./-]+\.(?:py|yaml|sh|md)\b",
                "".join(code),
            ):
                assert (ROOT / file).is_file(), f"{page.relative_to(ROOT)}: {file}"


def test_tests_that_pages_name_exist() -> None:
    """Each kind of docs/REPORTED_CASES.md has its test."""
    page = (ROOT / "docs" / "REPORTED_CASES.md").read_text()
    rows = [line for line in page.splitlines() if re.match(r"\| (?!case \|)", line)]
    named = [re.findall(r"`([\w/.]+)::(test_\w+)` \|$", row) for row in rows]
    assert rows
    assert all(len(found) == 1 for found in named)
    for file, test in {found[0] for found in named}:
        assert re.search(rf"^def {test}\(", (ROOT / "tests" / file).read_text(), re.MULTILINE), f"{file}::{test}"


def test_the_references_are_complete() -> None:
    """Every key of a configuration's first level, and every command, is on its page."""
    table = re.findall(r"^\| (`[^|]+) \|", (ROOT / "docs" / "CONFIGURATION.md").read_text(), re.MULTILINE)
    assert {key for row in table for key in re.findall(r"`(\w+)", row)} == set(RunConfig.model_fields) - {"folder"}
    shown = (ROOT / "docs" / "COMMAND_LINE.md").read_text()
    missing = [name for name in COMMANDS.list_commands(click.Context(COMMANDS)) if f"mlorq {name}" not in shown]
    assert not missing
