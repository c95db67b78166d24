"""Content-addressed artifacts over fsspec: the store, its cache, hashes, schemas of tables, garbage collection."""

from mlorq.lazy import lazy_exports

_HOMES = {
    **dict.fromkeys(["ArtifactRef", "Store"], "mlorq.artifacts.store"),
    **dict.fromkeys(["digest_json", "digest_model", "digest_tensors"], "mlorq.artifacts.hashing"),
    **dict.fromkeys(["ALLOCATION", "CANDIDATES", "FIRST_ORDER", "LAYERS", "SENSITIVITY"], "mlorq.artifacts.schemas"),
}
__all__ = sorted(_HOMES)
__getattr__ = lazy_exports(__name__, _HOMES)
