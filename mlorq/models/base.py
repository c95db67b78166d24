"""What a model family gives the rest of the library: a module, how to run it on a batch, and how to rebuild it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mlorq.artifacts.hashing import digest_model
from mlorq.errors import ModelError
from mlorq.models.family import FAMILIES

Batch = Any  # a tensor, a tuple or list of tensors, or a mapping of tensors: what the model takes
Forward = Callable[[nn.Module, Batch], Tensor]


def call_module(module: nn.Module, batch: Batch) -> Tensor:
    """Call a module on a batch (tensor: one argument; tuple or list: several; mapping: keywords)."""
    if isinstance(batch, Mapping):
        output = module(**batch)
    elif isinstance(batch, (tuple, list)):
        output = module(*batch)
    else:
        output = module(batch)
    if isinstance(output, Tensor):
        return output
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0]
    raise ModelError(
        f"the model returns {type(output).__name__}, not a tensor: pass forward=callable(model, batch) -> Tensor"
    )


def move_batch(batch: Batch, device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
    """A batch on another device; floating tensors also in another dtype when one is given."""
    if isinstance(batch, Tensor):
        return batch.to(device, dtype if dtype is not None and batch.is_floating_point() else None)
    if isinstance(batch, Mapping):
        return {name: move_batch(value, device, dtype) for name, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(move_batch(value, device, dtype) for value in batch)
    return batch


def batch_samples(batch: Batch) -> int:
    """Samples in a batch: the leading size of its first tensor.

    Raises:
        ModelError: the batch holds no tensor.
    """
    values = (
        [batch]
        if isinstance(batch, Tensor)
        else (
            list(batch.values())
            if isinstance(batch, Mapping)
            else list(batch)
            if isinstance(batch, (tuple, list))
            else []
        )
    )
    for value in values:
        if isinstance(value, Tensor) and value.dim() > 0:
            return int(value.shape[0])
    raise ModelError("a batch must be a tensor, or a tuple, list or mapping with one in it")


def take_samples(batch: Batch, index: slice) -> Batch:
    """Some samples of a batch: every tensor whose leading axis is that of the samples is cut."""
    count = batch_samples(batch)

    def take(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[index] if value.dim() > 0 and value.shape[0] == count else value
        if isinstance(value, Mapping):
            return {name: take(item) for name, item in value.items()}
        return type(value)(take(item) for item in value) if isinstance(value, (tuple, list)) else value

    return take(batch)


def split_batches(batches: Sequence[Batch], size: int) -> list[Batch]:
    """The same samples in batches of at most ``size``."""
    return [
        take_samples(batch, slice(start, start + size))
        for batch in batches
        for start in range(0, batch_samples(batch), size)
    ]


def fold_batches(batches: Sequence[Batch], fold: int, folds: int = 2) -> list[Batch]:
    """Every ``folds``-th sample, counted through all batches, from sample ``fold`` on; empty batches are left out."""
    found, first = [], 0
    for batch in batches:
        count = batch_samples(batch)
        start = (fold - first) % folds
        if start < count:
            found.append(take_samples(batch, slice(start, None, folds)))
        first += count
    return found


def no_token_mask(batch: Batch) -> Tensor | None:
    """The token mask of models whose tokens all count."""
    return None


def attention_mask(batch: Batch) -> Tensor | None:
    """True where a token is no padding, ``(samples, tokens)``; None for batches without an ``attention_mask``."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def same_construction(module: nn.Module, other: nn.Module) -> bool:
    """Whether two modules differ in nothing but their weights, as far as their attributes tell.

    Compared are, submodule by submodule: classes, names, shapes of the tensors, and every plain attribute.
    """
    ours, theirs = dict(module.named_modules()), dict(other.named_modules())
    if list(ours) != list(theirs):
        return False
    if any(_construction(ours[name]) != _construction(theirs[name]) for name in ours):
        return False
    shapes, others = ({name: value.shape for name, value in m.state_dict().items()} for m in (module, other))
    return shapes == others


def _construction(module: nn.Module) -> tuple[Any, ...]:
    plain = (bool, int, float, str, tuple, type(None))
    # What an instance notes of its origin or its training changes nothing that it computes.
    noted = ("training", "name_or_path")
    own = {name: value for name, value in vars(module).items() if not name.startswith("_") and name not in noted}
    values = {name: value if isinstance(value, plain) else type(value) for name, value in own.items()}
    # A forward put on the instance is among the values; hooks may change what it returns.
    return type(module), values, len(module._forward_hooks), len(module._forward_pre_hooks)


@dataclass
class FloatModel:
    """A float model as the search sees it.

    Attributes:
        module: in eval mode, without gradients.
        family: name in ``mlorq.models.FAMILIES``.
        architecture: JSON description from which ``mlorq.models.rebuild`` builds the module without weights;
            its family and class where that is not possible.
        forward: ``forward(module, batch)`` gives f(x): logits ``(samples, classes)``, the L2-normalised
            embedding ``(samples, width)`` of a sentence encoder, or what a detector's heads say at fixed places.
        token_mask: ``token_mask(batch)`` gives ``(samples, tokens)`` bool, True where a token counts; None
            where all do. Padding never enters a statistic.
        blocks: names of the modules that run one after another, each on the output of the one before (transformer
            blocks); empty where none are known.
        dtype: what floating inputs are cast to before the forward.
        key: hash of the architecture and the weights.
    """

    module: nn.Module
    family: str
    architecture: dict[str, Any]
    forward: Forward = call_module
    token_mask: Callable[[Batch], Tensor | None] = no_token_mask
    blocks: list[str] = field(default_factory=list)
    dtype: torch.dtype = torch.float32
    key: str = ""

    def __post_init__(self) -> None:
        self.module.eval().requires_grad_(False)
        if not self.key:
            self.key = digest_model(self.module, self.architecture)

    @property
    def rebuilds(self) -> bool:
        """Whether its architecture alone gives the module; else a checkpoint is loaded into an instance."""
        return FAMILIES[self.family].rebuilds

    def outputs(self, module: nn.Module, batch: Batch) -> Tensor:
        """f(x) of this model, or of a compressed copy of it, as ``(samples, outputs)`` float32."""
        result = self.forward(module, batch)
        return result.reshape(result.shape[0], -1).float()


def check_weights(module: nn.Module) -> None:
    """Refuse weights that are not finite.

    Raises:
        ModelError: names the first parameter or buffer that holds NaN or infinity.
    """
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ModelError(f"weight {name!r} holds NaN or infinite values")
