"""Inputs of a layer in the float and in the partly compressed model, which run side by side (METHOD 6).

The error of a rounded layer against the float layer's outputs, ``E‖W x - Ŵ x̃‖²`` with x̃ the input in the model whose
earlier layers are compressed, is quadratic in Ŵ. It depends on (x, x̃) only through three second moments, so that the
cost of an optimiser's step is independent of the number of tokens. Both models advance block by block, so that rounding
all layers does not take a forward pass of the whole model per layer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mlorq.activations.plan import ActivationPlan
from mlorq.calibration.blocks import products
from mlorq.calibration.covariance import FOLDS
from mlorq.calibration.token_importance import Importance
from mlorq.errors import ModelError
from mlorq.forms.stored_layer import CompressedLayer
from mlorq.memory import block_width
from mlorq.models.base import FloatModel
from mlorq.models.batches import Shared, batch_samples, fresh, map_items, move_batch
from mlorq.models.copying import copy_module
from mlorq.models.layer_list import Layer
from mlorq.models.layers import set_matrix
from mlorq.models.norms import set_parameters
from mlorq.models.partial_forward import NotReached, Segments, enters_cleanly
from mlorq.models.passes import leaving_no_trace, plain_passes
from mlorq.models.token_masks import counting, mask_for
from mlorq.models.unfolding import input_tokens


@dataclass(frozen=True)
class InputMoments:
    """Second moments of a layer's inputs x in the float model and x̃ in the compressed one, means over tokens, float64.

    Attributes:
        compressed: ``Σ̃ = E[x̃ x̃ᵀ]``, ``(in_features, in_features)``, or its blocks (``mlorq.calibration.blocks``).
        drift_cross: ``C = E[(x - x̃) x̃ᵀ]``, same shape.
        drift: ``E[(x - x̃)(x - x̃)ᵀ]``, same shape.
        tokens: number of tokens, or the sum of their weights.
        mean: ``E[x̃]``, ``(in_features,)``; None in centred moments.
        drift_mean: ``E[x - x̃]``, ``(in_features,)``; None in centred moments.
        folds: moments of the even and of the odd samples; empty in a fold.
        has_tokens: whether samples have more than one token.
    """

    compressed: Tensor
    drift_cross: Tensor
    drift: Tensor
    tokens: int
    mean: Tensor | None = None
    drift_mean: Tensor | None = None
    folds: tuple[InputMoments, ...] = ()
    has_tokens: bool = True

    def centred(self) -> InputMoments:
        """Moments about the means, for a layer whose bias compensates for the mean error."""
        assert self.mean is not None and self.drift_mean is not None  # noqa: PT018
        mean, drift, width = self.mean.unsqueeze(0), self.drift_mean.unsqueeze(0), self.compressed.shape[-1]
        return InputMoments(
            self.compressed - products(mean, mean, width),
            self.drift_cross - products(drift, mean, width),
            self.drift - products(drift, drift, width),
            self.tokens,
            folds=tuple(fold.centred() for fold in self.folds),
            has_tokens=self.has_tokens,
        )


FIELDS = ("compressed", "drift_cross", "drift", "mean", "drift_mean")


def _averaged(sums: dict[str, Tensor], tokens: float, folds: tuple[InputMoments, ...] = ()) -> InputMoments:
    total = tokens if tokens > 0 else 1.0
    means = {name: sums[name] / total for name in FIELDS}
    return InputMoments(
        means["compressed"],
        means["drift_cross"],
        means["drift"],
        round(tokens),
        means["mean"],
        means["drift_mean"],
        folds,
    )


class _FoldSums:
    """Sums of the products of one fold's tokens, float64."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.width = block_width(size)
        blocks = () if self.width == size else (size // self.width,)
        shapes = ((*blocks, self.width, self.width),) * 3 + ((size,),) * 2
        self.sums = {
            name: torch.zeros(shape, dtype=torch.float64, device=device)
            for name, shape in zip(FIELDS, shapes, strict=True)
        }
        self.tokens = 0.0

    def add(self, float_inputs: Tensor, own_inputs: Tensor, weights: Tensor | None) -> None:
        """Add tokens of x and x̃, ``(tokens, size)`` each, with weights ``(tokens, 1)`` or None."""
        y, drift = own_inputs, float_inputs - own_inputs
        own, lost = (y, drift) if weights is None else (weights * y, weights * drift)
        pairs = ((y, own), (drift, own), (drift, lost))
        found = (*(products(left, right, self.width) for left, right in pairs), own.sum(0), lost.sum(0))
        for field, product in zip(FIELDS, found, strict=True):
            self.sums[field] += product  # float32 to float64
        self.tokens += len(y) if weights is None else float(weights.double().sum())


def _fold_part(values: Sequence[Tensor | None], mask: Tensor | None, start: int) -> list[Any]:
    """The tokens of a fold's samples that count, ``(tokens, …)``, from ``(samples, tokens, …)``; None stays None."""
    part = slice(start, None, FOLDS)
    if mask is None:
        return [None if value is None else value[part].flatten(0, 1) for value in values]
    chosen = mask[part]
    return [None if value is None else value[part][chosen] for value in values]


@dataclass(frozen=True)
class BlockCall:
    """One batch at the input of a block of the compressed model, with the targets of reconstruction.

    Attributes:
        batch: the model's input.
        args, kwargs: the block's arguments in the compressed model.
        target: the float block's output in the float model, float32.
        outputs: f(x) of the float model, ``(samples, outputs)``; None if not requested.
        weights: of the target's tokens, the target's shape without its last axis, 0 for tokens that do not count; or of
            the target's entries, the target's shape; None: equal weights.
        float_input: the block's first argument in the float model; None if not requested.
    """

    batch: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Tensor
    outputs: Tensor | None
    weights: Tensor | None
    float_input: Tensor | None = None


def _copies(value: Any, model: nn.Module) -> Any:
    """Copies of a block's arguments: tensors, also those in containers, and objects (a cache).

    Args:
        value: the arguments.
        model: whose modules are passed as they are.
    """
    if isinstance(value, (Tensor, Shared)):
        return fresh(value)
    if isinstance(value, (Mapping, tuple, list)):
        return map_items(value, lambda item: _copies(item, model))
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    try:
        return deepcopy(value, {id(child): child for child in model.modules()})
    except Exception:  # a lock, an open file, what a class raises
        return value


def token_weights(target: Tensor, mask: Tensor | None, weights: Tensor | None) -> Tensor | None:
    """Token weights of a block's output: ``weights`` or 1, and 0 outside ``mask``; None if all are equal."""
    if weights is None:
        return None if mask is None else mask.to(target.dtype)
    moved = weights.to(target.device, target.dtype)
    return moved if mask is None else moved * mask


class PairedForward:
    """Carries calibration data through the float model and through its compressed copy, block by block.

    Call ``moments`` for layers in execution order, ``set`` as soon as a layer is rounded, and ``set_rest`` for the
    norms that were trained with a block.

    Args:
        model: the float model.
        blocks: names of its blocks.
        batches: calibration samples.
        device: device of the computation.
        importance: token weights by name, one mapping per batch; None: equal weights.
        leaders: maps the name of a layer to its name in ``importance``; default: the same.
        alone: names of layers whose inputs are some of a sample's tokens, or none of them (``LayerList.alone``).
        activations: activation quantizers of the compressed copy; None: float activations.
        teacher: the float model whose blocks' outputs are the targets of reconstruction, if it is another: that before
            GELU was replaced (``activations.rectify``); default: ``model``.
    """

    def __init__(
        self,
        model: FloatModel,
        blocks: Sequence[str],
        batches: Sequence[Any],
        device: torch.device | str = "cpu",
        *,
        importance: Sequence[Importance] | None = None,
        leaders: Mapping[str, str] | None = None,
        alone: Collection[str] = (),
        activations: ActivationPlan | None = None,
        teacher: FloatModel | None = None,
    ) -> None:
        self.model = model
        self.batches = [move_batch(batch, device, model.dtype) for batch in batches]
        self._block_names = list(blocks)
        self._leaders = leaders or {}
        self._alone = alone
        self._importance: Sequence[Importance] = importance or [{}] * len(self.batches)
        self.compressed = copy_module(model.module)
        if activations is not None:
            activations.install(self.compressed)
        self._float = Segments(model, model.module, blocks)
        self._changed = Segments(model, self.compressed, blocks)
        self._teacher = self._float if teacher is None else Segments(teacher, teacher.module, blocks)
        self._at = 0
        self._carries: list[tuple[Any, Any]] = [(None, None)] * len(self.batches)
        self._taught: list[Any] = [None] * len(self.batches)  # carries of the teacher
        self._chain_checked = False
        self._last: tuple[int, InputMoments] | None = None

    def set(self, layer: Layer, compressed: CompressedLayer) -> None:
        """Put a rounded layer into the compressed copy."""
        module = self.compressed.get_submodule(layer.name)
        set_matrix(module, compressed.dense())
        if compressed.bias is not None:
            assert isinstance(module.bias, Tensor)
            with torch.no_grad():
                module.bias.copy_(compressed.bias)

    def set_rest(self, values: Mapping[str, Tensor]) -> None:
        """Set trained float parameters of the compressed copy, by name; the float model keeps its own."""
        set_parameters(self.compressed, values)
        if values:
            self._last = None  # the inputs of later layers have changed

    def moments(self, layer: Layer) -> InputMoments:
        """Second moments of a layer's inputs; the earlier blocks run once for all layers of its block.

        Layers with the same input tensor (query, key and value) share one computation, since rounding one of them does
        not change the input of the others. The tokens of an expert are not the same in both models: those of the
        compressed model count, with equal weights and without drift.
        """
        if self._last is not None and self._last[0] == layer.input_group:
            return self._last[1]
        self._advance(layer.block)
        module = self.model.module.get_submodule(layer.name)
        device = next(self.model.module.parameters()).device
        folds = [_FoldSums(layer.in_features, device) for _ in range(FOLDS)]
        first, several = 0, False
        name = self._leaders.get(layer.name, layer.name)
        for batch, (carry, changed), importance in zip(self.batches, self._carries, self._importance, strict=True):
            samples = batch_samples(batch)
            float_tokens = None
            try:
                own_tokens = self._tokens(module, self._changed, batch, changed, layer.name)
                if layer.name not in self._alone:
                    float_tokens = self._tokens(module, self._float, batch, carry, layer.name)
            except NotReached:  # an expert without tokens
                first += samples
                continue
            mask = counting(mask_for(layer.name, self.model.token_mask(batch), self._alone), own_tokens)
            several = several or own_tokens.shape[1] > 1
            weights = importance.get(name)
            if float_tokens is None or float_tokens.shape != own_tokens.shape:
                float_tokens, weights = own_tokens, None
            weights = None if weights is None else weights.to(device).unsqueeze(-1)
            for fold, sums in enumerate(folds):
                sums.add(*_fold_part((float_tokens, own_tokens, weights), mask, (fold - first) % FOLDS))
            first += samples
        parts = tuple(_averaged(fold.sums, fold.tokens) for fold in folds if fold.tokens)
        both = {name: sum((fold.sums[name] for fold in folds[1:]), folds[0].sums[name]) for name in FIELDS}
        moments = replace(_averaged(both, sum(fold.tokens for fold in folds), parts), has_tokens=several)
        self._last = (layer.input_group, moments)
        return moments

    # -- whole blocks -----------------------------------------------------------------------------------------

    def block_calls(
        self,
        block: int,
        *,
        outputs: bool = False,
        fisher: bool = False,
        even: bool = False,
        float_inputs: bool = False,
        seed: int = 0,
    ) -> list[BlockCall]:
        """All batches at the input of a block whose earlier layers are rounded.

        Args:
            block: index of the block.
            outputs: whether to include the model's outputs.
            fisher: whether to weight entries of the block's output by the squared gradient of ``v · f``, v Gaussian,
                instead of tokens by their importance (BRECQ, arXiv 2102.05426, with the labelled loss instead of
                ``v · f``; METHOD 9).
            even: whether all tokens that count have equal weights.
            float_inputs: whether to include the block's input in the float model.
            seed: of v.

        Raises:
            ModelError: outputs or gradients are requested, but the blocks are not a chain: later parts of the model
                read the outputs of earlier blocks again.
        """
        if (outputs or fisher) and not self._is_chain():
            asked, instead = (
                ("rounding.loss: output", "loss: block")
                if not (fisher or even)
                else ("a loss with gradients of the model's output", "rounding.method: block")
            )
            raise ModelError(f"{asked} needs a model whose blocks are a chain; use {instead}")
        generator = torch.Generator().manual_seed(seed)
        self._advance(block)
        calls = []
        carried = zip(self.batches, self._carries, self._taught, self._importance, strict=True)
        for batch, (_, changed), carry, importance in carried:
            args, kwargs = self._changed.block_arguments(batch, self._at, changed, block)
            after = self._teacher.advance(batch, self._at, carry, block + 1)
            target = (after if isinstance(after, Tensor) else after[0]).float()
            whole = self._teacher.outputs(batch, self._at, carry) if outputs else None
            weights = importance.get(self._block_names[block])
            mask = counting(self.model.token_mask(batch), target)
            weights = token_weights(target, mask, None if fisher or even else weights)
            if fisher:
                squared = self._squared_gradients(batch, block + 1, after, generator)
                weights = squared if weights is None else squared * weights.unsqueeze(-1)
            own = None
            if float_inputs:
                positional, named = self._teacher.block_arguments(batch, self._at, carry, block)
                own = positional[0] if positional else next(iter(named.values()))
            calls.append(BlockCall(batch, args, kwargs, target, whole, weights, own))
        return calls

    def _squared_gradients(self, batch: Any, start: int, after: Any, generator: torch.Generator) -> Tensor:
        """``(∂(v · f)/∂z)²`` for a block's output z, scaled to mean 1."""
        first = after if isinstance(after, Tensor) else after[0]
        with torch.enable_grad():
            entry = first.detach().clone().requires_grad_(True)
            carry = entry if isinstance(after, Tensor) else (entry, *after[1:])
            output = self._teacher.differentiable_outputs(batch, start, carry)
            vector = torch.randn(output.shape, generator=generator).to(output.device)
            (gradient,) = torch.autograd.grad((output * vector).sum(), entry, allow_unused=True)
        squared = torch.ones_like(first) if gradient is None else gradient.square()
        return (squared / squared.mean().clamp(min=torch.finfo(squared.dtype).tiny)).float()

    def float_outputs(self, block: int) -> Iterator[Any]:
        """What a block of the float model returns for each batch, in the order of ``block_calls``."""
        for batch, carry in zip(self.batches, self._taught, strict=True):
            yield self._teacher.advance(batch, self._at, carry, block + 1)

    def penultimate(self, call: BlockCall, start: int, carry: Any) -> Tensor:
        """The input of the float model's head (``Segments.penultimate``), from block ``start`` on; f(x) without one."""
        return self._teacher.penultimate(call.batch, start, carry)

    def run_block(self, block: int, call: BlockCall) -> Any:
        """Output of a block of the compressed copy, differentiable; neither the block nor its arguments are changed."""
        module = self._changed.blocks[block]
        args, kwargs = _copies((call.args, call.kwargs), self.compressed)
        with plain_passes(), leaving_no_trace(module):
            return module(*args, **kwargs)

    def block_name(self, block: int) -> str:
        """Name of a block in the model."""
        return self._block_names[block]

    def block(self, block: int) -> torch.nn.Module:
        """A block of the compressed copy."""
        return self._changed.blocks[block]

    def finish(self, call: BlockCall, start: int, carry: Any) -> Tensor:
        """f(x) of the float model continued from block ``start`` with input ``carry``, differentiable."""
        return self._teacher.differentiable_outputs(call.batch, start, carry)

    def _tokens(self, module: torch.nn.Module, half: Segments, batch: Any, carry: Any, layer: str) -> Tensor:
        """Inputs of a layer in one of the models, ``(samples, tokens, in_features)``."""
        return input_tokens(module, half.layer_inputs(batch, self._at, carry, layer), batch_samples(batch)).float()

    def _advance(self, block: int) -> None:
        if block <= self._at or not self._is_chain():
            return
        before = self._at
        self._carries = [
            (
                self._float.advance(batch, self._at, carry, block),
                self._changed.advance(batch, self._at, changed, block),
            )
            for batch, (carry, changed) in zip(self.batches, self._carries, strict=True)
        ]
        if self._teacher is self._float:
            self._taught = [carry for carry, _ in self._carries]
        else:
            pairs = zip(self.batches, self._taught, strict=True)
            self._taught = [self._teacher.advance(batch, before, carry, block) for batch, carry in pairs]
        self._at = block

    def _is_chain(self) -> bool:
        """Whether the float model can be continued from the output of a block; if not, every forward pass is complete.

        The check is made after the last block: a model that reads an early block's output again fails only once that
        block is skipped.
        """
        if not self._chain_checked:
            batch, last = self.batches[0], len(self._float.blocks)
            carry = self._float.advance(batch, self._at, self._carries[0][0], last)
            self._chain_holds = enters_cleanly(self._float, batch, last, carry, self._float.outputs(batch))
            self._chain_checked = True
        return self._chain_holds
