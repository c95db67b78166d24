"""Weights of tokens: against gradients taken one by one, and in every average that they enter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import mlorq
from mlorq.calibration.collect import capture
from mlorq.calibration.covariance import OuterProducts
from mlorq.calibration.token_importance import (
    FLOOR,
    importance_of_tensors,
    importance_tensors,
    leaders,
    token_importance,
)
from mlorq.codecs.affine import QuantizedMatrix
from mlorq.forms.base import Candidate
from mlorq.forms.stored_layer import CompressedLayer
from mlorq.models.layers import find_layers
from mlorq.models.unfolding import input_tokens
from mlorq.rounding.paired_forward import PairedForward, token_weights
from mlorq.rounding.reconstruction import ReconstructionSettings, reconstruct
from tests.nets import Block, TokenNet, float_model, images, token_net


class FirstTokenNet(nn.Module):
    """Mixes tokens, then blocks that do not, then a head that reads the first token alone."""

    def __init__(self, width: int = 8, tokens: int = 5) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(tokens, tokens))
        self.first = nn.Parameter(2 * torch.randn(width))
        self.q, self.k = nn.Linear(width, width), nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix @ torch.tanh(self.q(x) + self.k(x))
        x = torch.cat([0.3 * x[:, :1] + self.first, x[:, 1:]], dim=1)  # one that is unlike the others
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])


def first_token_net(seed: int):
    torch.manual_seed(seed)
    model = float_model(FirstTokenNet(), ("blocks.0", "blocks.1"))
    batches = [torch.randn(4, 5, 8), torch.randn(3, 5, 8)]
    return model, find_layers(model, batches[0]), batches


def naive(model, name: str, batches: list[Tensor], passes: int, seed: int) -> Tensor:
    """Squared gradients at a module's output, sample by sample, output by output of v."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for batch in batches:
        shape = model.outputs(model.module, batch).shape
        vectors = [torch.randn(shape, generator=generator) for _ in range(passes)]
        for index in range(len(batch)):
            kept: list[Tensor] = []
            handle = model.module.get_submodule(name).register_forward_hook(
                lambda _, __, output, kept=kept: kept.append(output.requires_grad_()) or output
            )
            with torch.enable_grad():
                output = model.outputs(model.module, batch[index : index + 1])
            handle.remove()
            total = torch.zeros(kept[0].shape[:-1])
            for vector in vectors:
                (gradient,) = torch.autograd.grad((output * vector[index]).sum(), kept[0], retain_graph=True)
                total += gradient.square().sum(-1)
            found.append(total)
    return torch.cat(found)


def test_weights_are_squared_gradients_with_mean_one_and_a_floor(seed):
    model, listed, batches = first_token_net(seed)
    found = token_importance(model, listed.layers, listed.blocks, batches, passes=3, seed=seed)
    assert [len(part["blocks.0"]) for part in found] == [4, 3]
    for name in ("blocks.0.up", "blocks.0", "blocks.0.down"):
        weights = torch.cat([part[name] for part in found])
        raw = naive(model, name, batches, 3, seed)
        torch.testing.assert_close(weights, (1 - FLOOR) * raw / raw.mean() + FLOOR, rtol=1e-4, atol=1e-6)
        assert float(weights.mean()) == pytest.approx(1, rel=1e-5)
    # Behind the mixing only the first token is read.
    torch.testing.assert_close(found[0]["blocks.1"][:, 1:], torch.full((4, 4), FLOOR))
    assert float(found[0]["q"].min()) > FLOOR
    # Layers that read the same tensor have one weight: the sum of both gradients.
    assert leaders(listed.layers) == {layer.name: "q" if layer.name == "k" else layer.name for layer in listed.layers}
    raw = naive(model, "q", batches, 3, seed) + naive(model, "k", batches, 3, seed)
    torch.testing.assert_close(
        torch.cat([part["q"] for part in found]), (1 - FLOOR) * raw / raw.mean() + FLOOR, rtol=1e-4, atol=1e-6
    )
    assert all(not value.requires_grad for part in found for value in part.values())


def test_weights_to_a_power(seed):
    model, listed, batches = first_token_net(seed)
    found = token_importance(model, listed.layers, listed.blocks, batches, passes=2, power=0.5, seed=seed)
    root = naive(model, "blocks.0", batches, 2, seed).sqrt()
    weights = torch.cat([part["blocks.0"] for part in found])
    torch.testing.assert_close(weights, (1 - FLOOR) * root / root.mean() + FLOOR, rtol=1e-4, atol=1e-6)


def test_in_place_activations_and_convolutions_have_weights_too(seed):
    model = token_net(seed)
    batches = [images(4, seed), images(4, seed + 1)]
    listed = find_layers(model, batches[0])
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    found = token_importance(model, listed.layers, listed.blocks, batches, seed=seed)
    assert found[0]["patch"].shape == (4, 9)  # positions of the convolution's output
    assert found[0]["head"].shape == (4, 1)
    assert set(found[0]) == {layer.name for layer in listed.layers} | set(listed.blocks)
    assert all(torch.equal(value, before[name]) for name, value in model.module.state_dict().items())
    again = importance_of_tensors(importance_tensors(found), 2)
    for one, two in zip(found, again, strict=True):
        assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_what_cannot_affect_the_output_has_no_weights():
    class Dead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.dead = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x) + 0 * self.dead(x)

    model = float_model(Dead())
    batches = [torch.randn(2, 4, 3)]
    listed = find_layers(model, batches[0])
    (found,) = token_importance(model, listed.layers[1:], [], batches)
    assert found == {}


def test_weighted_outer_products_are_weighted_means(seed):
    torch.manual_seed(seed)
    vectors, weights, mask = torch.randn(5, 7, 4), torch.rand(5, 7), torch.rand(5, 7) > 0.3
    for used in (None, mask):
        products = OuterProducts(4, "cpu")
        products.add(vectors[:2], 0, None if used is None else used[:2], weights[:2])
        products.add(vectors[2:], 2, None if used is None else used[2:], weights[2:])
        for fold in range(2):
            x, w = vectors[fold::2].double(), weights[fold::2].double()
            w = w if used is None else w * used[fold::2]
            expected = torch.einsum("st,sti,stj->ij", w, x, x) / w.sum()
            torch.testing.assert_close(products.means()[fold], expected, rtol=1e-5, atol=1e-6)
            assert products.counts[fold] == round(float(w.sum() ** 2 / w.square().sum()))


def test_captured_covariances_are_weighted(seed):
    model, listed, batches = first_token_net(seed)
    weights = token_importance(model, listed.layers, listed.blocks, batches, seed=seed)
    captured = capture(model, listed.layers, batches, moments=True, importance=weights)
    plain = capture(model, listed.layers, batches, moments=True)
    x, w = torch.cat(batches).double(), torch.cat([part["q"] for part in weights]).double()
    for name in ("q", "k"):
        for fold in range(2):
            own = w[fold::2] / w[fold::2].sum()
            expected = torch.einsum("st,sti,stj->ij", own, x[fold::2], x[fold::2])
            torch.testing.assert_close(captured.inputs[name].means()[fold], expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(captured.inputs["q"].means(), plain.inputs["q"].means(), rtol=0.01)


def coarse(layer, module: nn.Module) -> CompressedLayer:
    """A layer's weight on a grid of four values a row."""
    weight = module.get_submodule(layer.name).weight.flatten(1)
    scale = (weight.abs().amax(1) / 2).half()
    codes = (weight / scale.float().unsqueeze(1)).round().clamp(-2, 1) + 2
    zero = torch.full((len(weight),), 2, dtype=torch.uint8)
    matrix = QuantizedMatrix(codes.to(torch.uint8), scale, zero, 2)
    return CompressedLayer(layer.name, Candidate("Q", bits=2), {"weight": matrix})


def test_moments_of_both_models_are_weighted(seed):
    model, listed, batches = first_token_net(seed)
    weights = token_importance(model, listed.layers, listed.blocks, batches, seed=seed)
    paired = PairedForward(model, listed.blocks, batches, importance=weights, leaders=leaders(listed.layers))
    for name in ("q", "k"):
        paired.set(listed[name], coarse(listed[name], model.module))
    layer = listed["blocks.0.up"]
    found = paired.moments(layer)
    inputs = []
    for module in (model.module, paired.compressed):
        kept: list[Tensor] = []
        handle = module.get_submodule(layer.name).register_forward_pre_hook(
            lambda _, args, kept=kept: kept.append(args[0])
        )
        for batch in batches:
            module(batch)
        handle.remove()
        inputs.append(input_tokens(module.get_submodule(layer.name), torch.cat(kept), 7).double())
    x, y = inputs
    w = torch.cat([part[layer.name] for part in weights]).double()
    for moments, part in ((found, slice(None)), *zip(found.folds, (slice(0, None, 2), slice(1, None, 2)), strict=True)):
        own = w[part] / w[part].sum()
        a, b, drift = x[part], y[part], x[part] - y[part]
        for value, (left, right) in (
            (moments.compressed, (b, b)),
            (moments.drift_cross, (drift, b)),
            (moments.drift, (drift, drift)),
        ):
            torch.testing.assert_close(value, torch.einsum("st,sti,stj->ij", own, left, right), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(moments.mean, torch.einsum("st,sti->i", own, b), rtol=1e-4, atol=1e-6)
        assert a.shape == b.shape


def test_reconstruction_serves_the_tokens_that_matter(seed):
    model, listed, _ = first_token_net(seed)
    torch.manual_seed(seed)
    batches = [torch.randn(16, 5, 8) for _ in range(20)]
    weights = token_importance(model, listed.layers, listed.blocks, batches, seed=seed)
    errors = {}
    for importance in (None, weights):
        paired = PairedForward(model, listed.blocks, batches, importance=importance, leaders=leaders(listed.layers))
        inside = []
        for layer in listed.layers:
            if layer.name != "head":
                paired.set(layer, coarse(layer, model.module))
            if layer.name.startswith("blocks.1."):
                inside.append((layer, coarse(layer, model.module)))
        result = reconstruct(paired, 1, inside, ReconstructionSettings(iterations=150), seed=seed)
        for layer, _ in inside:
            paired.set(layer, next(item for item in result.layers if item.layer == layer.name))
        calls = paired.block_calls(1)
        targets, outputs = [call.target for call in calls], [paired.run_block(1, call) for call in calls]
        errors[importance is None] = float(
            sum((a - b)[:, 0].square().sum() for a, b in zip(outputs, targets, strict=True))
        )
    assert errors[False] < errors[True]


def test_padding_weighs_nothing():
    target, mask = torch.zeros(2, 3, 4), torch.tensor([[True, True, False], [True, False, False]])
    assert token_weights(target, None, None) is None
    assert token_weights(target, mask, None).tolist() == mask.float().tolist()
    assert token_weights(target, mask, torch.full((2, 3), 2.0)).tolist() == (2.0 * mask).tolist()


def test_a_net_whose_blocks_read_all_tokens_still_reconstructs(seed):
    model = token_net(seed, TokenNet)
    batches = [images(8, seed + index) for index in range(5)]
    listed = find_layers(model, batches[0])
    weights = token_importance(model, listed.layers, listed.blocks, batches, seed=seed)
    paired = PairedForward(model, listed.blocks, batches, importance=weights, leaders=leaders(listed.layers))
    for layer in listed.layers[:3]:
        paired.set(layer, coarse(layer, model.module))
    inside = [(layer, coarse(layer, model.module)) for layer in listed.layers[1:3]]
    result = reconstruct(paired, 0, inside, ReconstructionSettings(iterations=40), seed=seed)
    assert result.loss_after <= result.loss_before


class Downsampling(nn.Module):
    """Two convolutions that read one tensor with different kernels, as a residual network's first block has them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.shortcut = nn.Conv2d(2, 8, 3, stride=2, padding=1), nn.Conv2d(2, 8, 1, stride=2)
        self.narrow, self.head = nn.Conv2d(2, 8, 1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.conv(x)) + self.shortcut(x)
        return self.head(y.mean((2, 3)) + self.narrow(x).mean((2, 3)))


def test_convolutions_that_unfold_one_tensor_differently_share_no_moments(seed):
    torch.manual_seed(seed)
    module, batches = Downsampling(), [images(8, seed), images(8, seed + 1)]
    listed = find_layers(float_model(module), batches[0])
    assert len({layer.input_group for layer in listed.layers}) == 4
    result = mlorq.compress(
        module,
        batches,
        budget="8bit",
        rounding_iterations=5,
        search={"samples": 8, "factor_bits": [4], "sum_ranks": [2]},
    )
    assert result.metrics["nmse"] < 0.1
