"""Compressed models in transformers: the quantizer through which ``AutoModel.from_pretrained`` loads them.

``registration`` registers it as soon as both libraries are imported, in either order; ``quantizer`` is the quantizer.
The export target ``transformers`` writes the folders that it loads.
"""
