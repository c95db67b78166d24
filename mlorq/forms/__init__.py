"""Forms: the ways to store a layer's weight, one file each, registered in ``FORMS`` (METHOD 1).

``base`` has the protocol, ``stored_layer`` one layer's stored matrices, ``modules`` the modules that compute from them,
``embedding_tables`` the quantized embedding tables.
"""

from mlorq.forms.base import FORMS, Candidate, Form, MatrixSpec, Shape, uniform_candidate, uniform_form

# Registered in the order in which tables show them.
# isort: off
from mlorq.forms.q import Q
from mlorq.forms.lr import LR
from mlorq.forms.qlr import QLR
from mlorq.forms.tcq import TCQ

# isort: on
__all__ = [
    "FORMS",
    "LR",
    "QLR",
    "TCQ",
    "Candidate",
    "Form",
    "MatrixSpec",
    "Q",
    "Shape",
    "uniform_candidate",
    "uniform_form",
]
