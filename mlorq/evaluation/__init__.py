"""Evaluation: outputs of models on data, their distance, and the report of a run."""

from mlorq.lazy import lazy_exports

_HOMES = {
    **dict.fromkeys(["model_outputs", "output_nmse"], "mlorq.evaluation.outputs"),
    **dict.fromkeys(["render_report"], "mlorq.evaluation.report"),
}
__all__ = sorted(_HOMES)
__getattr__ = lazy_exports(__name__, _HOMES)
