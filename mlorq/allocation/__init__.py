"""Allocation: one integer program under the memory budget (METHOD 5, 8)."""

from mlorq.lazy import lazy_exports

_HOMES = {
    **dict.fromkeys(["Choices", "Group", "SearchSpace", "WidthChoices"], "mlorq.allocation.choices"),
    **dict.fromkeys(["Program", "Solution", "solve"], "mlorq.allocation.program"),
}
__all__ = sorted(_HOMES)
__getattr__ = lazy_exports(__name__, _HOMES)
