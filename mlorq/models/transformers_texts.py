"""Tokenizers of models from transformers, with the checks that transformers leaves out.

For a folder without a vocabulary, transformers builds a tokenizer that knows its special tokens alone, and every text
becomes a row of unknown tokens.
"""

from __future__ import annotations

from typing import Any

from mlorq.errors import ModelError
from mlorq.models.transformers_inputs import longest_text

# Architectures with a table of positions: a longer text is an index error in their embeddings.
POSITIONS = {
    *("albert", "bart", "bert", "camembert", "distilbert", "electra", "gpt2", "marian", "mbart", "mpnet", "pegasus"),
    *("roberta", "xlm-roberta"),
}


def load_tokenizer(location: str, name: str) -> Any:
    """The tokenizer of a folder or a hub name; texts are cut at the model's number of positions.

    Args:
        location: the folder or the hub name.
        name: the model's name, for errors.

    Raises:
        ModelError: the vocabulary or a padding token is missing.
        OSError, ValueError, KeyError, TypeError: transformers cannot load the tokenizer.
    """
    from transformers import AutoConfig, AutoTokenizer

    found = AutoTokenizer.from_pretrained(location)
    config = AutoConfig.from_pretrained(location)
    _check_vocabulary(found, name)
    if found.pad_token is None:
        found.pad_token = _padding(found, config, name)
    if config.model_type in POSITIONS:
        longest = longest_text(config.to_dict())
        found.model_max_length = min(found.model_max_length, longest or found.model_max_length)
    return found


def _check_vocabulary(found: Any, name: str) -> None:
    special = {*found.all_special_tokens, *found.get_added_vocab()}
    # Empty sentencepiece models have the mark of a word's begin as a token.
    if not any(token.strip("▁ ") for token in found.get_vocab() if token not in special):
        file = type(found).vocab_files_names.get("vocab_file")
        files = "tokenizer.json" + (f" or {file}" if file else "")
        raise ModelError(f"model {name!r} has no tokenizer: {files} is missing beside its weights")


def _padding(found: Any, config: Any, name: str) -> str:
    """The token with the padding number of the model's configuration."""
    number = getattr(config, "pad_token_id", None)
    if number is None or not 0 <= number < len(found):
        raise ModelError(
            f"model {name!r}: its tokenizer has no padding token: set pad_token in tokenizer_config.json, or "
            "pad_token_id in config.json"
        )
    token: str = found.convert_ids_to_tokens(number)
    return token
