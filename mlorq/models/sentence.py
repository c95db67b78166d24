"""How a sentence encoder's tokens become one vector: as its folder says, or by their mean, L2-normalised.

A folder of the sentence-transformers library lists its modules in ``modules.json``: a transformer, a pooling (``mean``,
``max`` or ``cls``, the first token that counts) and perhaps a normalisation. That is all of it here: what would need
weights of its own after the pooling, such as a dense layer, would be no part of the compressed checkpoint.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlorq.errors import ModelError
from mlorq.models.base import Batch

MODULES = "modules.json"
# In the order in which sentence-transformers puts several of them side by side.
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
        pooling: how tokens are put together; several are put side by side.
        normalised: whether the result has length one.
        inside: folder of the transformer in the encoder's folder.
    """

    pooling: tuple[str, ...] = ("mean",)
    normalised: bool = True
    inside: str = ""

    def __call__(self, module: nn.Module, batch: Batch) -> Tensor:
        """Embeddings, ``(samples, width)`` float32; padding has no part in them."""
        hidden = module(**batch).last_hidden_state.float()
        mask = batch["attention_mask"].to(hidden.device)
        found = torch.cat([_pooled(kind, hidden, mask) for kind in self.pooling], 1)
        return F.normalize(found, dim=1) if self.normalised else found

    def described(self) -> dict[str, Any]:
        """What an architecture says of it: nothing of the usual one."""
        if (self.pooling, self.normalised) == (("mean",), True):
            return {}
        return {"pooling": list(self.pooling), "normalised": self.normalised}


def _pooled(kind: str, hidden: Tensor, mask: Tensor) -> Tensor:
    """One vector a sample, of ``hidden`` ``(samples, tokens, width)`` where ``mask`` ``(samples, tokens)`` counts."""
    counts = mask.unsqueeze(-1).to(hidden.dtype)
    if kind == "mean":
        return (hidden * counts).sum(1) / counts.sum(1).clamp(min=1)
    if kind == "max":
        return hidden.masked_fill(counts == 0, -torch.inf).amax(1)
    first = mask.int().argmax(1)  # with padding on the left it is not the first place
    return hidden[torch.arange(len(hidden), device=hidden.device), first]


def read_embedding(location: str, name: str) -> SentenceEmbedding:
    """What an encoder's folder, or its files on the hub, say of its pooling.

    Args:
        location: the folder, or a hub name.
        name: of the model, for errors.

    Raises:
        ModelError: it has a module or a pooling that is not known here, or its files are damaged.
    """
    modules = _read_json(location, MODULES, name)
    if modules is None:
        return SentenceEmbedding()
    pooling: tuple[str, ...] | None = None
    normalised, inside = False, ""
    try:
        listed = [(str(each["type"]), str(each["path"])) for each in modules]
    except (TypeError, KeyError):
        raise ModelError(f"model {name!r}: {MODULES} lists no modules with type and path") from None
    for index, (kind, path) in enumerate(listed):
        short = kind.rpartition(".")[2]
        if index == 0 and short == "Transformer":
            inside = path
        elif short == "Pooling" and pooling is None and not normalised:
            pooling = _pooling(_read_json(location, f"{path}/config.json", name), name, path)
        elif short == "Normalize" and pooling is not None:
            normalised = True
        else:
            raise ModelError(
                f"model {name!r}: its module {index} ({short}) is not supported after a transformer; known are one "
                "Pooling and then a Normalize"
            )
    if pooling is None:
        raise ModelError(f"model {name!r}: {MODULES} has no Pooling")
    return SentenceEmbedding(pooling, normalised, inside)


def _pooling(settings: Any, name: str, path: str) -> tuple[str, ...]:
    if not isinstance(settings, Mapping):
        raise ModelError(f"model {name!r} has no {path}/config.json with the settings of its pooling")
    modes = settings.get("pooling_mode")
    if modes is None:
        modes = [mode for key, mode in KEYS.items() if settings.get(key)] or ["mean"]
    modes = (modes,) if isinstance(modes, str) else tuple(modes)
    for mode in modes:
        if mode not in POOLINGS:
            raise ModelError(f"model {name!r}: pooling {mode!r} is not supported; known are {', '.join(POOLINGS)}")
    return modes


def _read_json(location: str, file: str, name: str) -> Any:
    """A JSON file of a folder or of the hub; None where there is none."""
    path: str | None = os.path.join(location, file)
    if not os.path.isdir(location):
        from transformers.utils import cached_file

        try:
            path = cached_file(
                location,
                file,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
                _raise_exceptions_for_gated_repo=False,
            )
        except (OSError, ValueError) as error:
            raise ModelError(f"model {name!r}: {' '.join(str(error).split())[:300]}") from error
    if path is None or not os.path.isfile(path):
        return None
    try:
        with open(path, encoding="utf-8") as opened:
            return json.load(opened)
    except (OSError, ValueError) as error:
        raise ModelError(f"model {name!r}: {file} cannot be read: {' '.join(str(error).split())}") from error
