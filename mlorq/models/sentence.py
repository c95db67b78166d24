"""Sentence embeddings from the tokens of a transformer: pooling, dense layers and normalisation.

A folder of the sentence-transformers library lists its modules in ``modules.json``: a transformer, a pooling (``mean``,
``max`` or ``cls``, the first token that is not padding), optional dense layers, and an optional normalisation. Without
that file the embedding is the L2-normalised mean. The compressed module is the transformer; if there are dense layers
it is a ``SentenceEncoder``, so that they are compressed, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlorq.errors import ModelError
from mlorq.models.batches import Batch
from mlorq.models.sentence_dense import Dense, DenseSettings, load_weights, read_settings
from mlorq.models.sentence_files import read_json

MODULES = "modules.json"
# In the order in which sentence-transformers concatenates several of them.
POOLINGS = ("cls", "max", "mean")
KEYS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


@dataclass(frozen=True)
class SentenceEmbedding:
    """The forward of a sentence encoder.

    Attributes:
        pooling: pooling modes; the results of several are concatenated.
        normalised: whether the embedding is L2-normalised.
        inside: folder of the transformer, relative to the folder of the encoder.
        dense: layers between pooling and normalisation, each with its folder.
    """

    pooling: tuple[str, ...] = ("mean",)
    normalised: bool = True
    inside: str = ""
    dense: tuple[tuple[DenseSettings, str], ...] = ()

    def __call__(self, module: nn.Module, batch: Batch) -> Tensor:
        """Embeddings, ``(samples, width)`` float32, independent of padding.

        Args:
            module: the transformer, or a ``SentenceEncoder``.
            batch: the output of a tokenizer, including ``attention_mask``.
        """
        if isinstance(module, SentenceEncoder):
            found: Tensor = module(**batch)
            return found
        return _finished(self.pooled(module, batch), self.normalised)

    def pooled(self, transformer: nn.Module, batch: Batch) -> Tensor:
        """The pooled tokens of a transformer, ``(samples, width)`` float32."""
        return self._pool(transformer(**batch).last_hidden_state, batch["attention_mask"])

    def embed(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Embeddings without dense layers, ``(samples, width)`` float32.

        Args:
            hidden: last hidden states of the transformer, ``(samples, tokens, width)``.
            mask: the attention mask, ``(samples, tokens)``.
        """
        return _finished(self._pool(hidden, mask), self.normalised)

    def _pool(self, hidden: Tensor, mask: Tensor) -> Tensor:
        hidden, mask = hidden.float(), mask.to(hidden.device)
        return torch.cat([_pooled(kind, hidden, mask) for kind in self.pooling], 1)

    @classmethod
    def of_architecture(cls, architecture: Mapping[str, Any]) -> SentenceEmbedding:
        """The inverse of ``described``, without dense layers."""
        return cls(tuple(architecture.get("pooling", ("mean",))), bool(architecture.get("normalised", True)))

    def described(self) -> dict[str, Any]:
        """Its entries in an architecture; empty for the default, the normalised mean without dense layers."""
        if (self.pooling, self.normalised, self.dense) == (("mean",), True, ()):
            return {}
        found = {"pooling": list(self.pooling), "normalised": self.normalised}
        return found | ({"dense": [settings.described() for settings, _ in self.dense]} if self.dense else {})


class SentenceEncoder(nn.Module):
    """A transformer with pooling, dense layers and optional normalisation; its forward returns embeddings."""

    def __init__(
        self, transformer: nn.Module, pooling: Sequence[str], normalised: bool, dense: Sequence[DenseSettings]
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self.dense = nn.ModuleList(Dense(settings) for settings in dense)
        self.embedding = SentenceEmbedding(tuple(pooling), normalised)

    def forward(self, **batch: Tensor) -> Tensor:
        """Embeddings, ``(samples, width)`` float32, of a tokenizer's output, including ``attention_mask``."""
        found = self.embedding.pooled(self.transformer, batch)
        found = found.to(next(self.transformer.parameters()).dtype)
        for layer in self.dense:
            found = layer(found)
        return _finished(found.float(), self.embedding.normalised)


def with_dense(transformer: nn.Module, embedding: SentenceEmbedding, location: str, name: str) -> SentenceEncoder:
    """A transformer with the dense layers of its encoder, in the transformer's dtype.

    Args:
        transformer: the transformer with its weights.
        embedding: the result of ``read_embedding``.
        location: folder or hub name of the encoder.
        name: name of the model, for messages.

    Raises:
        ModelError: weights are missing or damaged, or the width of a layer differs from that of its input.
    """
    settings = [each for each, _ in embedding.dense]
    width = int(transformer.config.hidden_size) * len(embedding.pooling)  # type: ignore[arg-type, union-attr]
    for each, folder in embedding.dense:
        if each.in_features != width:
            raise ModelError(f"model {name!r}: {folder} has in_features {each.in_features}, but its input has {width}")
        width = each.out_features
    module = SentenceEncoder(transformer, embedding.pooling, embedding.normalised, settings)
    for layer, (_, folder) in zip(module.dense, embedding.dense, strict=True):
        assert isinstance(layer, Dense)
        load_weights(layer, location, folder, name)
    module.dense.to(next(transformer.parameters()).dtype)
    return module


def rebuilt(transformer: nn.Module, architecture: Mapping[str, Any]) -> nn.Module:
    """The module of an architecture: a ``SentenceEncoder`` around the transformer; the latter if no dense layers."""
    if "dense" not in architecture:
        return transformer
    dense = [DenseSettings(**settings) for settings in architecture["dense"]]
    module = SentenceEncoder(transformer, architecture["pooling"], architecture["normalised"], dense)
    module.dense.to(next(transformer.parameters()).dtype)
    return module


def _finished(found: Tensor, normalised: bool) -> Tensor:
    return F.normalize(found, dim=1) if normalised else found


def _pooled(kind: str, hidden: Tensor, mask: Tensor) -> Tensor:
    """One vector per sample from ``hidden``, ``(samples, tokens, width)``, at the tokens in ``mask``."""
    counts = mask.unsqueeze(-1).to(hidden.dtype)
    if kind == "mean":
        return (hidden * counts).sum(1) / counts.sum(1).clamp(min=1)
    if kind == "max":
        return hidden.masked_fill(counts == 0, -torch.inf).amax(1)
    first = mask.int().argmax(1)  # not 0 if padding is on the left
    return hidden[torch.arange(len(hidden), device=hidden.device), first]


def read_embedding(location: str, name: str) -> SentenceEmbedding:
    """The embedding that a sentence encoder's ``modules.json`` describes; the normalised mean without that file.

    Args:
        location: folder or hub name of the encoder.
        name: name of the model, for messages.

    Raises:
        ModelError: a module or pooling mode is not supported, or a file is damaged.
    """
    modules = read_json(location, MODULES, name)
    if modules is None:
        return SentenceEmbedding()
    pooling: tuple[str, ...] | None = None
    normalised, inside = False, ""
    dense: list[tuple[DenseSettings, str]] = []
    try:
        listed = [(str(each["type"]), str(each["path"])) for each in modules]
    except (TypeError, KeyError):
        raise ModelError(
            f"model {name!r}: {MODULES} is malformed: expected a list of modules with type and path"
        ) from None
    for index, (kind, path) in enumerate(listed):
        short = kind.rpartition(".")[2]
        if index == 0 and short == "Transformer":
            inside = path
        elif short == "Pooling" and pooling is None and not normalised:
            pooling = _pooling(read_json(location, f"{path}/config.json", name), name, path)
        elif short == "Dense" and pooling is not None and not normalised:
            dense.append((read_settings(location, path, name), path))
        elif short == "Normalize" and pooling is not None:
            normalised = True
        else:
            raise ModelError(
                f"model {name!r}: module {index} ({short}) is not supported there; supported are a Transformer, one "
                "Pooling, then Dense layers and a Normalize"
            )
    if pooling is None:
        raise ModelError(f"model {name!r}: {MODULES} has no Pooling")
    return SentenceEmbedding(pooling, normalised, inside, tuple(dense))


def _pooling(settings: Any, name: str, path: str) -> tuple[str, ...]:
    if not isinstance(settings, Mapping):
        raise ModelError(f"model {name!r}: {path}/config.json with the settings of its pooling is missing")
    modes = settings.get("pooling_mode")
    if modes is None:
        modes = [mode for key, mode in KEYS.items() if settings.get(key)] or ["mean"]
    modes = (modes,) if isinstance(modes, str) else tuple(modes)
    for mode in modes:
        if mode not in POOLINGS:
            raise ModelError(f"model {name!r}: pooling {mode!r} is not supported; supported: {', '.join(POOLINGS)}")
    return modes
