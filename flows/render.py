"""The results of commands for display: tables in the terminal, Markdown for Prefect's pages."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import IO, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows.progress import format_seconds
from mlorq.numbers import byte_count, byte_size, number

DEFAULT_WIDTH = 110  # columns, if the output is not a terminal
LONG_FACTS = ("seconds by step", "reused")  # rows of a result with long values
MOST_NAMED = 5  # weights that stay float, in the totals of a result


def console(stream: IO[str] | None = None) -> Console:
    """A console on standard output."""
    stream = stream or sys.stdout
    return Console(file=stream, width=None if stream.isatty() else DEFAULT_WIDTH, highlight=False, soft_wrap=False)


def kinds(rest: Mapping[str, int] | None) -> str:
    """Sizes of the float rest by kind, largest first: ``: embeddings 46.9 MB, norms 0.1 MB``."""
    shown = sorted(((count, kind) for kind, count in (rest or {}).items() if count), reverse=True)
    parts = []
    for count, kind in shown:
        name = "skipped layers" if kind == "layers" else kind.replace("_", " ")
        parts.append(f"{name} {byte_size(count)}")
    return ": " + ", ".join(parts) if parts else ""


def bits_of(row: Mapping[str, Any]) -> str:
    """A candidate's bit-widths: ``4``, ``6/4 rank 32`` (left factor / right factor), or both: ``3 + 4/4 rank 8``."""
    parts = [] if row["bits"] is None else [str(row["bits"])]
    parts += [] if row["rank"] is None else [f"{row['bits_a']}/{row['bits_b']} rank {row['rank']}"]
    return " + ".join(parts)


def facts(pairs: Iterable[tuple[str, str]]) -> Table:
    """A table of names and values, without borders."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in pairs:
        table.add_row(name, Text(value))
    return table


def grid(columns: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[str] = ()) -> Table:
    """A table with a header; the columns named in ``right`` are aligned to the right."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", overflow="fold", no_wrap=name in right)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


# -- compress -----------------------------------------------------------------------------------------------------


def allocation_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The chosen candidate of every layer."""
    cells = [
        (row["layer"], row["form"], bits_of(row), f"{row['bytes']:,}", f"{row['global_cost']:.3e}") for row in rows
    ]
    return grid(("layer", "form", "bits", "bytes", "cost"), cells, right=("bytes", "cost"))


def result_facts(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Totals of one result; unknown ones are omitted."""
    pairs = [
        ("run", result["run"]),
        ("budget", f"{result['budget']} = {byte_count(result['budget_bytes'])}"),
        ("compressible layers", byte_count(result["bytes"])),
    ]
    if result.get("float_bytes"):
        ratio = result["float_bytes"] / max(1, result["bytes"])
        pairs[-1] = ("compressible layers", f"{byte_count(result['bytes'])}, {ratio:.2f} times smaller than float32")
        pairs.append(("float32 size", byte_count(result["float_bytes"])))
    if result.get("checkpoint"):
        if result.get("embedding_bytes"):
            pairs.append(("embedding tables", byte_count(result["embedding_bytes"])))
        pairs.append(("rest of the model", byte_count(result["rest_bytes"]) + kinds(result.get("rest"))))
        pairs.append(("checkpoint on disk", byte_count(result["file_bytes"])))
    if result.get("memory"):
        pairs.append((f"memory in {result['memory']['target']}", _memory(result["memory"])))
    if result.get("left_float"):
        pairs.append(("left float", _left_float(result["left_float"])))
    if result.get("activations"):
        pairs.append(("activations", _quantized(result["activations"])))
    pairs.append(("predicted cost", f"{result['predicted_cost']:.4e}"))
    if result.get("nmse") is not None:
        pairs.append(("output NMSE", f"{result['nmse']:.6f} ({result.get('nmse_data', 'evaluation')} data)"))
    metric = result.get("metric")
    if metric:
        pairs.append((metric["name"], f"float {metric['float']:.4f}, compressed {metric['compressed']:.4f}"))
    if result.get("goal"):
        pairs.append(("goal", f"{'kept' if result['goal']['kept'] else 'missed'}: {result['goal']['about']}"))
    for line in (result.get("calibration") or {}).get("warnings", ()):
        pairs.append(("warning", line))
    for exported in result.get("exports") or ():
        pairs.append((f"export to {exported['to']}", f"{byte_count(exported['bytes'])}, {_written(exported['files'])}"))
    solver = result["solver"]
    gap = "" if solver.get("gap") is None else f", gap {solver['gap']:.1e}"
    before = " (reused)" if {"allocate", "joint"} & result.get("seconds_reused", {}).keys() else ""
    pairs.append(("solver", f"{solver['name']}: {solver['status']}{gap}, {format_seconds(solver['seconds'])}{before}"))
    if result.get("seconds"):
        pairs.append(("seconds by step", _seconds(result["seconds"])))
    if result.get("seconds_reused"):
        pairs.append(("reused", f"{_seconds(result['seconds_reused'])} (seconds when computed, before)"))
    steps = result["steps"]
    pairs.append(("steps", f"{steps['computed']} computed, {steps['reused']} reused"))
    return pairs


def _seconds(by_step: Mapping[str, float]) -> str:
    return ", ".join(f"{step} {seconds:.1f}" for step, seconds in by_step.items())


def _memory(memory: Mapping[str, Any]) -> str:
    of = "" if memory["budget_bytes"] is None else f" of {byte_count(memory['budget_bytes'])}"
    return f"{byte_count(memory['bytes'])}{of}, of which the rest of the model {byte_count(memory['rest'])}"


def _left_float(rows: Sequence[Mapping[str, Any]]) -> str:
    """Weights that stay float: the largest by name, each with its bytes and the reason."""
    ordered = sorted(rows, key=lambda row: -row["bytes"])
    shown = [f"{row['name']} {byte_count(row['bytes'])} ({row['reason']})" for row in ordered[:MOST_NAMED]]
    more = [f"and {len(rows) - MOST_NAMED} more, in run.json"] if len(rows) > MOST_NAMED else []
    return "; ".join([*shown, *more])


def _written(files: Sequence[Mapping[str, Any]]) -> str:
    return files[0]["name"] if len(files) == 1 else f"{len(files)} files"


def exported_locations(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Target and location of every export of a result: of the file, or of the folder if it has several."""
    return [
        (exported["to"], exported["files"][0]["uri"] if len(exported["files"]) == 1 else exported["uri"])
        for exported in result.get("exports") or ()
    ]


def _quantized(activations: Mapping[str, Any]) -> str:
    widths = activations.get("activation_bits")
    if not widths:
        return f"{activations['bits']} bit, {activations['method']}"
    counts = Counter(widths.values())
    shares = ", ".join(f"{counts[bits]} x {bits} bit" for bits in sorted(counts))
    share = activations["bit_operations"] / activations["compute"]
    operations = f"{activations['bit_operations']:.3g} bit operations per sample, {share:.1%} of the budget"
    return f"{shares}, {activations['method']}; {operations}"


def print_result(result: Mapping[str, Any], out: Console, *, load: str | None = None) -> None:
    """Print the result of ``mlorq compress``.

    Args:
        result: the public result object.
        out: the console.
        load: Python code that loads the checkpoint.
    """
    out.print(allocation_table(result["allocation"]))
    out.print()
    out.print(facts(result_facts(result)))
    # Without line breaks, so that they can be copied.
    if result.get("checkpoint"):
        out.print(f"\ncheckpoint: {result['checkpoint']}", markup=False, soft_wrap=True)
    for target, uri in exported_locations(result):
        out.print(f"export to {target}: {uri}", markup=False, soft_wrap=True)
    if load:
        out.print(f"load it with: {load}", markup=False, soft_wrap=True)


def result_markdown(result: Mapping[str, Any], files: Mapping[str, str] | None = None) -> str:
    """One result as a Markdown page.

    Args:
        result: the public result object.
        files: URIs of the run's files in the store, by name.
    """
    # Prefect's pages do not wrap lines inside tables: long values follow below.
    pairs = result_facts(result)
    lines = [f"# {result['run']}", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in pairs if name not in LONG_FACTS]
    lines.append("")
    lines += [f"- {name}: {value}" for name, value in pairs if name in LONG_FACTS]
    if result.get("checkpoint"):
        lines.append(f"- checkpoint: {location_markdown(result['checkpoint'])}")
    lines += [f"- export to {target}: {location_markdown(uri)}" for target, uri in exported_locations(result)]
    lines += [f"- {name}: {location_markdown(uri)}" for name, uri in (files or {}).items()]
    if result.get("checkpoint"):
        where = result["checkpoint"].removeprefix("file://")
        lines += ["", "```python", "import mlorq", "", f'model = mlorq.load("{where}")', "```"]
    return "\n".join(lines) + "\n"


def location_markdown(uri: str) -> str:
    """A location in the store: a link if a browser can open it, else text to copy.

    Browsers open neither ``s3://`` nor, from a page loaded over the network, ``file://``.
    """
    return f"[{uri}]({uri})" if uri.startswith(("http://", "https://")) else f"`{uri}`"


def picture_markdown(title: str, picture: bytes) -> str:
    """A picture embedded in a Markdown page. An image artifact would show the long data URL next to it."""
    from mlorq.evaluation.report import data_url, small_picture

    return f"![{title}]({data_url(small_picture(picture))})\n"


def budgets_table(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The result of a run, one row per budget."""
    rows = []
    for result in results:
        row = {"run": result["run"], "budget": result["budget"], "bytes": result["bytes"]}
        if result.get("float_bytes"):
            row |= {
                "file_bytes": result["file_bytes"],
                "float_bytes": result["float_bytes"],
                "times_smaller": round(result["float_bytes"] / max(1, result["bytes"]), 2),
            }
        row["predicted_cost"] = result["predicted_cost"]
        if result.get("nmse") is not None:
            row["nmse"] = result["nmse"]
        metric = result.get("metric")
        if metric:
            row |= {metric["name"]: metric["compressed"], f"{metric['name']}_float": metric["float"]}
        rows.append(row | ({"checkpoint": result["checkpoint"]} if result.get("checkpoint") else {}))
    return rows


def result_line(result: Mapping[str, Any]) -> str:
    """One result as a line of the log."""
    parts = [f"{result['run']}: {byte_count(result['bytes'])} for the compressible layers"]
    if result.get("nmse") is not None:
        parts.append(f"output NMSE {result['nmse']:.4g}")
    metric = result.get("metric")
    if metric and metric["compressed"] is not None and metric["float"] is not None:
        parts.append(f"{metric['name']} {metric['compressed']:.4f} (float {metric['float']:.4f})")
    return ", ".join(parts)


# -- the other commands -------------------------------------------------------------------------------------------


def print_plan(plan: Mapping[str, Any], out: Console) -> None:
    """Print the report of a dry run."""
    cells = [
        (
            row["layer"],
            row["kind"],
            f"{row['out_features']} x {row['in_features']}",
            f"{row['params']:,}",
            f"{row['params'] / plan['params']:.1%}",
            f"{row['smallest_bytes']:,}",
        )
        for row in plan["layers"]
    ]
    right = ("weights", "share", "smallest bytes")
    out.print(grid(("layer", "kind", "shape", "weights", "share", "smallest bytes"), cells, right=right))
    for row in plan["skipped"]:
        out.print(f"skipped: {row['layer']} ({row['reason']}; {byte_count(row['bytes'])})", markup=False)
    for row in plan["blocks"]:
        count, width = row["in_features"] // row["width"], row["width"]
        out.print(
            f"in blocks: {row['layer']} (correlations between {count} blocks of {width:,} inputs are left out)",
            markup=False,
        )
    for row in plan["others"]:
        out.print(f"stays float: {row['name']} ({row['reason']}; {byte_count(row['bytes'])})", markup=False)
    tables = plan["embeddings"] or {"tables": [], "skipped": []}
    for name in tables["tables"]:
        out.print(f"embedding table: {name} ({tables['bits']} bit)", markup=False)
    shown = {row["name"] for row in plan["others"]}
    for row in tables["skipped"]:
        if row["table"] in shown:
            continue
        out.print(f"stays float: {row['table']} ({row['reason']})", markup=False)
    out.print()
    pairs = [
        ("compressible layers", f"{len(plan['layers'])} with {plan['params']:,} weights"),
        ("float32 size", byte_count(plan["float_bytes"])),
        ("smallest possible", f"{byte_count(plan['smallest_bytes'])}; whole checkpoint at most "
                              f"{byte_count(plan['smallest_file_bytes'])}"),
    ]  # fmt: skip
    if "target" in plan:
        pairs.append((f"smallest in {plan['target']}", byte_count(plan["smallest_memory_bytes"])))
    pairs.append(("stays float", kinds(plan["rest"]).removeprefix(": ")))
    for row in plan["budgets"]:
        verdict = "" if row["feasible"] else ": impossible"
        pairs.append(
            (f"budget {row['budget']}", f"{byte_count(row['budget_bytes'])} for the compressible layers{verdict}")
        )
    out.print(facts(pairs))
    out.print()
    steps = [
        (step, str(row["compute"]), str(row["reused"]), format_seconds(row["seconds"]) if row["compute"] else "")
        for step, row in plan["steps"].items()
    ]
    columns = ("step", "to compute", "in the store", "about")
    out.print(grid(columns, steps, right=columns[1:]))
    out.print()
    expected = plan["expected"]
    out.print(
        f"expected: about {format_seconds(expected['seconds'])} and {byte_size(expected['memory_bytes'])} of memory "
        f"on {plan['device']} ({expected['note']})",
        markup=False,
    )


def print_budgets(results: Sequence[Mapping[str, Any]], out: Console) -> None:
    """Print the result of ``mlorq sweep``."""
    cells = []
    for result in results:
        metric = result["metric"]
        value = "" if metric is None else f"{metric['name']} {metric['compressed']:.4f} (float {metric['float']:.4f})"
        smaller = f"{result['float_bytes'] / max(1, result['bytes']):.2f}"
        cells.append((result["run"], result["budget"], f"{result['bytes']:,}", smaller, f"{result['nmse']:.3e}", value))
    columns = ("run", "budget", "bytes", "times smaller", "nmse", "metric")
    out.print(grid(columns, cells, right=("bytes", "times smaller", "nmse")))
    out.print()


def forms_column() -> str:
    """Name of the column that counts the layers in each form."""
    from mlorq.forms.base import FORMS  # it imports NumPy, which lists of results do without

    return " / ".join(form.name for form in FORMS)


def print_comparison(rows: Sequence[Mapping[str, Any]], out: Console) -> None:
    """Print the table of ``mlorq compare``."""
    forms = forms_column()
    cells = []
    for row in rows:
        metric, before = row["metric"], row["metric_float"]
        shown = "" if metric is None else f"{metric:.4f}"
        against = "" if before is None else f"{before:.4f}"
        activations = "float" if row["activations"] is None else f"{row['activations']}"
        cells.append(
            (
                row["budget"],
                activations,
                row["title"],
                shown,
                against,
                f"{row['nmse']:.4f}",
                f"{row['bytes']:,}",
                row[forms],
                f"{row['seconds']:.0f}",
            )
        )
    name = rows[0]["metric_name"] or "metric"
    columns = ("budget", "activations", "method", name, "float", "nmse", "bytes", forms, "seconds")
    out.print(grid(columns, cells, right=(name, "float", "nmse", "bytes", "seconds")))
    out.print()


def print_runs(runs: Sequence[Mapping[str, Any]], out: Console) -> None:
    """Print the list of ``mlorq runs``."""
    cells = []
    for run in runs:
        metric = run["metric"]
        value = "" if metric is None else f"{metric['name']} {metric['compressed']:.4f} (float {metric['float']:.4f})"
        cells.append(
            (
                run["run"],
                run["model"],
                run["budget"],
                f"{run['bytes']:,}",
                f"{run['nmse']:.3e}",
                value,
                run["created"][:16],
            )
        )
    out.print(grid(("run", "model", "budget", "bytes", "nmse", "metric", "date"), cells, right=("bytes", "nmse")))


def print_allocations(rows: Sequence[Mapping[str, Any]], out: Console) -> None:
    """Print the allocations alone of ``mlorq runs``; nothing if there are none."""
    if not rows:
        return
    cells = [
        (
            row["run"],
            row["model"] or "unknown",
            row["budget"],
            f"{row['bytes']:,}",
            f"{row['predicted_cost']:.3e}",
            row["created"][:16],
        )
        for row in rows
    ]
    out.print("\nallocations alone (mlorq rebudget CONFIG --budget B makes the model and measures it):", markup=False)
    columns = ("run", "model", "budget", "bytes", "predicted cost", "date")
    out.print(grid(columns, cells, right=("bytes", "predicted cost")))


def figure_lines(figures: Mapping[str, Any], meanings: Mapping[str, str]) -> list[str]:
    """Figures of an export with their meanings: ``difference: 4.5e-7 (largest error of …)``."""
    lines = []
    for name, value in figures.items():
        shown = byte_count(value) if name == "bytes" else _figure(value)
        lines.append(f"{name}: {shown}" + (f" ({meanings[name]})" if name in meanings else ""))
    return lines


def _figure(value: Any) -> str:
    if isinstance(value, float):
        return number(value)
    return ", ".join(f"{key} {_figure(one)}" for key, one in value.items()) if isinstance(value, dict) else str(value)


def print_models(rows: Sequence[Mapping[str, str]], out: Console) -> None:
    """The output of ``mlorq models``: one row per kind of model, then the measured results with their commands."""
    columns = ("model", "family", "task", "tested")
    out.print(grid(columns, [tuple(row[name] for name in columns) for row in rows]))
    out.print("\nmeasured, on real weights and data:", markup=False)
    out.print(facts((row["model"], f"{row['measured']} ({row['command']})") for row in rows if row["measured"]))
    out.print("\nto run the others completely, with random weights:", markup=False)
    for row in rows:
        if row["command"] and not row["measured"]:
            out.print(f"  {row['command']}", markup=False, soft_wrap=True)
