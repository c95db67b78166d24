"""Rotation of a transformer's residual stream, folded into the weights; the float function is unchanged (METHOD 7).

Quantization errors depend on the basis: in a random one there are no outlier channels, so rows need no wide ranges for
a few large weights (QuaRot, arXiv 2404.00456). For an orthogonal R, every layer that writes to the stream becomes
``R W, R b`` and every layer that reads it ``W Rᵀ``. The scale and shift of each LayerNorm are first folded into its
reader. The remaining normalisation commutes with R if ``R 1 = 1``, which keeps the mean and the norm of the centred
vector. R is therefore a random orthogonal matrix with ``R 1 = 1``; the RMS norms of language models do not need this
constraint. Since R is folded into weights and never applied to activations, it need not have a fast transform
(Hadamard), and any width is possible.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mlorq.errors import ModelError


@dataclass(frozen=True)
class _Stream:
    """The layers and parameters that write to or read a residual stream.

    Attributes:
        writers: layers whose output is added to the stream.
        tokens: parameters added to the stream or inserted as tokens, ``(…, width)``.
        readers: LayerNorms of the stream, each with the layer that reads its output.
        scales: LayerScale modules, each with the writer before it.
    """

    writers: Sequence[nn.Module]
    tokens: Sequence[nn.Parameter]
    readers: Sequence[tuple[nn.LayerNorm, nn.Linear]]
    scales: Sequence[tuple[nn.Module, nn.Linear]]


def rotation_matrix(width: int, seed: int) -> Tensor:
    """A random orthogonal matrix R with ``R 1 = 1``, ``(width, width)`` float64.

    ``R = B diag(1, O) B`` with the Householder reflection B that swaps the first unit vector and ``1 / √width``, and a
    Haar-distributed orthogonal O.
    """
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(width - 1, width - 1, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    inner = torch.eye(width, dtype=torch.float64)
    inner[1:, 1:] = q * r.diagonal().sign()
    ones = torch.full((width,), width**-0.5, dtype=torch.float64)
    normal = ones.clone()
    normal[0] -= 1
    basis = torch.eye(width, dtype=torch.float64) - 2 * torch.outer(normal, normal) / normal.dot(normal)
    return basis @ inner @ basis


@torch.no_grad()
def rotate_residual_stream(module: nn.Module, seed: int) -> None:
    """Rotate a vision transformer's residual stream in place; its outputs are unchanged up to rounding.

    LayerNorms stay in the module with scale one and shift zero.

    Args:
        module: a pre-norm ViT or DeiT of timm.
        seed: seed of the rotation.

    Raises:
        ModelError: the architecture does not allow a rotation; the message gives the reason. Nothing is changed.
    """
    stream = _vision_transformer(module)
    width = stream.readers[0][0].normalized_shape[0]
    rotation = rotation_matrix(width, seed)
    for scale, scaled in stream.scales:
        gamma = scale.gamma
        assert isinstance(gamma, nn.Parameter)
        _set(scaled.weight, gamma.double().unsqueeze(1) * scaled.weight.double())
        if scaled.bias is not None:
            _set(scaled.bias, gamma.double() * scaled.bias.double())
        gamma.fill_(1.0)
    for norm, reader in stream.readers:
        weight = reader.weight.double()
        if norm.bias is not None:
            _set(reader.bias, reader.bias.double() + weight @ norm.bias.double())
            norm.bias.zero_()
        _set(reader.weight, (weight * norm.weight.double()) @ rotation.T.to(weight.device))
        norm.weight.fill_(1.0)
    for writer in stream.writers:
        own, shift = writer._parameters["weight"], writer._parameters.get("bias")
        assert own is not None
        turned = rotation.to(own.device) @ own.double().flatten(1)
        _set(own, turned.reshape(own.shape))
        if shift is not None:
            _set(shift, rotation.to(shift.device) @ shift.double())
    for token in stream.tokens:
        _set(token, token.double() @ rotation.T.to(token.device))


def _set(parameter: Tensor, value: Tensor) -> None:
    parameter.copy_(value.to(parameter.dtype))


def _vision_transformer(module: nn.Module) -> _Stream:
    from timm.models.vision_transformer import Block, VisionTransformer

    if type(module) is not VisionTransformer:
        raise ModelError(
            f"model.rotation: the residual stream of {type(module).__name__} cannot be rotated: "
            "only that of timm's VisionTransformer (ViT, DeiT) can"
        )

    def refuse(reason: str) -> ModelError:
        return ModelError(f"model.rotation: the residual stream of this VisionTransformer cannot be rotated: {reason}")

    def plain_norm(norm: nn.Module, name: str) -> nn.LayerNorm:
        if not isinstance(norm, nn.LayerNorm) or norm.weight is None:
            raise refuse(f"{name} is {type(norm).__name__}, not a LayerNorm with a scale")
        return norm

    def reading(norm: nn.Module, name: str, reader: nn.Module) -> tuple[nn.LayerNorm, nn.Linear]:
        found = plain_norm(norm, name)
        if not isinstance(reader, nn.Linear) or (found.bias is not None and reader.bias is None):
            raise refuse(f"the layer that reads {name} has no bias for its shift")
        return found, reader

    if not isinstance(module.norm_pre, nn.Identity):
        raise refuse("it is normalised before the blocks (norm_pre)")
    if not isinstance(module.patch_embed.proj, nn.Conv2d) or not isinstance(module.patch_embed.norm, nn.Identity):
        raise refuse("its patch embedding does not end in a convolution")
    if module.attn_pool is not None:
        raise refuse("it is pooled by attention")
    writers: list[nn.Module] = [module.patch_embed.proj]
    readers, scales = [], []
    for index, block in enumerate(module.blocks):
        name = f"blocks.{index}"
        if type(block) is not Block:
            raise refuse(f"{name} is {type(block).__name__}, not a pre-norm Block")
        readers.append(reading(block.norm1, f"{name}.norm1", block.attn.qkv))
        readers.append(reading(block.norm2, f"{name}.norm2", block.mlp.fc1))
        for writer, scale in ((block.attn.proj, block.ls1), (block.mlp.fc2, block.ls2)):
            writers.append(writer)
            if not isinstance(scale, nn.Identity):
                scales.append((scale, writer))
    last = [(name, norm) for name in ("norm", "fc_norm") if not isinstance(norm := getattr(module, name), nn.Identity)]
    if len(last) != 1:
        raise refuse("it does not have exactly one LayerNorm before its head")
    readers.append(reading(last[0][1], last[0][0], module.head))
    names = ("cls_token", "reg_token", "pos_embed")
    tokens = [token for token in (getattr(module, name, None) for name in names) if isinstance(token, nn.Parameter)]
    return _Stream(writers, tokens, readers, scales)
