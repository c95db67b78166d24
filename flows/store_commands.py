"""``mlorq store ls``, ``verify`` and ``gc``: list a store, check it, and remove unneeded artifacts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from flows.command_group import Group, Home
from flows.command_tools import named_store, print_json
from flows.options import Arguments, Finish, command, json_option, stored
from mlorq.errors import ConfigError, StoreError, hide_secrets
from mlorq.numbers import byte_count

if TYPE_CHECKING:
    from mlorq.artifacts.gc import Folder
    from mlorq.artifacts.store import Store


store = Group(
    "store",
    {
        "ls": Home(__name__, "artifacts by step"),
        "verify": Home(__name__, "check every file against its manifest"),
        "gc": Home(__name__, "remove the artifacts that none of the kept runs needs"),
    },
)


@command
@stored
@click.option("--step", metavar="NAME", help="list the artifacts of one step")
@json_option
def ls(arguments: Arguments) -> Finish:
    """List artifacts by step, or with ``--step`` one per line."""
    from mlorq.artifacts.gc import folders

    found = named_store(arguments)
    everything = folders(found)
    rows = _steps(everything) if arguments.step is None else _artifacts(found, everything, arguments.step)
    left_over = [folder for folder in everything if not folder.is_artifact]
    total = {"artifacts": len(everything) - len(left_over), "bytes": sum(folder.bytes for folder in everything)}

    def finish() -> int:
        from flows.render import console, grid

        if arguments.json:
            name = "steps" if arguments.step is None else "artifacts_of_step"
            print_json({"store": hide_secrets(found.url), **total, "left_over": len(left_over), name: rows})
            return 0
        out = console()
        if rows:
            columns = tuple(rows[0])
            cells = [tuple(_cell(row[name]) for name in columns) for row in rows]
            out.print(grid(columns, cells, right=("artifacts", "bytes")))
            out.print()
        out.print(f"{total['artifacts']:,} artifacts, {byte_count(total['bytes'])}", markup=False)
        if left_over:
            out.print(f"{len(left_over)} left over from interrupted writes (mlorq store gc removes old ones)")
        return 0

    return finish


def _steps(everything: Sequence[Folder]) -> list[dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for folder in everything:
        if folder.is_artifact:
            row = rows.setdefault(folder.ref.step, {"step": folder.ref.step, "artifacts": 0, "bytes": 0, "newest": ""})
            row["artifacts"] += 1
            row["bytes"] += folder.bytes
            row["newest"] = max(row["newest"], _time(folder))
    return list(rows.values())


def _artifacts(found: Store, everything: Sequence[Folder], step: str) -> list[dict[str, Any]]:
    chosen = [folder for folder in everything if folder.is_artifact and folder.ref.step == step]
    if not chosen:
        steps = sorted({folder.ref.step for folder in everything if folder.is_artifact})
        where = hide_secrets(found.url)
        raise StoreError(f"no artifacts of step {step!r} in the store {where}; steps: {', '.join(steps) or 'none'}")
    rows = []
    for folder in chosen:
        manifest = found.manifest(folder.ref) or {}
        rows.append(
            {
                "key": folder.ref.key,
                "layer": manifest.get("details", {}).get("layer"),
                "bytes": folder.bytes,
                "seconds": manifest.get("seconds"),
                "created": manifest.get("created", ""),
            }
        )
    return rows


@command
@stored
@click.option("--repair", is_flag=True, help="remove damaged artifacts and all that was made from them")
@json_option
def verify(arguments: Arguments) -> Finish:
    """Check every file against its manifest; exit status 2 if one is damaged, unless it is removed by ``--repair``."""
    from flows.garbage import alone, progress
    from mlorq.artifacts.gc import remove
    from mlorq.artifacts.gc import verify as verify_store
    from mlorq.artifacts.repair import derived_from

    found = named_store(arguments)
    gone: list[Folder] = []
    if arguments.repair:
        found.check_writable()
        with alone(found, "store verify --repair"):
            findings = verify_store(found, progress("verified"))
            gone = derived_from(found, findings.refs)
            remove(found, gone, progress("removed"))
    else:
        findings = verify_store(found, progress("verified"))
    removed = [f"{folder.ref.step}/{folder.ref.key}" for folder in gone]
    left_over = [found.uri(folder.ref) for folder in findings.left_over]

    def finish() -> int:
        from flows.render import console

        if arguments.json:
            counts = {"artifacts": findings.artifacts, "bytes": findings.bytes}
            lists = {"damaged": findings.damaged, "left_over": left_over, "removed": removed}
            print_json({"store": hide_secrets(found.url), **counts, **lists})
        else:
            out = console()
            for name in left_over:
                out.print(f"left over from an interrupted write: {name}", markup=False, soft_wrap=True)
            out.print(f"{findings.artifacts:,} artifacts, {byte_count(findings.bytes)}", markup=False)
            if gone:
                for message in findings.damaged:
                    out.print(message, markup=False, soft_wrap=True)
                derived = len(gone) - len(findings.refs)
                out.print(f"removed: {len(findings.refs):,} damaged artifacts and {derived:,} made from them")
        if findings.damaged and not arguments.repair:
            raise StoreError(f"{len(findings.damaged)} damaged: {'; '.join(findings.damaged)}")
        return 0

    return finish


@command
@stored
@click.option("--keep", multiple=True, metavar="RUN", help="a run to keep; can be repeated")
@click.option("--dry-run", is_flag=True, help="show what would be removed, and remove nothing")
@json_option
def gc(arguments: Arguments) -> Finish:
    """Remove the artifacts that none of the kept runs needs."""
    from flows.garbage import collect

    if not arguments.keep:
        raise ConfigError("store gc: name the runs to keep with --keep RUN (mlorq runs lists them)")
    found = named_store(arguments)
    _, row = collect(found, lambda: arguments.keep, "store gc", dry_run=arguments.dry_run)

    def finish() -> int:
        from flows.render import console

        if arguments.json:
            shown = hide_secrets(found.url)
            print_json({"store": shown, "kept": arguments.keep, "dry_run": arguments.dry_run, "removed": row})
            return 0
        verb = "would be removed" if arguments.dry_run else "removed"
        rest = f" and {row['left_over']} left-overs" if row["left_over"] else ""
        console().print(f"{row['artifacts']:,} artifacts{rest} {verb}: {byte_count(row['bytes'])}", markup=False)
        return 0

    return finish


def _time(folder: Folder) -> str:
    return "" if folder.modified is None else folder.modified.astimezone().isoformat(timespec="seconds")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else str(value)
