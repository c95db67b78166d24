"""Files that prepare inputs or read outputs of a model: the names that count, and reading them where the model is."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from mlorq.models.sentence_files import find_file
from mlorq.models.tasks import PAIRS, SPEECH, TARGETS

if TYPE_CHECKING:
    from mlorq.models.transformers import TransformersSettings

# Of tokenizers, image processors and feature extractors, as transformers writes them.
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
# Of models that generate texts: settings of generation, Whisper's spellings, Marian's two vocabularies.
GENERATION = ("generation_config.json", "normalizer.json", "source.spm", "target.spm")


def preparation_files(settings: TransformersSettings, folder: str = "", named: str | None = None) -> dict[str, bytes]:
    """Files of the tokenizer or image processor of a model from transformers, by name; empty if there are none.

    Args:
        settings: settings of the model.
        folder: folder that relative paths start from.
        named: the option that holds the model's name, for errors; None: the key of the configuration.

    Raises:
        ModelError: the folder does not exist, or the hub refuses a request.
    """
    from mlorq.models.sentence import read_embedding
    from mlorq.models.transformers import MODEL_NAME, locate

    location, name = locate(settings, folder, named or MODEL_NAME), settings.name or ""
    inside = read_embedding(location, name).inside if settings.task == PAIRS else ""
    found = {file: read_file(location, os.path.join(inside, file), name) for file in PREPARATION}
    if settings.task in (TARGETS, SPEECH):
        found |= {file: read_file(location, file, name) for file in GENERATION}
    if settings.task == PAIRS:
        found |= {file: read_file(location, file, name) for file in SENTENCE_SETTINGS}
        if found[SENTENCE_SETTINGS[1]] is None and inside:
            found[SENTENCE_SETTINGS[1]] = read_file(location, os.path.join(inside, SENTENCE_SETTINGS[1]), name)
    return {file: data for file, data in found.items() if data is not None}


def read_file(location: str, file: str, name: str) -> bytes | None:
    """The bytes of a file in a folder or on the hub; None if it does not exist. Arguments as in ``find_file``."""
    path = find_file(location, file, name)
    if path is None:
        return None
    with open(path, "rb") as opened:
        return opened.read()
