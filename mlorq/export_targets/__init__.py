"""Export targets: file formats in which other software reads or runs a compressed model.

Each target is one file and a record in the registry ``TARGETS``.
"""

from mlorq.export_targets import compressed_tensors as compressed_tensors  # imported to be registered
from mlorq.export_targets import dense as dense
from mlorq.export_targets import onnx as onnx
from mlorq.export_targets import openvino as openvino
from mlorq.export_targets import transformers as transformers
from mlorq.export_targets.base import TARGETS, ExportTarget, export

__all__ = ["TARGETS", "ExportTarget", "export"]
