"""The calibration samples on which global costs are measured, and the cost function of the output.

With ``search.metric: moments``, candidates are fitted on the first of two folds of the calibration data
(``mlorq.fitting.covariance_fit``), and their costs are measured on samples of the second. Grouped convolutions have no
such moments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlorq.artifacts.hashing import digest_json
from mlorq.config.run import Cost
from mlorq.errors import DataError
from mlorq.models.layer_list import Layer

if TYPE_CHECKING:
    from torch import Tensor

    from mlorq.data.base import Dataset
    from steps.session import Session


@dataclass(frozen=True)
class Measuring:
    """How a global cost is measured.

    Attributes:
        samples: approximate number of calibration samples, spread evenly.
        held_out: whether they are taken from the second fold, which no candidate was fitted on.
        cost: cost function of the output.
        labels: digest of the labels that the cost reads; None if it reads none.
    """

    samples: int
    held_out: bool
    cost: Cost
    labels: str | None = None

    def of(self, data: Dataset) -> tuple[list[Any], list[Tensor] | None]:
        """The batches to measure on, and their labels if there are any.

        Args:
            data: the calibration data.
        """
        from mlorq.costs.measured import spread_batches
        from mlorq.models.batches import fold_batches

        def chosen(parts: Sequence[Any]) -> list[Any]:
            held_out = fold_batches(parts, 1) if self.held_out else []
            return spread_batches(held_out or parts, self.samples)

        return chosen(data.batches), None if data.labels is None else chosen(data.labels)


def measuring(session: Session, layers: Sequence[Layer]) -> Measuring:
    """How the costs of candidates are measured.

    Args:
        session: of the run.
        layers: the layers whose candidates are measured.

    Raises:
        DataError: the cost needs labels, and the calibration data has none.
    """
    search = session.config.search
    held_out = search.metric == "moments" and any(layer.groups == 1 for layer in layers)
    return Measuring(search.samples, held_out, search.cost, labels_digest(session))


def labels_digest(session: Session) -> str | None:
    """Digest of the labels that the configured cost reads; None if it reads none.

    Raises:
        DataError: the cost needs labels, and the calibration data has none.
    """
    if session.config.search.cost != "task":
        return None
    if session.known is not None:
        return session.known.labels
    labels = session.calibration.labels
    if labels is None:
        raise DataError("search.cost: task needs calibration data with labels; provide labels, or use nmse or kl")
    return digest_json([part.tolist() for part in labels])
