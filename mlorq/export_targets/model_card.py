"""The model card of a compressed model: ``README.md`` of its folder, with the metadata that the hub reads.

The card says what the checkpoint and the run's result say. What is not known is left out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import yaml

from mlorq.forms.base import FORMS, Candidate
from mlorq.numbers import byte_count

# Tasks with another name on the hub.
PIPELINES = dict.fromkeys(("instance-segmentation", "semantic-segmentation"), "image-segmentation")


@dataclass(frozen=True)
class CardFacts:
    """What a card is written from.

    Attributes:
        title: name of the float model.
        info: result of ``mlorq.checkpoint.io.inspect``.
        result: result object of the run, or empty.
        auto_class: class of transformers that loads the folder.
        files: names of the files in the folder.
        file_bytes: bytes of ``model.safetensors`` and ``config.json`` in the folder.
        base_model: name of the float model on the hub, or None.
        source_facts: licence and languages of the float model, as its card has them.
        data: the calibration data in words, or None.
        package: package that transformers needs to load the folder; ``mlorq`` has to be imported first.
    """

    title: str
    info: Mapping[str, Any]
    auto_class: str
    files: Sequence[str]
    file_bytes: int
    result: Mapping[str, Any] = field(default_factory=dict)
    base_model: str | None = None
    source_facts: Mapping[str, Any] = field(default_factory=dict)
    data: str | None = None
    package: str = "mlorq"

    @property
    def sentences(self) -> bool:
        """Whether sentence-transformers can load the folder."""
        return "modules.json" in self.files

    @property
    def task(self) -> str | None:
        """The task of the model on the hub."""
        task: str | None = self.info["architecture"].get("task")
        if task is None and self.auto_class == "AutoModelForImageClassification":
            return "image-classification"
        return PIPELINES.get(task, task) if task else None


def model_card(facts: CardFacts) -> str:
    """The card as Markdown with YAML front matter."""
    parts = [_sizes(facts), _use(facts), _metrics(facts), _allocation(facts), _data(facts)]
    asked = (facts.info.get("budget") or {}).get("asked")
    title = f"# {facts.title}, compressed{f' to {asked}' if asked else ''} with mlorq"
    return "\n\n".join([_front_matter(facts) + title, *(part for part in parts if part)]) + "\n"


def _front_matter(facts: CardFacts) -> str:
    found: dict[str, Any] = {"library_name": "sentence-transformers" if facts.sentences else "transformers"}
    if facts.task:
        found["pipeline_tag"] = facts.task
    if facts.base_model:
        found |= {"base_model": facts.base_model, "base_model_relation": "quantized"}
    found |= facts.source_facts
    found["tags"] = ["mlorq", "quantized", *([facts.package] if facts.package != "mlorq" else ["mixed-precision"])]
    return f"---\n{yaml.safe_dump(found, sort_keys=False, allow_unicode=True)}---\n\n"


def _sizes(facts: CardFacts) -> str:
    sizes, budget = facts.info["sizes"], facts.info.get("budget") or {}
    weights = sum(_weights(row) for row in facts.info["layers"] if row["kind"] != "embedding")
    rows = [("compressed layers", f"{sizes['bytes']:,}", f"{sizes['float_bytes']:,}")]
    if "embedding_bytes" in sizes:
        tables = sum(_weights(row) for row in facts.info["layers"] if row["kind"] == "embedding")
        rows.append(("quantized embedding tables", f"{sizes['embedding_bytes']:,}", f"{4 * tables:,}"))
    rows.append(("all other tensors", f"{sizes['rest_bytes']:,}", ""))
    rows.append(("`model.safetensors` and `config.json`", f"{facts.file_bytes:,}", ""))
    lines = [_table(("", "bytes", "in float32"), rows)]
    if weights:
        lines.append(f"The compressed layers have {8 * sizes['bytes'] / weights:.3f} bits per weight.")
    if budget.get("budget_bytes") is not None:
        counted = f", counted as `{budget['accounting']}`" if budget.get("accounting") else ""
        lines.append(f"The budget was {budget['asked']}: {byte_count(budget['budget_bytes'])}{counted}.")
    plan = facts.info.get("activations") or {}
    if plan.get("sites"):
        widths = sorted({site["quantizer"]["bits"] for site in plan["sites"]})
        lines.append(f"{len(plan['sites'])} activations are quantized, to {_listed(widths)} bits.")
    return "\n\n".join([lines[0], " ".join(lines[1:])])


def _use(facts: CardFacts) -> str:
    first = ["import mlorq  # registers the format in transformers"] if facts.package == "mlorq" else []
    load = [f"from transformers import {facts.auto_class}", ""]
    load.append(f'model = {facts.auto_class}.from_pretrained("FOLDER_OR_NAME")')
    lines = ["## Use", "", f"With {facts.package} installed:", "", "```python", *first, *load, "```"]
    if facts.sentences and "tokenizer_config.json" in facts.files:
        encode = 'embeddings = SentenceTransformer("FOLDER_OR_NAME").encode(["a sentence"])'
        lines += ["", "```python", *first, "from sentence_transformers import SentenceTransformer", "", encode, "```"]
    if missing := _missing(facts):
        lines += ["", f"The folder has no {missing}: use the float model's."]
    return "\n".join(lines)


def _missing(facts: CardFacts) -> str | None:
    if facts.info["architecture"].get("family") == "timm":
        return None  # the wrapper's config.json has the preprocessing
    known = {name.partition(".")[0] for name in facts.files}
    if known & {"tokenizer", "tokenizer_config", "vocab", "spiece", "preprocessor_config", "processor_config"}:
        return None
    return "tokenizer" if "vocab_size" in facts.info["architecture"].get("config", {}) else "image processor"


def _metrics(facts: CardFacts) -> str:
    result = facts.result
    both = result.get("metrics") or {}
    measured = both.get("compressed") or {}
    rows = [(name, _number(both.get("float", {}).get(name)), _number(value)) for name, value in measured.items()]
    lines = [_table(("metric", "float model", "this model"), rows)] if rows else []
    if result.get("nmse") is not None:
        where = f", on the {result['nmse_data']} data" if result.get("nmse_data") else ""
        lines.append(f"Normalised mean squared error of the output{where}: {result['nmse']:.6f}.")
    return "\n\n".join(["## Metrics", *lines]) if lines else ""


def _allocation(facts: CardFacts) -> str:
    rows = facts.info["layers"]
    groups: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[_label(row)].append(row)
    summary = [
        (
            label,
            FORMS[group[0]["form"]].label,
            str(len(group)),
            f"{sum(map(_weights, group)):,}",
            f"{sum(row['bytes'] for row in group):,}",
        )
        for label, group in sorted(groups.items())
    ]
    layers = [
        (f"`{row['layer']}`", " × ".join(map(str, row["shape"])), _label(row), f"{row['bytes']:,}") for row in rows
    ]
    return "\n\n".join(
        [
            "## Allocation",
            _table(("name", "form", "layers", "weights", "bytes"), summary),
            "<details><summary>All layers</summary>",
            _table(("layer", "shape", "form", "bytes"), layers),
            "</details>",
        ]
    )


def _data(facts: CardFacts) -> str:
    digest = (facts.info.get("hashes") or {}).get("calibration")
    lines = [facts.data] if facts.data else []
    if digest:
        lines.append(f"The hash of the samples is `{digest}`.")
    return "\n\n".join(["## Calibration data", " ".join(lines)]) if lines else ""


def _label(row: Mapping[str, Any]) -> str:
    return Candidate.of_row(row).candidate_id


def _weights(row: Mapping[str, Any]) -> int:
    return torch.Size(row["shape"]).numel()


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, (int, float)) else ""


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
