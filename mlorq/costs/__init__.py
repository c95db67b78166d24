"""Costs: local ones of all candidates, their Pareto front, and how they become global ones (METHOD 4, 5, 7)."""

from mlorq.lazy import lazy_exports

_HOMES = {
    **dict.fromkeys(["candidate_table"], "mlorq.costs.local"),
    **dict.fromkeys(["pareto_front"], "mlorq.costs.pareto"),
    **dict.fromkeys(["OutputCost"], "mlorq.costs.output_cost"),
    **dict.fromkeys(["LayerProbe", "local_sensitivity", "measured_sensitivity"], "mlorq.costs.measured"),
    **dict.fromkeys(["first_order_sensitivity"], "mlorq.costs.first_order"),
    **dict.fromkeys(["calibrated_sensitivity"], "mlorq.costs.calibrated"),
}
__all__ = sorted(_HOMES)
__getattr__ = lazy_exports(__name__, _HOMES)
