"""The label-free Hessian against the exact diagonal of E[JᵀJ], weight by weight."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mlorq.calibration.label_free_hessian import add_squared_gradients, label_free_hessian
from mlorq.errors import ModelError
from mlorq.models.layers import find_layers
from tests.nets import SharedNet, float_model, images, token_net


def exact_hessian(module: nn.Module, name: str, batch: torch.Tensor) -> torch.Tensor:
    """``E_x Σ_c (∂f_c(x)/∂W)²`` by one backward pass of the whole module a sample and output."""
    weight = module.get_parameter(name)
    weight.requires_grad_(True)
    total = torch.zeros_like(weight)
    for sample in batch:
        for output in module(sample.unsqueeze(0))[0]:
            (gradient,) = torch.autograd.grad(output, weight, retain_graph=True)
            total += gradient.square()
    weight.requires_grad_(False)
    return (total / len(batch)).reshape(total.shape[0], -1)


def test_exact_mode_is_the_exact_diagonal(seed, device):
    model = token_net(seed)
    batch = images(6, seed)
    found_layers = find_layers(model, batch)
    expected = {layer.name: exact_hessian(model.module, f"{layer.name}.weight", batch) for layer in found_layers.layers}
    model.module.to(device)
    found = label_free_hessian(model, found_layers.layers, [batch[:4], batch[4:]], mode="exact", device=device)
    assert set(found) == {"patch", "head", *(f"blocks.{i}.{n}" for i in range(3) for n in ("up", "down"))}
    for name, value in found.items():
        torch.testing.assert_close(value.cpu(), expected[name], rtol=1e-4, atol=1e-7)


def test_probes_estimate_the_exact_diagonal(seed):
    model = token_net(seed)
    batch = images(8, seed)
    layers = find_layers(model, batch).layers
    found = label_free_hessian(
        model, layers, [batch], probes=400, min_probes=400, tolerance=0, mode="probes", seed=seed
    )
    for layer in layers:
        expected = exact_hessian(model.module, f"{layer.name}.weight", batch)
        pair = torch.stack([found[layer.name].flatten(), expected.flatten()])
        assert float(torch.corrcoef(pair)[0, 1]) > 0.95, layer.name
        assert float(found[layer.name].sum() / expected.sum()) == pytest.approx(1, rel=0.1), layer.name


def test_shared_weights_count_once_with_all_their_uses(seed):
    torch.manual_seed(seed)
    model = float_model(SharedNet())
    batch = torch.randn(5, 3, 6, generator=torch.Generator().manual_seed(seed))
    layers = find_layers(model, batch).layers
    assert {layer.name: layer.aliases for layer in layers} == {"first": ("second",), "twice": ()}
    found = label_free_hessian(model, layers, [batch], mode="exact")
    for name in ("first", "twice"):
        expected = exact_hessian(model.module, f"{name}.weight", batch)
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-7)


def test_batching_does_not_matter_in_exact_mode(seed):
    model = token_net(seed)
    batch = images(6, seed)
    layers = find_layers(model, batch).layers
    whole = label_free_hessian(model, layers, [batch], mode="exact")
    parts = label_free_hessian(model, layers, [batch[:1], batch[1:5], batch[5:]], mode="exact")
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-4, atol=1e-9)


def test_probing_stops_on_convergence_and_not_before_the_minimum(seed):
    model = token_net(seed)
    batch = images(4, seed)
    layers = find_layers(model, batch).layers
    passes: list[int] = []
    label_free_hessian(
        model, layers, [batch], probes=50, min_probes=7, tolerance=1e9, mode="probes",
        progress=lambda done, total: passes.append(done),
    )  # fmt: skip
    assert passes[-1] == 7
    passes.clear()
    label_free_hessian(
        model, layers, [batch], probes=20, min_probes=7, tolerance=0, mode="probes",
        progress=lambda done, total: passes.append(done),
    )  # fmt: skip
    assert passes[-1] == 20


def test_layer_without_influence_has_zeros(seed):
    class Deaf(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used = nn.Linear(4, 3)
            self.pooler = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.pooler(x)
            return self.used(x)

    torch.manual_seed(seed)
    model = float_model(Deaf())
    batch = torch.randn(3, 4)
    found = label_free_hessian(model, find_layers(model, batch).layers, [batch])
    assert float(found["pooler"].abs().max()) == 0
    assert float(found["used"].min()) > 0


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("groups", [1, 2])
def test_squared_gradients_a_sample(tokens, groups, seed, device):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(7, tokens, groups * 3, generator=generator)
    delta = torch.randn(7, tokens, 8, generator=generator)
    total = torch.zeros(8, 3, device=device)
    add_squared_gradients(total, x.to(device), delta.to(device), groups)
    expected = torch.zeros(8, 3)
    for sample in range(7):
        gradient = delta[sample].T @ x[sample]  # (out_features, groups · in_features)
        for row in range(8):
            group = row // (8 // groups)
            expected[row] += gradient[row, group * 3 : (group + 1) * 3].square()
    torch.testing.assert_close(total.cpu(), expected, rtol=1e-4, atol=1e-5)


def test_gradients_that_are_not_finite_name_the_layer(seed):
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fine = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.fine(x) * 0).sqrt()

    model = float_model(Broken())
    batch = torch.randn(3, 4)
    layers = find_layers(model, batch).layers
    with pytest.raises(ModelError, match="'fine'"):
        label_free_hessian(model, layers, [batch])
