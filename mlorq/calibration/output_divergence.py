"""The Kullback-Leibler divergence of a changed model's outputs from the float model's, and its gradients (METHOD 9).

``D = Σ p log(p / p̂)`` per sample, with ``p = softmax(f(x) / T)`` and T = 20 as in the code of APHQ-ViT and FIMA-Q
(arXiv 2504.02508, 2506.11543). For class logits it is the task's loss with the float model's classes in place of
labels. It and its gradient vanish where the outputs are the float model's, so its Hessian by an inner tensor is a
Fisher information matrix, positive semidefinite.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

TEMPERATURE = 20.0
STEP = 1e-2  # of a perturbation, relative to the tensor's root mean square


def divergence(outputs: Tensor, reference: Tensor) -> Tensor:
    """``Σ_j p_j log(p_j / p̂_j)`` of each sample.

    Args:
        outputs: of the changed model, ``(samples, outputs)``; differentiable.
        reference: of the float model, same shape.
    """
    own, wanted = ((value.float() / TEMPERATURE).log_softmax(1) for value in (outputs, reference))
    return (wanted.exp() * (wanted - own)).sum(1)


def divergence_gradient(tensor: Tensor, finish: Callable[[Tensor], Tensor], reference: Tensor) -> Tensor:
    """``∂D/∂z`` at an inner tensor z, float32, for each sample its own; zeros if the outputs do not depend on it.

    Args:
        tensor: z, samples first.
        finish: the model's outputs for a value of z, differentiable.
        reference: outputs of the float model.
    """
    with torch.enable_grad():
        entry = tensor.detach().clone().requires_grad_(True)
        total = divergence(finish(entry), reference).sum()
        (gradient,) = torch.autograd.grad(total, entry, allow_unused=True)
    return torch.zeros_like(entry).float() if gradient is None else gradient.float()


def perturbation_hessian(tensor: Tensor, finish: Callable[[Tensor], Tensor], reference: Tensor) -> Tensor:
    """``|g(z + ε) - g(z - ε)| / 2ε`` of each sample, for a change ε of all entries of z at once, float32.

    It approximates ``|H 1|``, the absolute row sums of the Hessian of D (APHQ-ViT, arXiv 2504.02508). There ε is 1e-6,
    which is lost in float32 beside entries of ordinary size; here it is ``STEP`` times the root mean square of z.

    Args:
        tensor, finish, reference: as for ``divergence_gradient``, z of the float model.
    """
    step = STEP * max(float(tensor.float().square().mean().sqrt()), torch.finfo(torch.float32).tiny)
    above, below = (divergence_gradient(tensor + sign * step, finish, reference) for sign in (1, -1))
    return (above - below).abs() / (2 * step)
