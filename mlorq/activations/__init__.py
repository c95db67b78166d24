"""Quantized activations: where they are, their ranges, LayerNorms folded for them, and how a module applies them.

METHOD 8. ``calibrate.calibrate`` looks at a float model on some samples and gives a ``plan.ActivationPlan``; the plan
folds a float model in place (its function stays) and installs quantizers in a copy of it. Nothing of a model is traced:
layers and products are found on a real forward pass.

What a tensor is quantized with depends on the method, one file each; quantizers themselves are in ``quantizers``, one
file per kind. This module registers the methods and must stay light: the configuration reads it.
"""

from mlorq.activations.adalog import AdaLog
from mlorq.activations.method import ACTIVATION_METHODS
from mlorq.activations.repq import RepQ
from mlorq.activations.uniform import Uniform

for _method in (Uniform(), RepQ(), AdaLog()):
    ACTIVATION_METHODS.register(_method)
