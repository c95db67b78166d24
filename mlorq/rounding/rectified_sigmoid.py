"""Constants of soft rounding by a rectified sigmoid, ``h(α) = clamp(σ(α)(ζ - γ) + γ, 0, 1)``.

AdaRound, arXiv 2004.10568. They are here for both the PyTorch and the Triton versions of it.
"""

GAMMA, ZETA = -0.1, 1.1
DECAYS, EPSILON = (0.9, 0.999), 1e-8  # of RAdam, as in torch.optim


def radam_scalars(step: int, learning_rate: float) -> tuple[float, float]:
    """The factors of RAdam's first moment and of its second moment's inverse root (arXiv 1908.03265).

    Args:
        step: from 1.
        learning_rate: its own.

    Returns:
        The rate over the first bias correction, and rectification times the root of the second one's: 0 in the first
        steps, in which the second moment is not used.
    """
    first, second = DECAYS
    most = 2 / (1 - second) - 1
    length = most - 2 * step * second**step / (1 - second**step)
    rate = learning_rate / (1 - first**step)
    if length <= 5:
        return rate, 0.0
    rectification = ((length - 4) * (length - 2) * most / ((most - 4) * (most - 2) * length)) ** 0.5
    return rate, rectification * (1 - second**step) ** 0.5
