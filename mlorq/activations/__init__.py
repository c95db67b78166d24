"""Quantized activations: their sites, ranges, folded LayerNorms, and the quantizers in a module (METHOD 8).

``calibrate.calibrate`` observes a float model on some samples and gives a ``plan.ActivationPlan``; the plan folds a
float model in place (its function is unchanged) and installs quantizers in a copy. Models are not traced: layers and
products are found in a forward pass.

The method, one file each, decides which quantizer a tensor gets; quantizers are in ``quantizers``, one file per kind.
This module registers the methods and must stay light, since the configuration imports it.
"""

from mlorq.activations.adalog import AdaLog
from mlorq.activations.method import ACTIVATION_METHODS
from mlorq.activations.normalized import Normalized
from mlorq.activations.rectified import Rectified
from mlorq.activations.repq import RepQ
from mlorq.activations.uniform import Uniform

for _method in (Uniform(), RepQ(), AdaLog(), Normalized(), Rectified()):
    ACTIVATION_METHODS.register(_method)
