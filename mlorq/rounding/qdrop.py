"""Method ``qdrop``: BRECQ with activations that stay float at random (QDrop, arXiv 2203.05740; METHOD 8)."""

from __future__ import annotations

from mlorq.rounding.base import METHODS
from mlorq.rounding.brecq import Brecq, SoftReconstruction


class _Dropping(SoftReconstruction):
    """All entries of the block's output weigh the same; half of the activations stay float in each step."""

    fisher = False
    drop = 0.5


class QDrop(Brecq):
    """QDrop."""

    name = "qdrop"
    title = "QDrop (2203.05740)"
    blocks = _Dropping()
    compared = False


METHODS.register(QDrop())
