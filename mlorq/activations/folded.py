"""``folded``: ranges per channel folded into LayerNorms, one range for every other tensor (METHOD 8).

Evenly spaced levels everywhere, also of attention's probabilities, as in APHQ-ViT, FIMA-Q and LS-ViT (arXiv 2504.02508,
2506.11543, CVPR 2026).
"""

from __future__ import annotations

from mlorq.activations.uniform import Uniform


class Folded(Uniform):
    """One range per tensor, after LayerNorms were folded as in RepQ-ViT."""

    name = "folded"
    about = "ranges per channel folded into LayerNorms, one range elsewhere"
    folds_norms = True
