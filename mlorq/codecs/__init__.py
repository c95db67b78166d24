"""Codecs: how one matrix is stored. One file each; ``base`` has the protocol (METHOD 1, 2)."""

from mlorq.lazy import lazy_exports

_HOMES = {
    **dict.fromkeys(["Codec", "Storage", "StoredMatrix", "TensorSpec"], "mlorq.codecs.base"),
    **dict.fromkeys(["AffineCodec", "QuantizedMatrix", "Rounded", "RowQuantizer"], "mlorq.codecs.affine"),
}
__all__ = sorted(_HOMES)
__getattr__ = lazy_exports(__name__, _HOMES)
