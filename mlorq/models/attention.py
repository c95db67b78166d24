"""``nn.MultiheadAttention`` with its projections as linear layers that are called.

torch's class multiplies with slices of one parameter, and with the weight of ``out_proj``. Here query, key, value and
output each have a linear layer; the function is the same for all arguments.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlorq.models.direct import DirectLinear

PROJECTIONS = ("q_proj", "k_proj", "v_proj")
OLD_WEIGHTS = ("in_proj_weight", *(f"{name}_weight" for name in PROJECTIONS))
OLD_BIAS = "in_proj_bias"


class ProjectedAttention(nn.MultiheadAttention):
    """Multi-head attention (arXiv 1706.03762) with linear layers ``q_proj``, ``k_proj``, ``v_proj``, ``out_proj``.

    Modules become instances by ``split``. Arguments and results are those of ``nn.MultiheadAttention``, but for nested
    tensors, which need torch's fused kernel.
    """

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module

    @property
    def in_proj_weight(self) -> Tensor | None:  # type: ignore[override]
        """The weights of query, key and value in one, ``(3 · embed_dim, embed_dim)``; None if their inputs differ."""
        if not self.is_packed:
            return None
        return torch.cat([getattr(self, name).weight for name in PROJECTIONS])

    @property
    def in_proj_bias(self) -> Tensor | None:  # type: ignore[override]
        """The biases of query, key and value in one, or None."""
        biases = [getattr(self, name).bias for name in PROJECTIONS]
        return None if biases[0] is None else torch.cat(biases)

    @property
    def is_packed(self) -> bool:
        """Whether ``nn.MultiheadAttention`` has one weight for query, key and value."""
        return bool(self.kdim == self.embed_dim and self.vdim == self.embed_dim)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention outputs and, if asked for, the attention's weights. See ``nn.MultiheadAttention``.

        Raises:
            ValueError: a mask has another shape than torch's class asks for.
            RuntimeError: ``is_causal`` without ``attn_mask``.
        """
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint about attn_mask: pass attn_mask as well")
        batched = query.dim() == 3
        if not batched:
            query, key, value = (tensor.unsqueeze(0) for tensor in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))
        samples, length = query.shape[:2]
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        causal = is_causal and key_padding_mask is None and not need_weights
        masks = self._masks(None if causal else attn_mask, key_padding_mask, samples, length, k)
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (torch.cat([x, b.expand(samples, 1, -1)], 1) for x, b in ((k, self.bias_k), (v, self.bias_v)))
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        if self.add_zero_attn:
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
        # Positions that were added have no mask.
        added = k.shape[2] - key.shape[1]
        masks = [F.pad(mask, (0, added)) for mask in masks] if added else masks
        mask = masks[0] if len(masks) == 1 else masks[0] + masks[1] if masks else None
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * self.head_dim**-0.5) @ k.transpose(-1, -2)
            weights = torch.softmax(scores if mask is None else scores + mask, -1)
            weights = F.dropout(weights, dropout) if dropout else weights
            found = weights @ v
        else:
            found = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
        output: Tensor = self.out_proj(found.transpose(1, 2).flatten(2))
        if weights is not None:
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        if not batched:
            return output.squeeze(0), weights
        return (output if self.batch_first else output.transpose(0, 1)), weights

    def _masks(
        self, attn_mask: Tensor | None, padding: Tensor | None, samples: int, length: int, keys: Tensor
    ) -> list[Tensor]:
        """The masks as terms of the scores, that broadcast to ``(samples, heads, queries, keys)``."""
        found, wide = [], keys.shape[1]
        if attn_mask is not None:
            mask = _additive(attn_mask, keys.dtype)
            if mask.shape == (length, wide):
                found.append(mask)
            elif mask.shape == (samples * self.num_heads, length, wide):
                found.append(mask.unflatten(0, (samples, self.num_heads)))
            else:
                raise ValueError(
                    f"attn_mask has shape {tuple(mask.shape)} instead of {(length, wide)} or "
                    f"{(samples * self.num_heads, length, wide)}"
                )
        if padding is not None:
            if padding.shape != (samples, wide):
                raise ValueError(f"key_padding_mask has shape {tuple(padding.shape)} instead of {(samples, wide)}")
            found.append(_additive(padding, keys.dtype)[:, None, None])
        return found


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as a term of the scores: minus infinity where it is True."""
    if mask.dtype is torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))
    return mask


def split(attention: nn.MultiheadAttention, *, values: bool = True) -> None:
    """Give an attention module linear layers for its projections, in place; it keeps its identity and hooks.

    Args:
        attention: the module.
        values: whether the new parameters have the values of the old ones, or arbitrary ones, to be filled.
    """
    old = attention._parameters
    packed, packed_bias = old.get(OLD_WEIGHTS[0]), old.get(OLD_BIAS)
    weights = [old[name] for name in OLD_WEIGHTS[1:]] if packed is None else _parts(packed, values)
    biases = [None] * len(PROJECTIONS) if packed_bias is None else _parts(packed_bias, values)
    for name in (*OLD_WEIGHTS, OLD_BIAS):
        old.pop(name, None)
    attention.__class__ = ProjectedAttention
    for name, weight, bias in zip(PROJECTIONS, weights, biases, strict=True):
        assert weight is not None
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        layer.weight, layer.bias = weight, bias  # type: ignore[assignment]
        attention.add_module(name, layer.train(attention.training))
    # ``nn.TransformerEncoder`` takes its fused kernels only if no weight is a stand-in.
    attention.out_proj.__class__ = DirectLinear  # type: ignore[assignment]
    attention._qkv_same_embed_dim = False


def _parts(value: nn.Parameter, values: bool) -> list[nn.Parameter | None]:
    parts: Sequence[Tensor] = value.detach().chunk(len(PROJECTIONS))
    made = [part.clone() if values else torch.empty_like(part) for part in parts]
    return [nn.Parameter(part, requires_grad=value.requires_grad) for part in made]
