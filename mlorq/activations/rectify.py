"""ReLU in place of GELU, with trained weights of the layers around it (APHQ-ViT, arXiv 2504.02508; METHOD 8).

GELU has values down to -0.17, on which a uniform quantizer spends levels, and rare large ones. The two linear layers of
an MLP ``m(x) = W₂ GELU(W₁ x + b₁) + b₂`` are trained, with Adam and a cosine-annealed step size, so that

    Σ h (m'(x) - m(x))² + 2 Σ h (m'_u(x) - m(x))²

is small, where m' has ReLU in place of GELU and m'_u also clips its values at u, the 99th percentile of the positive
values of GELU. x are inputs of the MLP in the float model. The weights h of the entries of its output are means over
samples of ``calibration.output_divergence.perturbation_hessian``, or equal. Each step sees ``TOKENS`` random tokens.

An MLP is found in a forward pass, not by names: a module that computes GELU from the output of one linear layer, and
whose output the next linear layer reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlorq.activations.plan import RectifiedMlp
from mlorq.activations.settings import RectifyingSettings
from mlorq.calibration.output_divergence import perturbation_hessian
from mlorq.errors import ModelError
from mlorq.models.base import FloatModel
from mlorq.models.batches import move_batch, take_samples
from mlorq.models.layer_list import LINEAR, Layer
from mlorq.models.observe import first_argument
from mlorq.models.token_masks import counting

FEW = 4  # samples on which MLPs are found
CLOSE = 1e-4  # largest difference of a module's output from GELU
PERCENTILE = 0.99  # of the positive values of GELU: the clipping point u
CLIPPED = 2.0  # weight of the error with clipped values
TOKENS = 1024  # per step


def replace_activation(module: nn.Module, name: str) -> None:
    """Put ReLU in the place of a submodule.

    Raises:
        AttributeError: there is none of this name.
        ModelError: it is more than a function: it has tensors or submodules.
    """
    given = module.get_submodule(name)
    if list(given.children()) or given.state_dict():  # of a checkpoint that names it, too
        raise ModelError(f"mlps: {name!r:.60} is no activation function")
    parent, _, leaf = name.rpartition(".")
    module.get_submodule(parent)._modules[leaf] = nn.ReLU()


def set_layer(module: nn.Module, name: str, weight: Tensor, bias: Tensor | None) -> None:
    """Set the weight, and the bias if there is one, of a linear layer."""
    layer = module.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)


def rectify(
    model: FloatModel,
    layers: Sequence[Layer],
    batches: Sequence[Any],
    settings: RectifyingSettings,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[RectifiedMlp], dict[str, Tensor]]:
    """The MLPs of a model, and weights with which they have ReLU.

    Args:
        model: the float model, on ``device``; it is not changed.
        layers: its compressible layers, which alone are trained.
        batches: calibration samples.
        settings: number of steps, step size, and whether errors are weighted.
        seed: of the order of tokens.
        device: device of the model.
        progress: called with (MLPs done, MLPs).

    Returns:
        The MLPs, none if the model has none, and their tensors as in ``ActivationPlan``.
    """
    moved = [move_batch(batch, device, model.dtype) for batch in batches]
    mlps = find_mlps(model, layers, moved[0])
    tensors: dict[str, Tensor] = {}
    for index, mlp in enumerate(mlps):
        data = observe(model, mlp, moved, weighted=settings.mlp_weights == "perturbation")
        first, second = (linear(model.module, name) for name in mlp.layers)
        start = {
            f"mlp.{name}.{part}": value
            for name, layer in zip(mlp.layers, (first, second), strict=True)
            for part, value in layer.named_parameters()
        }
        tensors |= train(start, mlp, data, settings, seed)
        if progress is not None:
            progress(index + 1, len(mlps))
    return mlps, tensors


def linear(module: nn.Module, name: str) -> nn.Linear:
    """A linear layer by name."""
    found = module.get_submodule(name)
    assert isinstance(found, nn.Linear)
    return found


def find_mlps(model: FloatModel, layers: Sequence[Layer], batch: Any) -> list[RectifiedMlp]:
    """The MLPs of a model that consist of compressible linear layers of their own, each called once.

    Args:
        model: the float model, on the batch's device.
        layers: the compressible layers.
        batch: some samples.
    """
    own = {layer.name for layer in layers if layer.kind == LINEAR and not layer.aliases}
    own = {name for name in own if isinstance(model.module.get_submodule(name), nn.Linear)}
    before: tuple[str, Tensor] | None = None  # the last linear layer and its output
    pending: tuple[str, str, Tensor] | None = None  # with the name of GELU and its output
    found: list[RectifiedMlp] = []
    calls: dict[str, int] = {}

    def entered(name: str, value: Tensor) -> None:
        nonlocal pending
        if pending is not None and torch.equal(pending[2], value):
            found.append(RectifiedMlp(pending[1], (pending[0], name)))
        pending = None

    def left(name: str, value: Tensor, output: Any) -> None:
        nonlocal before, pending
        calls[name] = calls.get(name, 0) + 1
        if name in own:
            before = name, output
        elif before is not None and isinstance(output, Tensor) and is_gelu(value, output):
            pending = (before[0], name, output) if torch.equal(before[1], value) else None

    handles = []
    for name, child in model.module.named_modules():
        if name in own:
            handles.append(
                child.register_forward_pre_hook(
                    lambda _, args, kwargs, name=name: entered(name, first_argument(args, kwargs)), with_kwargs=True
                )
            )
        if name in own or not (list(child.children()) or list(child.parameters(recurse=False))):
            handles.append(
                child.register_forward_hook(
                    lambda _, args, kwargs, output, name=name: left(name, first_argument(args, kwargs), output),
                    with_kwargs=True,
                )
            )
    try:
        with torch.no_grad():
            model.outputs(model.module, take_samples(batch, slice(0, FEW)))
    finally:
        for handle in handles:
            handle.remove()
    return [mlp for mlp in found if all(calls[name] == 1 for name in (mlp.activation, *mlp.layers))]


def is_gelu(value: Any, output: Tensor) -> bool:
    """Whether ``output`` is GELU of ``value``, exact or by tanh."""
    if not isinstance(value, Tensor) or value.shape != output.shape or not bool((value < 0).any()):
        return False
    return any(
        bool((F.gelu(value, approximate=kind) - output).abs().amax() <= CLOSE * (1 + output.abs().amax()))
        for kind in ("none", "tanh")
    )


@dataclass(frozen=True)
class MlpData:
    """What an MLP does in the float model.

    Attributes:
        inputs: x, ``(tokens, in_features)`` float32.
        outputs: m(x), ``(tokens, out_features)`` float32.
        weights: h, same shape; None: equal.
        limit: u.
    """

    inputs: Tensor
    outputs: Tensor
    weights: Tensor | None
    limit: float


def observe(model: FloatModel, mlp: RectifiedMlp, batches: Sequence[Any], *, weighted: bool) -> MlpData:
    """Inputs and outputs of an MLP, without padding, and the weights of its outputs.

    Args:
        model: the float model, on the batches' device.
        mlp: the MLP.
        batches: samples.
        weighted: whether there are weights.
    """
    inputs, outputs, positive, kept = [], [], [], []
    sums: dict[tuple[int, ...], Tensor] = {}
    counts: dict[tuple[int, ...], int] = {}
    for batch in batches:
        seen: dict[str, Tensor] = {}
        with torch.no_grad(), watched(model.module, mlp, seen):
            reference = model.outputs(model.module, batch)
        output = seen["output"]
        mask = counting(model.token_mask(batch), output)
        shape = tuple(output.shape[1:])
        if weighted:
            hessian = perturbation_hessian(output, finisher(model, mlp, batch), reference)
            if mask is not None:
                hessian = hessian * mask.unsqueeze(-1)
            sums[shape] = sums.get(shape, torch.zeros_like(hessian[0])) + hessian.sum(0)
            counts[shape] = counts.get(shape, 0) + len(hessian)
        kept.append((shape, len(output), mask))
        inputs.append(of_tokens(seen["input"], mask))
        outputs.append(of_tokens(output, mask))
        hidden = of_tokens(seen["hidden"], mask)
        positive.append(hidden[hidden > 0])
    weights = None
    if weighted:
        means = {shape: value / counts[shape] for shape, value in sums.items()}
        parts = [of_tokens(means[shape].expand(samples, *shape), mask) for shape, samples, mask in kept]
        weights = torch.cat(parts)
        weights = weights / weights.mean().clamp(min=torch.finfo(weights.dtype).tiny)
    values = torch.cat(positive).sort().values
    limit = float(values[min(len(values) - 1, int(PERCENTILE * len(values)))]) if len(values) else 0.0
    return MlpData(torch.cat(inputs), torch.cat(outputs), weights, limit)


def of_tokens(values: Tensor, mask: Tensor | None) -> Tensor:
    """``(tokens, features)`` float32 of ``(samples, …, features)``, without padding."""
    return (values.flatten(0, -2) if mask is None else values[mask.to(values.device)]).float()


@contextmanager
def watched(module: nn.Module, mlp: RectifiedMlp, seen: dict[str, Tensor]) -> Iterator[None]:
    """Keep the input, the hidden values and the output of an MLP."""
    first, second = (module.get_submodule(name) for name in mlp.layers)
    handles = [
        first.register_forward_pre_hook(
            lambda _, args, kwargs: seen.__setitem__("input", first_argument(args, kwargs)), with_kwargs=True
        ),
        second.register_forward_pre_hook(
            lambda _, args, kwargs: seen.__setitem__("hidden", first_argument(args, kwargs)), with_kwargs=True
        ),
        second.register_forward_hook(lambda _, __, output: seen.__setitem__("output", output)),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def finisher(model: FloatModel, mlp: RectifiedMlp, batch: Any) -> Callable[[Tensor], Tensor]:
    """Outputs of the float model with another output of an MLP."""

    def finish(output: Tensor) -> Tensor:
        handle = model.module.get_submodule(mlp.layers[1]).register_forward_hook(lambda *_: output)
        try:
            return model.outputs(model.module, batch)
        finally:
            handle.remove()

    return finish


def train(
    start: Mapping[str, Tensor], mlp: RectifiedMlp, data: MlpData, settings: RectifyingSettings, seed: int
) -> dict[str, Tensor]:
    """The trained parameters of an MLP with ReLU, on the CPU; the given ones if training them made the error larger.

    Args:
        start: the given ones, named as in ``ActivationPlan``.
        mlp: the MLP.
        data: what it does in the float model.
        settings: number of steps and step size.
        seed: of the order of tokens.
    """
    own = {name: value.detach().float().clone().requires_grad_(True) for name, value in start.items()}
    optimiser = torch.optim.Adam(list(own.values()), lr=settings.mlp_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, settings.mlp_iterations)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(settings.mlp_iterations):
        chosen = torch.randint(len(data.inputs), (min(TOKENS, len(data.inputs)),), generator=generator)
        optimiser.zero_grad(set_to_none=True)
        with torch.enable_grad():
            loss = relative_error(own, mlp, data, chosen.to(data.inputs.device))
        loss.backward()
        optimiser.step()
        schedule.step()
    given = {name: value.detach().float() for name, value in start.items()}
    every = torch.arange(len(data.inputs), device=data.inputs.device)
    with torch.no_grad():
        # Steps have one size for all weights: far above those of a layer that is scaled down.
        trained, untrained = (float(relative_error(one, mlp, data, every)) for one in (own, given))
    best = own if trained <= untrained else given  # also if it is not a number any more
    return {name: value.detach().to(start[name].dtype).cpu() for name, value in best.items()}


def relative_error(own: Mapping[str, Tensor], mlp: RectifiedMlp, data: MlpData, chosen: Tensor) -> Tensor:
    """The loss of some tokens, relative to ``Σ h m(x)²``."""
    x, target = data.inputs[chosen], data.outputs[chosen]
    weights = torch.ones(()).to(x) if data.weights is None else data.weights[chosen]
    first, second = ((own[f"mlp.{name}.weight"], own.get(f"mlp.{name}.bias")) for name in mlp.layers)
    hidden = F.linear(x, *first).relu()
    plain, clipped = (F.linear(values, *second) for values in (hidden, hidden.clamp(max=data.limit)))
    total = (weights * ((plain - target).square() + CLIPPED * (clipped - target).square())).sum()
    return total / (weights * target.square()).sum().clamp(min=torch.finfo(torch.float32).tiny)
