"""Products of two activations: their operands are observed or quantized while a module runs (METHOD 8).

Attention multiplies queries by keys and probabilities by values, outside any layer. ``ProductMode`` intercepts the
calls (``@``, ``matmul``, ``bmm``, ``einsum``, and ``scaled_dot_product_attention``, taken apart into its two products)
as PyTorch dispatches them, so that no model is traced or rewritten. Products with parameters are not intercepted: they
belong to layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mlorq.activations.quantizers import ActivationQuantizer, ProbabilityQuantizer, TokenQuantizer

PRODUCTS = {"matmul", "__matmul__", "bmm"}
Operands = Callable[[Tensor, Tensor, str | None], tuple[Tensor, Tensor]]  # the last one: of einsum


class ProductMode(TorchFunctionMode):
    """Passes both operands of every product of activations to a function, and multiplies its results."""

    def __init__(self, operands: Operands) -> None:
        super().__init__()
        self._operands = operands

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if name in PRODUCTS and not kwargs and len(args) == 2 and _are_activations(*args):
            return func(*self._operands(*args, None))
        if name == "einsum" and len(args) == 3 and _are_activations(*args[1:]):
            return func(args[0], *self._operands(*args[1:], args[0]))
        return func(*args, **kwargs)

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """``scaled_dot_product_attention`` as two products, without dropout."""
        if enable_gqa:
            groups = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
        query, keys = self._operands(query, key.transpose(-2, -1), None)
        scores = (query @ keys) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
        if is_causal:
            allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            scores = scores.masked_fill(~allowed, -math.inf)
        if attn_mask is not None:
            mask = attn_mask
            scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        probabilities, value = self._operands(scores.softmax(-1), value, None)
        return probabilities @ value


def _are_activations(left: Any, right: Any) -> bool:
    return all(
        isinstance(one, Tensor) and not isinstance(one, nn.Parameter) and one.is_floating_point() and one.dim() > 1
        for one in (left, right)
    )


def _steps_along_the_sum(quantizer: nn.Module | None, x: Tensor) -> Tensor | None:
    """The steps of a right operand whose tokens, over which the product sums, have their own; None if they have not."""
    if isinstance(quantizer, TokenQuantizer) and quantizer.enabled and quantizer.axis == -1:
        return quantizer.steps(x.detach().float())
    return None


class ProductQuantizers(nn.Module):
    """Quantizes the operands of products while a module runs.

    Args:
        quantizers: ``{"0_left": …, "0_right": …, "1_left": …}``, by the number of the product in a call of the module.
    """

    def __init__(self, quantizers: dict[str, ActivationQuantizer]) -> None:
        super().__init__()
        self.operands = nn.ModuleDict(quantizers)
        self._modes: list[ProductMode] = []

    def enter(self, module: nn.Module, args: Any) -> None:
        """Forward pre-hook: start to intercept products."""
        count, known = 0, dict(self.operands.items())

        def quantized(left: Tensor, right: Tensor, _: str | None) -> tuple[Tensor, Tensor]:
            nonlocal count
            names = (f"{count}_left", f"{count}_right")
            count += 1
            first, second = (known.get(name) for name in names)
            steps = _steps_along_the_sum(second, right)
            if steps is not None and isinstance(first, ProbabilityQuantizer):
                left = first.carrying(left, steps)
            elif first is not None:
                left = first(left)
            return left, right if second is None else second(right)

        mode = ProductMode(quantized)
        mode.__enter__()  # type: ignore[no-untyped-call]
        self._modes.append(mode)

    def leave(self, *_: Any) -> None:
        """Forward hook, also called if the module raised: stop to intercept products."""
        if self._modes:
            self._modes.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def forward(self) -> None:
        """Not called: the hooks do the work."""


def attach_products(module: nn.Module, quantizers: ProductQuantizers) -> None:
    """Quantize a module's products in all later calls, also of its copies."""
    module.product_quantizers = quantizers
    module.register_forward_pre_hook(quantizers.enter)
    module.register_forward_hook(quantizers.leave, always_call=True)


def attach_input(module: nn.Module, quantizer: ActivationQuantizer) -> None:
    """Quantize a layer's input in all later calls, also of its copies."""
    module.input_quantizer = quantizer
    module.register_forward_pre_hook(quantizer.hook, with_kwargs=True)
