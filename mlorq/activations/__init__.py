"""Quantized activations: where they are, their ranges, LayerNorms folded for them, and how a module applies them.

METHOD 8. ``calibrate`` looks at a float model on some samples and gives an ``ActivationPlan``; the plan folds a float
model in place (its function stays) and installs quantizers in a copy of it. Nothing of a model is traced: layers and
products are found on a real forward pass.
"""

from mlorq.activations.calibrate import ActivationSettings, calibrate
from mlorq.activations.plan import ActivationPlan

__all__ = ["ActivationPlan", "ActivationSettings", "calibrate"]
