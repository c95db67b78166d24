"""Task metrics as pure functions of predictions and labels, and the names of all metrics.

Configurations offer the names, so numpy is imported when something is computed.
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
        k: how many classes count.
    """
    import numpy as np

    k = min(k, logits.shape[1])
    best = np.argpartition(-logits, k - 1, axis=1)[:, :k]
    return float((best == labels[:, None]).any(1).mean())


def accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Share of equal entries."""
    return float((predicted == labels).mean())


def f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    """F1 of class 1; 0 where neither is ever 1."""
    hits = float(((predicted == 1) & (labels == 1)).sum())
    total = float((predicted == 1).sum() + (labels == 1).sum())
    return 2 * hits / total if total else 0.0


def matthews(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Matthews correlation of two classes; 0 where either side is constant."""
    return pearson((predicted == 1).astype(float), (labels == 1).astype(float))


def pearson(values: np.ndarray, labels: np.ndarray) -> float:
    """Pearson correlation; 0 where either side is constant."""
    import numpy as np

    if np.ptp(values) == 0 or np.ptp(labels) == 0:
        return 0.0
    return float(np.corrcoef(values, labels)[0, 1])


def spearman(values: np.ndarray, labels: np.ndarray) -> float:
    """Spearman rank correlation, ties by their mean rank; 0 where either side is constant."""
    import numpy as np

    if np.ptp(values) == 0 or np.ptp(labels) == 0:
        return 0.0
    import scipy.stats  # takes a second or two

    return float(scipy.stats.spearmanr(values, labels).statistic)


CLASSIFICATION = {"accuracy": accuracy, "f1": f1, "matthews": matthews}
TWO_CLASSES = ("f1", "matthews")
CORRELATION = {"pearson": pearson, "spearman": spearman}
DETECTION = ("box_ap", "mask_ap")  # of average_precision
METRICS = (*CLASSIFICATION, *CORRELATION, *DETECTION)
