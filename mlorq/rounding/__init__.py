"""Rounding: computes the codes of the chosen candidates. One file per method, registered in ``METHODS``.

``base`` defines the interface of methods. ``paired_forward`` provides a layer's inputs in the float and in the partly
compressed model; ``error_feedback``, ``adaptive_rounding``, ``ridge_rounding``, ``reconstruction``, ``block_losses``
and ``finetune`` contain the numerics.
"""

# Imported to be registered, in the order in which tables show them.
# isort: off
from mlorq.rounding import nearest as nearest
from mlorq.rounding import gptq as gptq
from mlorq.rounding import closed_form as closed_form
from mlorq.rounding import block as block
from mlorq.rounding import lra as lra
from mlorq.rounding import erq as erq
from mlorq.rounding import brecq as brecq
from mlorq.rounding import qdrop as qdrop
from mlorq.rounding import aphq as aphq
from mlorq.rounding import fimaq as fimaq
from mlorq.rounding import lsvit as lsvit
from mlorq.rounding import glfq as glfq

# isort: on
from mlorq.rounding.base import METHODS, RoundingMethod, RoundingResult, RoundingTask

__all__ = ["METHODS", "RoundingMethod", "RoundingResult", "RoundingTask"]
