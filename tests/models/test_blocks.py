"""Finding chains of blocks by watching a forward pass, and layers that see samples folded into windows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mlorq.calibration.label_free_hessian import label_free_hessian
from mlorq.models.base import FloatModel
from mlorq.models.blocks import detect_blocks
from mlorq.models.layers import find_layers
from mlorq.models.unfolding import input_tokens
from tests import zoo
from tests.nets import Block, TokenNet, float_model, images


def found(module: nn.Module, x: Tensor) -> list[str]:
    module.eval()
    return detect_blocks(module, lambda: module(x))


def tokens(width: int = 8) -> Tensor:
    return torch.randn(2, 3, width, generator=torch.Generator().manual_seed(0))


class Chain(nn.Module):
    """Blocks in a list, called by ``forward`` in whatever way a test wants."""

    def __init__(self, call, blocks: int = 4, width: int = 8) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Block(width) for _ in range(blocks))
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.parts, x)


def in_order(parts, x):
    for part in parts:
        x = part(x)
    return x


def backwards(parts, x):
    for part in reversed(parts):
        x = part(x)
    return x


def broken_in_the_middle(parts, x):
    for index, part in enumerate(parts):
        x = part(x + 1 if index == 1 else x)
    return x


def parallel(parts, x):
    return sum(part(x) for part in parts)


def second_twice(parts, x):
    return parts[3](parts[2](parts[1](parts[1](parts[0](x)))))


def first_unused(parts, x):
    for part in list(parts)[1:]:
        x = part(x)
    return x


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (in_order, [0, 1, 2, 3]),
        (backwards, [3, 2, 1, 0]),
        (broken_in_the_middle, [1, 2, 3]),
        (parallel, []),
        (second_twice, [2, 3]),
        (first_unused, [1, 2, 3]),
    ],
)
def test_chains_are_what_reads_the_output_before_it(call, expected):
    assert found(Chain(call), tokens()) == [f"parts.{index}" for index in expected]


def test_blocks_called_by_keyword_and_returning_tuples():
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block(8)

        def forward(self, *, hidden, mask=None):
            return self.block(hidden), "attention weights"

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.ModuleList(Wrapped() for _ in range(3))

        def forward(self, x):
            for layer in self.layer:
                x = layer(hidden=x, mask=None)[0]
            return x

    assert found(Encoder(), tokens()) == ["layer.0", "layer.1", "layer.2"]


def test_of_several_chains_the_one_with_most_parameters_wins():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.small = nn.Sequential(*(nn.Linear(8, 8) for _ in range(5)))
            self.large = nn.ModuleDict({"a": Block(8), "b": Block(8), "c": Block(8)})

        def forward(self, x):
            return in_order(self.large.values(), self.small(x))

    assert found(Two(), tokens()) == ["large.a", "large.b", "large.c"]


def test_no_chain():
    assert found(nn.Linear(8, 8), tokens()) == []
    assert found(Chain(in_order, blocks=1), tokens()) == []
    assert found(nn.Sequential(Block(8), Block(8)), tokens()) == ["0", "1"]


def test_watching_leaves_no_hooks_even_where_the_pass_fails():
    module = TokenNet()
    assert found(module, images(2, 0)) == [f"blocks.{index}" for index in range(3)]

    def fails() -> None:
        module(images(2, 0))
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        detect_blocks(module, fails)
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in module.modules())


# -- Swin: windows folded into the leading axis ---------------------------------------------------------------


@pytest.fixture(scope="module")
def swin() -> FloatModel:
    return float_model(zoo.timm_model(zoo.SWIN, zoo.SWIN_ARGUMENTS, seed=7))


def test_swin_stages_are_its_chain(swin):
    assert found(swin.module, zoo.pixels(2, 0)) == ["layers.0", "layers.1"]
    listed = find_layers(swin, zoo.pixels(2, 0))
    assert listed.blocks == ["layers.0", "layers.1"]
    assert listed.skipped == []
    linear = [name for name, child in swin.module.named_modules() if isinstance(child, (nn.Linear, nn.Conv2d))]
    assert sorted(layer.name for layer in listed.layers) == sorted(linear)
    assert {layer.block for layer in listed.layers if layer.name.startswith("layers.1.")} == {1}
    # 8 × 8 tokens of 16 features; multiply-accumulates are a sample's, whatever the batch.
    assert listed["layers.0.blocks.0.attn.qkv"].macs == 64 * 16 * 48
    assert [layer.macs for layer in find_layers(swin, zoo.pixels(5, 0)).layers] == [q.macs for q in listed.layers]


def test_swin_windows_are_regrouped_to_their_samples(swin):
    x = zoo.pixels(3, 1)
    seen: dict[int, Tensor] = {}
    module = swin.module.get_submodule("layers.0.blocks.1.attn.qkv")
    for count, batch in ((3, x), (1, x[1:2])):
        handle = module.register_forward_hook(lambda _, args, __, count=count: seen.update({count: args[0]}))
        with torch.no_grad():
            swin.module(batch)
        handle.remove()
    assert seen[3].shape[0] == 3 * 4, "four windows a sample"
    grouped = input_tokens(module, seen[3], 3)
    assert grouped.shape == (3, 64, 16)
    torch.testing.assert_close(grouped[1], input_tokens(module, seen[1], 1)[0], atol=1e-5, rtol=1e-5)


def test_swin_hessian_is_the_mean_of_squared_gradients_a_sample(swin):
    x = zoo.pixels(3, 2)
    layers = find_layers(swin, x).layers
    found = label_free_hessian(swin, layers, [x], mode="exact")
    weights = {layer.name: swin.module.get_submodule(layer.name).weight for layer in layers}
    expected = {name: torch.zeros(weight.shape[0], weight[0].numel()) for name, weight in weights.items()}
    swin.module.requires_grad_(True)
    try:
        for sample in x:
            outputs = swin.module(sample[None])[0]
            for output in outputs:
                gradients = torch.autograd.grad(output, list(weights.values()), retain_graph=True)
                for name, gradient in zip(weights, gradients, strict=True):
                    expected[name] += gradient.reshape(expected[name].shape).square() / len(x)
    finally:
        swin.module.requires_grad_(False)
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= 1e-3 * value.max(), name
