"""``FloatModel``: a module with its forward and its architecture, in one form for all families; helpers for batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.nn.utils.parametrize import is_parametrized

from mlorq.artifacts.hashing import digest_model
from mlorq.errors import ModelError
from mlorq.models.batches import Batch, Listed, batch_samples, fresh
from mlorq.models.computed_weights import merge_computed_weights
from mlorq.models.family import FAMILIES
from mlorq.models.library_layers import simplify_library_layers
from mlorq.models.output_tensors import output_tensor
from mlorq.models.passes import plain_passes, without_cache
from mlorq.models.token_masks import TokenMask
from mlorq.models.transposed import transpose_conv1d

Forward = Callable[[nn.Module, Batch], Any]  # returns a tensor, or what holds one (``output_tensors``)


def call_module(module: nn.Module, batch: Batch) -> Any:
    """What a module returns for a batch.

    Args:
        module: the module.
        batch: a tensor is passed as one argument, a tuple or list as several, a mapping as keyword arguments.
    """
    if isinstance(batch, Mapping):
        return module(**batch)
    if isinstance(batch, (tuple, list)) and not isinstance(batch, Listed):
        return module(*batch)
    return module(batch)


def no_token_mask(batch: Batch) -> TokenMask:
    """The token mask of models without padding: None."""
    return None


def attention_mask(batch: Batch, name: str = "attention_mask") -> Tensor | None:
    """Mask of the tokens that are not padding, ``(samples, tokens)``; None for a batch without the entry ``name``."""
    mask = batch.get(name) if isinstance(batch, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


_PLAIN = (bool, int, float, str, type(None))


def same_construction(module: nn.Module, other: nn.Module) -> bool:
    """Whether two modules differ only in their weights, judged by their attributes.

    Compares, for each submodule: class, name, shapes of the tensors, all plain attributes, and numbers of hooks.
    """
    ours, theirs = dict(module.named_modules()), dict(other.named_modules())
    if list(ours) != list(theirs):
        return False
    if any(_construction(ours[name]) != _construction(theirs[name]) for name in ours):
        return False
    shapes, others = ({name: value.shape for name, value in m.state_dict().items()} for m in (module, other))
    return shapes == others


def _construction(module: nn.Module) -> tuple[Any, ...]:
    plain = (*_PLAIN, tuple)
    # Attributes about origin or training, and marks of layers for the search, do not affect the output.
    ignored = ("training", "name_or_path", "samples_axis")
    own = {name: value for name, value in vars(module).items() if not name.startswith("_") and name not in ignored}
    # Libraries turn tuples of their configurations into lists, when these are written and read.
    own = {name: _as_tuple(value) for name, value in own.items()}
    values = {name: value if isinstance(value, plain) else type(value) for name, value in own.items()}
    # Each parametrized module has a class of its own.
    kind = type(module).__base__ if is_parametrized(module) else type(module)
    # A forward assigned to the instance is one of the values; hooks could change the output, too.
    return kind, values, len(module._forward_hooks), len(module._forward_pre_hooks)


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) and all(isinstance(item, _PLAIN) for item in value) else value


@dataclass
class FloatModel:
    """A float model in the form that the search uses.

    Attributes:
        module: the module, in eval mode, without gradients, with the values of weights that its layers compute, and
            with linear layers in the place of ``Conv1D`` of transformers.
        family: name in ``mlorq.models.FAMILIES``.
        architecture: JSON description from which ``mlorq.models.rebuild`` builds the module without weights; if the
            family cannot rebuild modules, only its name and the class.
        forward: ``forward(module, batch)`` returns f(x): logits ``(samples, classes)``, the L2-normalised embedding
            ``(samples, width)`` of a sentence encoder, or the outputs of a detector's heads at fixed positions.
        token_mask: ``token_mask(batch)`` returns a bool mask ``(samples, tokens)``, False at padding, which is excluded
            from all statistics, or one per sequence (``mlorq.models.token_masks``); None if there is no padding.
        blocks: names of the modules (transformer blocks) that run one after another, each on the output of the previous
            one; empty if unknown.
        dtype: dtype to which floating-point inputs are cast.
        key: hash of the architecture and the weights.
        preparation: reads the files of the tokenizer or image processor, by name, for the checkpoint.
        arranged: whether weights that the module reads directly were looked for (``mlorq.models.direct_weights``).
    """

    module: nn.Module
    family: str
    architecture: dict[str, Any]
    forward: Forward = call_module
    token_mask: Callable[[Batch], TokenMask] = no_token_mask
    blocks: list[str] = field(default_factory=list)
    dtype: torch.dtype = torch.float32
    key: str = ""
    preparation: Callable[[], dict[str, bytes]] = dict
    arranged: bool = False

    def __post_init__(self) -> None:
        check_readable(self.module)
        self.module.eval().requires_grad_(False)
        merge_computed_weights(self.module)
        simplify_library_layers(self.module)
        transpose_conv1d(self.module)
        if not self.key:
            self.key = digest_model(self.module, self.architecture)

    @property
    def rebuilds(self) -> bool:
        """Whether the module can be rebuilt from its architecture; else checkpoints need an instance to load into."""
        return FAMILIES[self.family].rebuilds

    def returned(self, module: nn.Module, batch: Batch) -> Any:
        """What the forward returns; the batch is not changed, also by a model that writes into its inputs."""
        with plain_passes(), without_cache(module):
            return self.forward(module, fresh(batch))

    def outputs(self, module: nn.Module, batch: Batch) -> Tensor:
        """f(x) of this model, or of a compressed copy of it, as ``(samples, outputs)`` float32.

        Several tensors are joined in each sample's row (``output_tensors``).

        Raises:
            ModelError: the forward returns no tensor, or a scalar.
        """
        return self.joined(self.returned(module, batch), batch)

    def joined(self, returned: Any, batch: Batch) -> Tensor:
        """What the forward returned for a batch as ``(samples, outputs)`` float32; raises as ``outputs``."""
        result = output_tensor(returned, batch_samples(batch))
        if result.dim() == 0:
            raise ModelError(
                "the model returns a single number, not one output or more per sample: pass "
                "forward=callable(model, batch) -> Tensor with the samples on its first axis"
            )
        return result.reshape(result.shape[0], -1).float()


def join_outputs(parts: Sequence[Tensor]) -> Tensor:
    """Outputs of several batches, ``(samples, outputs)``; shorter ones, of batches with fewer tokens, end in zeros."""
    width = max(part.shape[1] for part in parts)
    return torch.cat([F.pad(part, (0, width - part.shape[1])) for part in parts])


def check_readable(module: nn.Module) -> None:
    """Check that all of a module's state is in parameters and buffers that have values.

    Raises:
        ModelError: a tensor has no values yet, or a part keeps other state; the message says what to do.
    """
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        if isinstance(value, (UninitializedParameter, UninitializedBuffer)):
            raise ModelError(
                f"{name!r} of a lazy module has no size yet: run the model once on a batch before it is compressed"
            )
        if value.is_meta:
            raise ModelError(
                f"{name!r} is on the meta device and has no values: load the model's weights, onto a real device and "
                "without offloading, before it is compressed"
            )
    for name, child in module.named_modules():
        if isinstance(child, torch.jit.ScriptModule):
            raise ModelError(f"module {name!r} is compiled by torch.jit: pass the module that it was made from")
        if type(child).get_extra_state is not nn.Module.get_extra_state:
            raise ModelError(
                f"module {name!r} ({type(child).__name__}) keeps state outside its parameters and buffers "
                "(get_extra_state), which a checkpoint cannot hold: register that state as buffers"
            )


def check_weights(module: nn.Module) -> None:
    """Check that all parameters and buffers are finite; buffers other than statistics of norms can have infinities.

    Masks of attention are such buffers. Any other damage makes an output infinite, which calibration refuses.

    Raises:
        ModelError: a tensor contains NaN or infinity; the message names the first.
    """
    statistics = {
        f"{path}.{name}".lstrip(".")
        for path, child in module.named_modules()
        for name in ("running_mean", "running_var")
        if name in child._buffers
    }
    masks = {name for name, _ in module.named_buffers(remove_duplicate=False)} - statistics
    for name, tensor in module.state_dict().items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or torch.isfinite(tensor).all():
            continue
        if name not in masks or tensor.isnan().any():
            raise ModelError(f"weight {name!r} contains NaN or infinite values")
