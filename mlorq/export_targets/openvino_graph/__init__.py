"""The OpenVINO model of a compressed model: the operators of target ``onnx``, converted.

``build`` converts and writes it, ``decoding`` decodes its weights before OpenVINO compiles it, ``session`` calls it.
"""
