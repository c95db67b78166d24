"""One pass over the calibration data: reference outputs, the label-free Hessian, covariances and token importance."""

from mlorq.lazy import lazy_exports

_HOMES = {
    **dict.fromkeys(["capture"], "mlorq.calibration.collect"),
    **dict.fromkeys(["label_free_hessian"], "mlorq.calibration.label_free_hessian"),
    **dict.fromkeys(["Moments", "OuterProducts", "pooled", "shrink"], "mlorq.calibration.covariance"),
    **dict.fromkeys(["token_importance"], "mlorq.calibration.token_importance"),
}
__all__ = sorted(_HOMES)
__getattr__ = lazy_exports(__name__, _HOMES)
