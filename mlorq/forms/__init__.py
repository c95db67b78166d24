"""Forms: what a layer can become. One file each; ``FORMS`` knows them all (METHOD 1).

``base`` has the protocol, ``stored_layer`` a layer in its form, ``modules`` the modules that compute from it,
``embedding_tables`` the tables beside the layers.
"""

from mlorq.forms.base import FORMS, Candidate, Form, MatrixSpec, Shape, uniform_candidate, uniform_form

# Registered in the order in which tables show them.
# isort: off
from mlorq.forms.q import Q
from mlorq.forms.lr import LR
from mlorq.forms.qlr import QLR

# isort: on
__all__ = ["FORMS", "LR", "QLR", "Candidate", "Form", "MatrixSpec", "Q", "Shape", "uniform_candidate", "uniform_form"]
