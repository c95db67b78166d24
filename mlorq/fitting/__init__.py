"""Fits: the matrices of candidates under the label-free Hessian or under covariances (METHOD 1, 4, 7)."""

from mlorq.lazy import lazy_exports

_HOMES = {
    **dict.fromkeys(["LayerFit"], "mlorq.fitting.base"),
    **dict.fromkeys(["FitSettings"], "mlorq.fitting.settings"),
    **dict.fromkeys(["HessianFit"], "mlorq.fitting.hessian_fit"),
    **dict.fromkeys(["CovarianceFit", "Metric", "covariance_fit"], "mlorq.fitting.covariance_fit"),
    **dict.fromkeys(["search_quantizer"], "mlorq.fitting.scale_search"),
}
__all__ = sorted(_HOMES)
__getattr__ = lazy_exports(__name__, _HOMES)
