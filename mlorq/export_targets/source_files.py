"""Files of a compressed model's folder that are not its weights: of the float model's folder, and sentence modules."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import yaml

from mlorq.errors import ConfigError
from mlorq.models.preparation import preparation_files, read_file
from mlorq.models.sentence import KEYS, MODULES, SentenceEmbedding
from mlorq.models.tasks import PAIRS
from mlorq.models.transformers import TransformersSettings, locate

CARD = "README.md"
OPTION = "option source"
CARD_KEYS = ("license", "license_name", "license_link", "language")  # also true of the compressed model


def prepared_files(source: str, architecture: Mapping[str, Any]) -> dict[str, bytes]:
    """Files of the tokenizer or image processor, by name.

    Args:
        source: name or folder of the float model.
        architecture: architecture of the checkpoint.

    Raises:
        ModelError: the folder does not exist, or the hub refuses a request.
        ConfigError: there is no such file.
    """
    kept = preparation_files(TransformersSettings(name=source, task=architecture.get("task")), os.getcwd(), OPTION)
    if not kept and architecture.get("family") != "timm":
        raise ConfigError(
            f"source {source!r} has no file of a tokenizer or image processor: give the folder or the hub name of the "
            "float model"
        )
    return kept


def card_facts(source: str) -> dict[str, Any]:
    """What the float model's card says that is also true of the compressed one: licence and languages.

    Args:
        source: name or folder of the float model.
    """
    data = read_file(_located(source), CARD, source)
    facts = {} if data is None else front_matter(data)
    return {key: facts[key] for key in CARD_KEYS if key in facts}


def front_matter(card: bytes) -> dict[str, Any]:
    """The metadata at the beginning of a model card; empty if there is none."""
    text = card.decode(errors="replace")
    if not text.startswith("---\n"):
        return {}
    try:
        facts = yaml.safe_load(text[4:].partition("\n---")[0])
    except (yaml.YAMLError, ValueError, RecursionError):  # of dates and numbers, and of deep nesting
        return {}
    return facts if isinstance(facts, dict) else {}


def hub_name(source: str) -> str | None:
    """The source as a name on the hub; None if it is a folder on this machine."""
    return None if os.path.isdir(_located(source)) else source


def sentence_modules(architecture: Mapping[str, Any]) -> dict[str, bytes]:
    """``modules.json`` of sentence-transformers and the files that it names; empty for other models."""
    if architecture.get("task") != PAIRS:
        return {}
    default = SentenceEmbedding()
    pooling = architecture.get("pooling", default.pooling)
    kinds = ["Transformer", "Pooling", *(["Normalize"] if architecture.get("normalised", default.normalised) else [])]
    modules = [
        {
            "idx": index,
            "name": str(index),
            "path": "" if index == 0 else f"{index}_{kind}",
            "type": f"sentence_transformers.models.{kind}",
        }
        for index, kind in enumerate(kinds)
    ]
    config = architecture["config"]
    modes: dict[str, Any] = {key: mode in pooling for key, mode in KEYS.items()}
    modes["word_embedding_dimension"] = config.get("hidden_size") or config["dim"]  # dim: DistilBERT
    return {MODULES: _json(modules), "1_Pooling/config.json": _json(modes)}


def _located(source: str) -> str:
    """Folder or hub name of a model."""
    return locate(TransformersSettings(name=source), os.getcwd(), OPTION)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
