"""``rectified``: as ``repq``, with ReLU in place of GELU (APHQ-ViT, arXiv 2504.02508; METHOD 8).

The numerics are in ``rectify``. The float model is another one afterwards, whose outputs are close to those of the
given one.
"""

from __future__ import annotations

from mlorq.activations.repq import RepQ
from mlorq.activations.settings import RectifyingSettings


class Rectified(RepQ):
    """RepQ-ViT after GELU became ReLU."""

    name = "rectified"
    about = "as repq, with ReLU in place of GELU"
    settings = RectifyingSettings
    rectifies = True
