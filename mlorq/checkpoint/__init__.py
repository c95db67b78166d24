"""Checkpoints: compressed models in folders, written, loaded and inspected."""

from mlorq.lazy import lazy_exports

_HOMES = {
    **dict.fromkeys(["inspect", "load", "save"], "mlorq.checkpoint.io"),
    **dict.fromkeys(["checkpoint_files"], "mlorq.checkpoint.format"),
}
__all__ = sorted(_HOMES)
__getattr__ = lazy_exports(__name__, _HOMES)
