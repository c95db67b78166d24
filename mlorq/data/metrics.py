"""Task metrics as pure functions of predictions and labels, and the names of all metrics.

Configurations need the names alone, so the functions import numpy themselves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def top_k_accuracy(logits: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Share of samples whose label is among the k largest logits.

    Args:
        logits: ``(samples, classes)``.
        labels: ``(samples,)`` class numbers.
        k: number of top classes; at most all of them count.
    """
    import numpy as np

    k = min(k, logits.shape[1])
    best = np.argpartition(-logits, k - 1, axis=1)[:, :k]
    return float((best == labels[:, None]).any(1).mean())


def accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Share of predictions ``(samples,)`` that equal their labels."""
    return float((predicted == labels).mean())


def f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    """F1 score of class 1; 0 if class 1 occurs in neither predictions nor labels."""
    hits = float(((predicted == 1) & (labels == 1)).sum())
    total = float((predicted == 1).sum() + (labels == 1).sum())
    return 2 * hits / total if total else 0.0


def matthews(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Matthews correlation coefficient of classes 0 and 1; 0 if either argument is constant."""
    return pearson((predicted == 1).astype(float), (labels == 1).astype(float))


def pearson(values: np.ndarray, labels: np.ndarray) -> float:
    """Pearson correlation; 0 if either argument is constant."""
    import numpy as np

    if np.ptp(values) == 0 or np.ptp(labels) == 0:
        return 0.0
    return float(np.corrcoef(values, labels)[0, 1])


def spearman(values: np.ndarray, labels: np.ndarray) -> float:
    """Spearman rank correlation, with the mean rank for ties; 0 if either argument is constant."""
    import numpy as np

    if np.ptp(values) == 0 or np.ptp(labels) == 0:
        return 0.0
    import scipy.stats  # the import takes a second or two

    return float(scipy.stats.spearmanr(values, labels).statistic)


CLASSIFICATION = {"accuracy": accuracy, "f1": f1, "matthews": matthews}
TWO_CLASSES = ("f1", "matthews")
CORRELATION = {"pearson": pearson, "spearman": spearman}
DETECTION = ("box_ap", "mask_ap")  # computed by average_precision
METRICS = (*CLASSIFICATION, *CORRELATION, *DETECTION)
