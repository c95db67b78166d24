"""Global costs as local costs times one measured factor per layer (METHOD 7, ``sensitivity: closed_form``).

In the metric of second moments, the ratio of global to local cost varies little among the candidates of a layer, but
between layers by an order of magnitude and more: the local cost counts an error per token, whatever the token's effect
on the output. One measurement per layer gives the ratio.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from mlorq.costs.measured import LayerProbe, dense_of, sensitivity_table
from mlorq.fitting.base import LayerFit
from mlorq.forms.base import FORMS


def calibrated_sensitivity(probe: LayerProbe, fit: LayerFit, table: pa.Table) -> pa.Table:
    """Global costs of all candidates on a layer's front (``schemas.SENSITIVITY``; METHOD 7).

    Args:
        probe: measures the layer.
        fit: fit of the layer's candidates.
        table: the layer's candidates (``schemas.CANDIDATES``).
    """
    local = table["local_cost"].to_numpy()
    front = np.flatnonzero(table["on_front"].to_numpy())
    # Fronts of factors reach down to rank 2, where the output's error is no longer in proportion to the local cost.
    products = np.array([FORMS[name].has_product for name in table["form"].to_pylist()])
    whole = front[~products[front]]
    chosen = middle_row(whole if len(whole) else front, local, table["bytes"].to_numpy())
    measured = _measured(probe, fit, table, chosen)
    if measured <= 0:  # the task's loss fell: the largest error may raise it
        chosen = int(front[local[front].argmax()])
        measured = _measured(probe, fit, table, chosen)
    cost = {int(row): calibrated_cost(local[row], local[chosen], measured) for row in front} | {chosen: measured}
    return sensitivity_table(table, cost, {row: "measured" if row == chosen else "closed_form" for row in cost})


def _measured(probe: LayerProbe, fit: LayerFit, table: pa.Table, row: int) -> float:
    return probe.cost(dense_of(fit, table.slice(row, 1).to_pylist()[0]))


def middle_row(front: np.ndarray, local: np.ndarray, size: np.ndarray) -> int:
    """The row whose size is nearest to the geometric mean of the front's smallest and largest, in logarithms.

    Rows without local cost are avoided: they give no factor.
    """
    known = front[local[front] > 0] if (local[front] > 0).any() else front
    logs = np.log(size[known].astype(float))
    return int(known[np.abs(logs - (logs.min() + logs.max()) / 2).argmin()])


def calibrated_cost(local: float, local_measured: float, measured: float) -> float:
    """``local · measured / local_measured``; 0 if the measured candidate has no local cost."""
    return float(local * measured / local_measured) if local_measured > 0 else 0.0
