"""Constants of soft rounding by the rectified sigmoid ``h(α) = clamp(σ(α)(ζ - γ) + γ, 0, 1)`` and of its optimiser.

AdaRound, arXiv 2004.10568; METHOD 6. The PyTorch and Triton implementations share them.
"""

GAMMA, ZETA = -0.1, 1.1
DECAYS, EPSILON = (0.9, 0.999), 1e-8  # of RAdam, as in torch.optim


def radam_scalars(step: int, learning_rate: float) -> tuple[float, float]:
    """Step-dependent factors of RAdam's update (arXiv 1908.03265, algorithm 2).

    Args:
        step: number of the step, from 1.
        learning_rate: RAdam's step size.

    Returns:
        The learning rate divided by the bias correction of the first moment, and the rectification times the square
        root of the bias correction of the second moment. The latter is 0 in the first steps, which do not use the
        second moment.
    """
    first, second = DECAYS
    limit = 2 / (1 - second) - 1  # of the length of the approximated moving average, ρ∞
    length = limit - 2 * step * second**step / (1 - second**step)  # ρ_t
    rate = learning_rate / (1 - first**step)
    if length <= 5:
        return rate, 0.0
    rectification = ((length - 4) * (length - 2) * limit / ((limit - 4) * (limit - 2) * length)) ** 0.5
    return rate, rectification * (1 - second**step) ** 0.5
