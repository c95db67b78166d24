"""Runtimes: software that computes with a compressed model. Each is one file and a record in ``RUNTIMES``."""

from mlorq.runtimes import onnxruntime as onnxruntime  # imported to be registered
from mlorq.runtimes import openvino as openvino
from mlorq.runtimes import torch as torch
from mlorq.runtimes.base import RUNTIMES, Runtime, load

__all__ = ["RUNTIMES", "Runtime", "load"]
