"""Partial forwards against full ones."""

from __future__ import annotations

import pytest
import torch

from mlorq.costs.measured import LayerProbe
from mlorq.models.layers import find_layers
from mlorq.models.partial_forward import Segments, enters_cleanly
from tests.nets import SkipNet, TokenNet, float_model, images, token_net


def test_suffix_gives_the_full_forward_bit_for_bit(seed, device):
    model = token_net(seed)
    model.module.to(device)
    segments = Segments(model, model.module, model.blocks)
    batch = images(5, seed).to(device)
    full = segments.outputs(batch)
    torch.testing.assert_close(full, model.module(batch))
    carry = None
    for start in range(1, 4):
        carry = segments.advance(batch, start - 1, carry, start)
        assert torch.equal(segments.outputs(batch, start, carry), full)
        assert torch.equal(segments.advance(batch, 0, None, start), carry)
    assert torch.equal(model.module(batch), full)  # nothing is left behind in the module


def test_skipped_blocks_do_not_run(seed):
    model = token_net(seed)
    batch = images(2, seed)
    segments = Segments(model, model.module, model.blocks)
    carry = segments.advance(batch, 0, None, 2)
    calls: list[str] = []
    for index in range(3):
        model.module.blocks[index].up.register_forward_hook(lambda *_, index=index: calls.append(str(index)))
    segments.outputs(batch, 2, carry)
    assert calls == ["2"]


def test_module_is_itself_again_after_an_error(seed):
    model = token_net(seed)
    batch = images(2, seed)
    segments = Segments(model, model.module, model.blocks)
    with pytest.raises(AttributeError):
        segments.outputs(batch, 3, "no tensor")
    assert all("forward" not in block.__dict__ for block in segments.blocks)


def test_models_that_are_no_chain_are_noticed(seed):
    for kind, clean in ((TokenNet, True), (SkipNet, False)):
        model = token_net(seed, kind)
        segments = Segments(model, model.module, model.blocks)
        batch = images(2, seed)
        carry = segments.advance(batch, 0, None, 2)
        assert enters_cleanly(segments, batch, 2, carry, segments.outputs(batch)) is clean


@pytest.mark.parametrize("kind", [TokenNet, SkipNet])
def test_probe_measures_the_full_models_nmse(kind, seed):
    model = token_net(seed, kind)
    batches = [images(3, seed), images(2, seed + 1)]
    found = find_layers(model, batches[0])
    for layer in found.layers:
        module = model.module.get_submodule(layer.name)
        before = module.weight.clone()
        changed = before + 0.1 * torch.randn(before.shape, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            reference = torch.cat([model.module(batch) for batch in batches])
            module.weight.copy_(changed)
            compressed = torch.cat([model.module(batch) for batch in batches])
            module.weight.copy_(before)
        expected = float((compressed - reference).double().square().sum() / reference.double().square().sum())
        with LayerProbe(model, layer, found.blocks, batches) as probe:
            assert probe.cost(changed.reshape(layer.out_features, -1)) == pytest.approx(expected, rel=1e-4)
        assert torch.equal(module.weight, before)


def test_layers_are_listed_in_execution_order_with_their_block(seed):
    model = token_net(seed)
    found = find_layers(model, images(2, seed))
    assert [(layer.name, layer.block) for layer in found.layers] == [
        ("patch", 0),
        *((f"blocks.{i}.{n}", i) for i in range(3) for n in ("up", "down")),
        ("head", 3),
    ]
    assert found.skipped == [("unused", "never reached by a forward pass", 4 * 8 * 8)]
    assert found["patch"].in_features == 2 * 2 * 2
    assert found["patch"].macs == 9 * 8 * 8
    assert found["head"].macs == 8 * 4


def test_blocks_are_found_where_none_are_declared(seed):
    torch.manual_seed(seed)
    found = find_layers(float_model(TokenNet()), images(2, seed))
    assert found.blocks == ["blocks.0", "blocks.1", "blocks.2"]


def test_patterns_choose_layers(seed):
    model = token_net(seed)
    batch = images(2, seed)
    names = [layer.name for layer in find_layers(model, batch, exclude=["head", "patch"]).layers]
    assert "head" not in names
    assert "patch" not in names
    found = find_layers(model, batch, include=["blocks.1.*"])
    assert [layer.name for layer in found.layers] == ["blocks.1.up", "blocks.1.down"]
    assert ("head", "excluded by the configuration") in [one[:2] for one in found.skipped]


def test_inputs_changed_in_place_are_not_taken_for_shared_ones(seed):
    class InPlace(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (torch.nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x * 1
            y = self.a(x) + self.b(x)
            x.add_(y)
            return self.c(x)

    groups = [layer.input_group for layer in find_layers(float_model(InPlace()), torch.randn(2, 4)).layers]
    assert groups[0] == groups[1] != groups[2]


def test_a_shared_weight_is_named_by_the_module_that_runs(seed):
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.idle, self.busy = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
            self.idle.weight = self.busy.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.busy(x)

    (layer,) = find_layers(float_model(Tied()), torch.randn(2, 4)).layers
    assert (layer.name, layer.aliases) == ("busy", ("idle",))
