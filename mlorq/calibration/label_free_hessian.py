"""Label-free Hessian: mean squared gradients of the model's output with respect to each weight.

``H_ij = E_x E_v [(∂(v · f(x)) / ∂W_ij)²]`` with ``v ~ N(0, I)`` (METHOD 3; MLoRQ, arXiv 2507.09616; EPTQ,
arXiv 2309.11531). Gradients are squared per sample, before averaging. For a token-wise layer the gradient of one
sample is ``Σ_t δ_t x_tᵀ``, so gradients with respect to the layers' *outputs* are enough: the backward pass forms no
weight gradients, nothing accumulates between probes, and a batch of samples costs one backward pass.

Since ``E_v (Σ_c v_c g_c)² = Σ_c g_c²``, C one-hot backward passes give the exact value; with few outputs that is
cheaper than probing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mlorq.calibration.covariance import OuterProducts
from mlorq.calibration.in_groups import Stops
from mlorq.errors import ModelError
from mlorq.models.base import FloatModel
from mlorq.models.batches import batch_samples, move_batch
from mlorq.models.layer_list import Layer
from mlorq.models.observe import first_argument
from mlorq.models.token_masks import TokenMask, counting, mask_for
from mlorq.models.unfolding import input_tokens, output_tokens

Mode = Literal["auto", "probes", "exact"]

GRADIENT_PASSES = 8  # G is an average over all tokens: a few passes suffice
CHUNK_ELEMENTS = {
    "cpu": 1 << 18,
    "cuda": 1 << 26,
}  # entries of per-sample gradients held at once: bounded by the cache, or by device memory


def label_free_hessian(
    model: FloatModel,
    layers: Sequence[Layer],
    batches: Sequence[Any],
    *,
    probes: int = 32,
    min_probes: int = 10,
    tolerance: float = 1e-4,
    mode: Mode = "auto",
    seed: int = 0,
    gradients: Mapping[str, OuterProducts] | None = None,
    only: Collection[str] | None = None,
    stops: Stops | None = None,
    alone: Collection[str] = (),
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor]:
    """The label-free Hessian of every layer, estimated or exact (METHOD 3).

    Args:
        model: the float model, on ``device``.
        layers: the compressible layers.
        batches: calibration batches; all their samples count equally.
        probes: largest number of Gaussian probes per batch.
        min_probes: probes per batch before convergence is checked.
        tolerance: probing of a batch stops once the relative change of every layer's mean is below this.
        mode: ``probes``; ``exact`` (one backward pass per output); ``auto`` (the one that needs fewer passes).
        seed: seed of the probes, which are drawn on the CPU: every device uses the same ones.
        gradients: ``{layer: sums}`` to which the outer products of ``∂(v · f)/∂y`` are added, for the second moments of
            output gradients; from at most ``GRADIENT_PASSES`` passes per batch, spread evenly.
        only: names of the layers whose Hessians are computed; None: all. Their numbers are those of a call for all
            layers if ``stops`` says where that one would have stopped.
        stops: where probing stops, if other layers have a say in it; None: the layers of this call decide.
        alone: names of layers whose inputs are some of a sample's tokens, or none of them (``LayerList.alone``).
        device: device of the model.
        progress: called with (passes done, largest possible number of passes).

    Returns:
        ``{layer: (out_features, in_features) float32}`` on ``device``; zeros for layers that cannot affect f.

    Raises:
        ModelError: an activation or gradient is not finite; the message names the layer.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = [layer for layer in layers if only is None or layer.name in only]
    modules = {layer.name: model.module.get_submodule(layer.name) for layer in chosen}
    total = {layer.name: torch.zeros(layer.out_features, layer.in_features, device=device) for layer in chosen}
    samples = 0
    for index, batch in enumerate(batches):
        moved = move_batch(batch, device, model.dtype)
        count = batch_samples(batch)
        mask = model.token_mask(moved)
        record, outputs = recorded_calls(model, layers, partial(model.outputs, model.module, moved))
        record = [call for call in record if call[0] in modules]
        exact = mode == "exact" or (mode == "auto" and outputs.shape[1] <= probes)
        passes = outputs.shape[1] if exact else probes
        batch_total = {name: torch.zeros_like(value) for name, value in total.items()}
        means: Tensor | None = None
        done = 0
        vectors = _vectors(outputs, exact, passes, generator)
        for vector in vectors:
            wanted = gradients if done * GRADIENT_PASSES // passes != (done - 1) * GRADIENT_PASSES // passes else None
            _add_pass(record, modules, outputs, vector, count, batch_total, wanted, samples, mask, alone)
            done += 1
            if progress is not None:
                progress(index * passes + done, len(batches) * passes)
            if exact or done == passes:
                continue
            converged = False
            if min_probes < passes and (stops is None or stops.listens):
                new_means = torch.stack([value.mean() for value in batch_total.values()]) / done
                if means is not None and done >= min_probes:
                    change = (new_means - means).abs() / means.clamp(min=torch.finfo(means.dtype).tiny)
                    converged = float(change.max()) < tolerance
                means = new_means
            if converged if stops is None else stops.after(index, done, converged):
                break
        for _ in vectors:  # the next batch has the same vectors wherever this one stopped
            pass
        for name, value in batch_total.items():
            if not torch.isfinite(value).all():
                raise ModelError(
                    f"layer {name!r}: its activations or gradients are not finite; "
                    "check the model's weights and the calibration data"
                )
            total[name] += value if exact else value.div_(done)
        samples += count
    return {name: value.div_(samples) for name, value in total.items()}


def _vectors(outputs: Tensor, exact: bool, passes: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Vectors v of the backward passes, of the outputs' shape: one-hot if ``exact``, else Gaussian."""
    for index in range(passes):
        if exact:
            vector = torch.zeros_like(outputs)
            vector[:, index] = 1
        else:
            vector = torch.randn(outputs.shape, generator=generator).to(outputs.device)
        yield vector


Call = tuple[str, Tensor, Tensor]  # of a layer: its name, its input, its output


def recorded_calls(
    model: FloatModel, layers: Sequence[Layer], forward: Callable[[], Tensor]
) -> tuple[list[Call], Tensor]:
    """All calls of the layers in one forward pass, and the model's outputs, within one autograd graph.

    Args:
        model: the float model.
        layers: the layers.
        forward: a pass of the model, whole or from a block on; returns its outputs.
    """
    copied: set[str] = set()
    while True:
        recording = _Recording(model, layers, copied)
        with recording as record, torch.enable_grad():
            outputs = forward()
        overwritten = recording.overwritten()
        if not overwritten:
            return record, outputs
        copied |= overwritten  # the model wrote into inputs after they were read: once more, with copies of these


class _Recording:
    """Records the inputs and outputs of all calls of the layers in one forward pass, within one autograd graph.

    Args:
        model: the model.
        layers: the layers to record.
        copied: names of the layers whose inputs are copied.
    """

    def __init__(self, model: FloatModel, layers: Sequence[Layer], copied: Collection[str]) -> None:
        self.calls: list[Call] = []
        self._copied = copied
        self._versions: list[int] = []
        self._targets: dict[int, tuple[str, nn.Module]] = {}
        for layer in layers:
            for name in (layer.name, *layer.aliases):
                child = model.module.get_submodule(name)
                self._targets[id(child)] = (layer.name, child)

    def overwritten(self) -> set[str]:
        """Names of the layers whose inputs have changed since they were read."""
        pairs = zip(self.calls, self._versions, strict=True)
        return {name for (name, inputs, _), version in pairs if inputs._version != version}

    def __enter__(self) -> list[Call]:
        self._handles = [
            child.register_forward_hook(self._hook(name), with_kwargs=True) for name, child in self._targets.values()
        ]
        return self.calls

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str) -> Callable[..., Tensor]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> Tensor:
            if not output.requires_grad:
                output = output.detach().requires_grad_(True)
            inputs = first_argument(args, kwargs).detach()
            inputs = inputs.clone() if name in self._copied else inputs
            self.calls.append((name, inputs, output))
            self._versions.append(inputs._version)
            # Return a copy: an in-place activation must not overwrite the tensor that is differentiated.
            return output.clone()

        return hook


def _add_pass(
    record: list[Call],
    modules: dict[str, nn.Module],
    outputs: Tensor,
    vectors: Tensor,
    samples: int,
    total: dict[str, Tensor],
    products: Mapping[str, OuterProducts] | None,
    first: int,
    mask: TokenMask,
    alone: Collection[str],
) -> None:
    """Add ``Σ_samples (∂(v · f) / ∂W)²``, one v per sample, to ``total``, and output gradients to ``products``."""
    if not outputs.requires_grad:
        return
    gradients = torch.autograd.grad(
        outputs, [output for _, _, output in record], vectors, retain_graph=True, allow_unused=True
    )
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for (name, inputs, _), gradient in zip(record, gradients, strict=True):
        if gradient is not None:
            calls.setdefault(name, []).append((inputs, gradient))
    for name, parts in calls.items():
        module = modules[name]
        x = torch.cat([input_tokens(module, inputs, samples) for inputs, _ in parts], dim=1)
        delta = torch.cat([output_tokens(module, gradient, samples) for _, gradient in parts], dim=1)
        add_squared_gradients(total[name], x.float(), delta.float(), getattr(module, "groups", 1))
        if products is not None and name in products:
            products[name].add(delta, first, counting(mask_for(name, mask, alone), delta))


def add_squared_gradients(total: Tensor, inputs: Tensor, gradients: Tensor, groups: int = 1) -> None:
    """Add ``Σ_b (Σ_t δ_bt x_btᵀ)²``, squared element by element, in place.

    Args:
        total: ``(out_features, in_features)``.
        inputs: x, ``(samples, tokens, groups · in_features)``.
        gradients: δ, ``(samples, tokens, out_features)``.
        groups: convolution groups; rows of a group see only that group's inputs.
    """
    rows, columns = total.shape
    for group in range(groups):
        part = slice(group * rows // groups, (group + 1) * rows // groups)
        x = inputs[..., group * columns : (group + 1) * columns]
        delta = gradients[..., part]
        if x.shape[1] == 1:
            total[part] += delta[:, 0].square().T @ x[:, 0].square()
            continue
        step = max(1, CHUNK_ELEMENTS.get(total.device.type, 1 << 20) // (delta.shape[-1] * columns))
        for start in range(0, x.shape[0], step):
            chunk = slice(start, start + step)
            product = torch.bmm(delta[chunk].transpose(1, 2), x[chunk])
            if step == 1:
                total[part].addcmul_(product[0], product[0])
            else:
                total[part] += product.square_().sum(0)
