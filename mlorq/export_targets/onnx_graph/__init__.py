"""The ONNX graph of a compressed model: the float architecture's graph, with its weights as packed codes.

``float_graph`` exports the architecture with dense weights, ``layers`` replaces these by operators that decode the
codes, ``activations`` writes quantizers of activations as QuantizeLinear and DequantizeLinear, ``calls`` describes the
inputs and outputs, ``build`` puts all together.
"""
