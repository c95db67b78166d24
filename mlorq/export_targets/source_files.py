"""Files of a compressed model's folder that are not its weights: of the float model's folder, and sentence modules."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import yaml

from mlorq.errors import ConfigError
from mlorq.models.sentence import KEYS, MODULES, SentenceEmbedding, read_embedding
from mlorq.models.sentence_files import find_file
from mlorq.models.transformers import PAIRS, TransformersSettings, locate

# Of tokenizers and image processors, as transformers writes them.
PREPARATION = (
    "added_tokens.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "spm.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "unigram.json",
    "vocab.json",
    "vocab.txt",
)
# Of sentence-transformers: lengths of texts, prompts and similarity.
SENTENCE_SETTINGS = ("config_sentence_transformers.json", "sentence_bert_config.json")
CARD = "README.md"
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
    location, inside = _located(source, architecture)
    names = PREPARATION
    found = {name: _read(location, os.path.join(inside, name), source) for name in names}
    if architecture.get("task") == PAIRS:
        found |= {name: _read(location, name, source) for name in SENTENCE_SETTINGS}
        if found[SENTENCE_SETTINGS[1]] is None and inside:
            found[SENTENCE_SETTINGS[1]] = _read(location, os.path.join(inside, SENTENCE_SETTINGS[1]), source)
    kept = {name: data for name, data in found.items() if data is not None}
    if not kept and architecture.get("family") != "timm":
        raise ConfigError(
            f"source {source!r} has no file of a tokenizer or image processor: give the folder or the hub name of the "
            "float model"
        )
    return kept


def card_facts(source: str, architecture: Mapping[str, Any]) -> dict[str, Any]:
    """What the float model's card says that is also true of the compressed one: licence and languages.

    Args:
        source: name or folder of the float model.
        architecture: architecture of the checkpoint.
    """
    data = _read(_located(source, architecture)[0], CARD, source)
    facts = {} if data is None else front_matter(data)
    return {key: facts[key] for key in CARD_KEYS if key in facts}


def front_matter(card: bytes) -> dict[str, Any]:
    """The metadata at the beginning of a model card; empty if there is none."""
    text = card.decode(errors="replace")
    if not text.startswith("---\n"):
        return {}
    try:
        facts = yaml.safe_load(text[4:].partition("\n---")[0])
    except yaml.YAMLError:
        return {}
    return facts if isinstance(facts, dict) else {}


def hub_name(source: str, architecture: Mapping[str, Any]) -> str | None:
    """The source as a name on the hub; None if it is a folder on this machine."""
    return None if os.path.isdir(_located(source, architecture)[0]) else source


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


def _located(source: str, architecture: Mapping[str, Any]) -> tuple[str, str]:
    """Folder or hub name of a model, and the transformer's folder in it."""
    location = locate(TransformersSettings(name=source), os.getcwd())
    inside = read_embedding(location, source).inside if architecture.get("task") == PAIRS else ""
    return location, inside


def _read(location: str, file: str, name: str) -> bytes | None:
    path = find_file(location, file, name)
    if path is None:
        return None
    with open(path, "rb") as opened:
        return opened.read()


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
