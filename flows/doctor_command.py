"""``mlorq doctor``: check the installation, the services and what a configuration needs."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import click

from flows.command_tools import print_json
from flows.doctor.row import Check, Row, needed, run_checks
from flows.options import PATH, Arguments, Finish, command, json_option
from flows.verbosity import complain

STYLES = {"ok": "green", "missing": "yellow", "problem": "red"}


@command
@click.argument("config", required=False, metavar="[CONFIG]", type=PATH)
@json_option
def doctor(arguments: Arguments) -> Finish:
    """Exit status 2 if something that the configuration needs is missing."""
    rows = examine(arguments.config)
    failed = [row for row in rows if row.failed]

    def finish() -> int:
        if arguments.json:
            print_json({"config": arguments.config, "ok": not failed, "rows": [row.to_json() for row in rows]})
        else:
            _print(rows)
        for row in failed:
            complain(f"error: {row.needed_by} needs {row.name}: {row.detail}")
        return 2 if failed else 0

    return finish


def examine(path: str | None) -> list[Row]:
    """The rows of all checks, with what a configuration needs.

    Args:
        path: path or fsspec URL of the configuration; None: none.

    Raises:
        ConfigError: it is wrong.
        StoreError: the protocol of the store's URL is unknown.
    """
    from flows.doctor import machine, needs, packages, services, torch_report
    from mlorq.artifacts.locations import resolve_location, url_of_store
    from mlorq.artifacts.store import Store
    from mlorq.config.run import DEFAULT_STORE, STORE, RunConfig

    config = None if path is None else RunConfig.from_yaml(path)
    default = url_of_store(os.environ.get(STORE) or DEFAULT_STORE)
    store = Store(resolve_location(default, os.getcwd()) if config is None else config.resolve(config.store))
    folder = Path(store.root) if store.is_local else None
    engine = None if config is None else config.engine
    image = engine.docker.image if engine is not None and engine.steps == "docker" else None
    address = engine.dask.address if engine is not None and engine.runner == "dask" else None
    checks = [
        Check("machine", partial(machine.machine_rows, folder), 5),
        Check("packages", packages.package_rows, 10),
        Check("torch", torch_report.torch_rows, torch_report.SECONDS + 5),
        Check(machine.STORE, partial(machine.store_rows, store, folder), 15),
        Check(services.PREFECT, services.prefect_rows, 30),
        Check(services.DOCKER, partial(services.docker_rows, image), 15),
        Check(services.DASK, partial(services.dask_rows, address), 10),
    ]
    if config is None:
        return run_checks(checks)
    rows = run_checks([*checks, Check("files", partial(needs.file_rows, config), 15)])
    wanted = needs.needs_of(config)
    return needed([*rows, *needs.absent_rows(rows, wanted)], wanted)


def _print(rows: list[Row]) -> None:
    from rich.table import Table
    from rich.text import Text

    from flows.render import console

    table = Table(box=None, show_header=False, pad_edge=False)
    for _ in range(3):
        table.add_column(overflow="fold")
    for row in rows:
        about = Text(row.detail)
        if row.state != "ok" and row.advice:
            about.append(f"\n→ {row.advice}")
        table.add_row(Text(row.state, style=STYLES[row.state]), Text(row.name, style="bold"), about)
    console().print(table)
