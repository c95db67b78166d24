"""Method ``qdrop``: BRECQ with randomly dropped activation quantization (QDrop, arXiv 2203.05740; METHOD 9)."""

from __future__ import annotations

from typing import Any, ClassVar

from mlorq.rounding.base import METHODS, BlockReconstruction
from mlorq.rounding.brecq import Brecq, SoftReconstruction


class _Dropping(SoftReconstruction):
    """No weights by squared gradients; in each step half of the activations stay float."""

    fisher = False
    drop = 0.5


class QDrop(Brecq):
    """QDrop: soft rounding of blocks with randomly dropped activation quantization."""

    name = "qdrop"
    title = "QDrop (2203.05740)"
    blocks: ClassVar[BlockReconstruction[Any] | None] = _Dropping()
    compared = False


METHODS.register(QDrop())
