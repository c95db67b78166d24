"""Second moments of layers' inputs and output gradients, in two folds of the samples (METHOD 7).

``Σ = E[x xᵀ]`` of a layer's inputs and ``G = E[g gᵀ]``, ``g = ∂(v · f)/∂y``, of its outputs (K-FAC, arXiv 1503.05671)
are all that ``E‖δf‖² ≈ c · tr(G ΔW Σ ΔWᵀ)`` needs; Σ may weight tokens (``token_importance``). Every other sample
belongs to the second fold, so that candidates fitted on one fold are judged on held-out samples: with few tokens Σ is
singular, and a low-rank candidate looks free on the samples it was fitted to. Of a very wide layer Σ is blocks on the
diagonal (``mlorq.calibration.blocks``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mlorq.calibration.blocks import blocks_of, diagonal, identity, products, size
from mlorq.memory import WIDEST, block_width
from mlorq.models.layer_list import Layer

FOLDS = 2
LEAST_SHRINKAGE = 0.005
# Mean squares below it count as zero: float32 sums of such products have lost their digits, and are not positive
# semi-definite.
LEAST_SQUARE = torch.finfo(torch.float32).tiny


def has_moments(layer: Layer) -> bool:
    """Whether second moments of a layer are taken: neither of grouped convolutions nor of very many outputs."""
    return layer.groups == 1 and layer.out_features <= WIDEST


def in_blocks(layer: Layer) -> bool:
    """Whether those of a layer's inputs are blocks on the diagonal."""
    return has_moments(layer) and block_width(layer.in_features) < layer.in_features


@dataclass(frozen=True)
class Moments:
    """Second moments of one layer over one fold, or pooled over both.

    Attributes:
        inputs: Σ, ``(in_features, in_features)`` float64, or its blocks ``(blocks, width, width)``.
        gradients: G, ``(out_features, out_features)`` float64, up to a constant factor.
        tokens: (effective) number of tokens averaged in Σ.
        gradient_tokens: number of gradients averaged in G.
    """

    inputs: Tensor
    gradients: Tensor
    tokens: int
    gradient_tokens: int

    def shrunk(self) -> tuple[Tensor, Tensor]:
        """Σ and G after ``shrink``: fewer samples give stronger shrinkage."""
        return shrink(self.inputs, self.tokens), shrink(self.gradients, self.gradient_tokens)


def shrink(matrix: Tensor, samples: int) -> Tensor:
    """``(1 - ρ) M + ρ tr(M)/n I`` with ``ρ = max(0.005, n / (n + samples))``, shrinkage to the identity (METHOD 7).

    Of blocks ρ has their width for n, since each is the moment of so many numbers alone.

    Args:
        matrix: M, ``(n, n)`` or blocks, positive semi-definite.
        samples: number of vectors averaged in M.

    Returns:
        float64, of M's shape; the identity if M is zero (a layer that cannot affect the output) up to ``LEAST_SQUARE``.
    """
    width = matrix.shape[-1]
    share = max(LEAST_SHRINKAGE, width / (width + samples))
    wide = matrix.double()
    level, unit = float(diagonal(wide).mean()), identity(wide)
    return (1 - share) * wide + share * level * unit if level > LEAST_SQUARE else unit.expand(matrix.shape).contiguous()


def pooled(folds: Sequence[Moments]) -> Moments:
    """Moments pooled over folds, weighted by their numbers of tokens."""
    tokens, gradient_tokens = (sum(getattr(fold, name) for fold in folds) for name in ("tokens", "gradient_tokens"))

    def mean(name: str, count: str, total: int) -> Tensor:
        parts = torch.stack([getattr(fold, name) * getattr(fold, count) for fold in folds])
        return parts.sum(0) / max(1, total)

    inputs = mean("inputs", "tokens", tokens)
    return Moments(inputs, mean("gradients", "gradient_tokens", gradient_tokens), tokens, gradient_tokens)


class OuterProducts:
    """Sums of outer products of vectors, one per fold, accumulated batch by batch.

    Args:
        size: length of the vectors.
        device: device of the sums.
        width: of the blocks that are summed; default: all of the products.
    """

    def __init__(self, size: int, device: torch.device | str, width: int | None = None) -> None:
        self.width = size if width is None else width
        blocks = () if self.width == size else (size // self.width,)
        self.sums = torch.zeros(FOLDS, *blocks, self.width, self.width, dtype=torch.float64, device=device)
        self.weights = [0.0] * FOLDS
        self.squares = [0.0] * FOLDS

    @property
    def counts(self) -> list[int]:
        """Effective number of tokens per fold, Kish's ``(Σ w)² / Σ w²``; their number if all weights are equal."""
        pairs = zip(self.weights, self.squares, strict=True)
        return [round(total**2 / square) if square else 0 for total, square in pairs]

    def add(self, vectors: Tensor, first: int, mask: Tensor | None = None, weights: Tensor | None = None) -> None:
        """Add the tokens of a batch.

        Args:
            vectors: ``(samples, tokens, size)``.
            first: index of the batch's first sample in the whole data.
            mask: ``(samples, tokens)``, True where a token counts.
            weights: ``(samples, tokens)`` weights of the tokens in the sums; None: ones.
        """
        for fold in range(FOLDS):
            start = (fold - first) % FOLDS
            chosen = vectors[start::FOLDS]
            rows = chosen[mask[start::FOLDS].to(chosen.device)] if mask is not None else chosen.flatten(0, 1)
            rows = rows.float()
            if weights is None:
                self.sums[fold] += products(rows, rows, self.width)  # float32 to float64
                self.weights[fold] += rows.shape[0]
                self.squares[fold] += rows.shape[0]
                continue
            own = weights[start::FOLDS].to(rows.device)
            own = own[mask[start::FOLDS].to(own.device)] if mask is not None else own.flatten()
            self.sums[fold] += products(own.unsqueeze(1) * rows, rows, self.width)
            self.weights[fold] += float(own.double().sum())
            self.squares[fold] += float(own.double().square().sum())

    def means(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """Weighted mean outer products, ``(folds, size, size)`` or blocks; zeros for a fold without tokens."""
        found = torch.empty_like(self.sums, dtype=dtype)
        for fold, weight in enumerate(self.weights):
            torch.div(self.sums[fold], weight or 1.0, out=found[fold])
        return found


def inputs_tensors(inputs: OuterProducts) -> dict[str, Tensor]:
    """The content of an ``inputs`` file: ``inputs`` (one matrix per fold) and their ``tokens``."""
    return {"inputs": inputs.means(torch.float32), "tokens": torch.tensor(inputs.counts)}


def gradients_tensors(gradients: OuterProducts) -> dict[str, Tensor]:
    """A layer's own part of its moments: ``gradients`` (one matrix per fold) and their ``gradient_tokens``."""
    return {"gradients": gradients.means(torch.float32), "gradient_tokens": torch.tensor(gradients.counts)}


def moments_tensors(own: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A layer's moments from its own part and the ``inputs`` file of its input: ``tokens`` has a row for each."""
    joined = {**own, "inputs": inputs["inputs"]}
    joined["tokens"] = torch.stack([inputs["tokens"], joined.pop("gradient_tokens")])
    return joined


def moments_of_tensors(tensors: dict[str, Tensor], device: torch.device | str) -> list[Moments]:
    """The inverse of ``moments_tensors``: one record per fold that has tokens; the first fold if none has."""
    counts = tensors["tokens"].tolist()
    found = [
        Moments(_read(inputs).to(device).double(), gradients.to(device).double(), tokens, gradient_tokens)
        for inputs, gradients, tokens, gradient_tokens in zip(
            tensors["inputs"], tensors["gradients"], *counts, strict=True
        )
    ]
    return [fold for fold in found if fold.tokens and fold.gradient_tokens] or found[:1]


def _read(inputs: Tensor) -> Tensor:
    """Σ of a file; earlier versions wrote a single matrix for every layer."""
    return blocks_of(inputs, block_width(size(inputs)))
