"""The float model's passes on fixed samples: each made once, and the same numbers as passes of their own."""

from __future__ import annotations

import pytest
import torch

from mlorq.costs.float_passes import FloatPasses
from mlorq.costs.measured import LayerProbe
from mlorq.models.base import FloatModel
from mlorq.models.layers import find_layers, weight_matrix
from tests.nets import SkipNet, TokenNet, images, token_net


def measured(model: FloatModel, batches: list[torch.Tensor], *, kept: bool) -> tuple[list[float], int]:
    """Costs of every layer with a changed weight, and how many passes through the first block they took."""
    found = find_layers(model, batches[0])
    count: list[None] = []
    first = model.module.get_submodule(found.blocks[0])
    handle = first.register_forward_pre_hook(lambda *_: count.append(None))
    passes = FloatPasses(model, found.blocks, batches) if kept else None
    costs = []
    for layer in found.layers:
        weight = weight_matrix(model.module.get_submodule(layer.name))
        with LayerProbe(model, layer, found.blocks, batches, passes=passes) as probe:
            costs.append(probe.cost(0.9 * weight))
            assert probe.cost(weight) <= 1e-14  # the float weight
    handle.remove()
    return costs, len(count)


@pytest.mark.parametrize("kind", [TokenNet, SkipNet])
def test_layers_share_passes_and_costs_stay_the_same(kind: type, seed: int) -> None:
    model = token_net(seed, kind)
    batches = [images(4, seed * 10 + index) for index in range(3)]
    own, many = measured(model, batches, kept=False)
    shared, few = measured(model, batches, kept=True)
    assert shared == own
    assert all(cost > 0 for cost in own)
    assert few < many


def test_a_block_is_reached_from_the_one_before_or_from_the_start(seed: int) -> None:
    model = token_net(seed, TokenNet)
    batches = [images(4, seed + index) for index in range(2)]
    found = find_layers(model, batches[0])
    passes = FloatPasses(model, found.blocks, batches)
    for block in (0, 1, len(found.blocks) - 1, 0, 1):
        start, carries = passes.entry(block)
        assert start == block
        for batch, carry, wanted in zip(batches, carries, passes.outputs, strict=True):
            assert torch.equal(passes.segments.outputs(batch, start, carry), wanted)


def test_a_model_that_reads_early_blocks_again_is_entered_at_the_start(seed: int) -> None:
    model = token_net(seed, SkipNet)
    batches = [images(4, seed)]
    found = find_layers(model, batches[0])
    passes = FloatPasses(model, found.blocks, batches)
    last = len(found.blocks) - 1
    starts = {passes.entry(last)[0] for _ in range(2)}
    assert len(starts) == 1, "the answer is kept"
    start, carries = passes.entry(last)
    assert torch.allclose(passes.segments.outputs(batches[0], start, carries[0]), passes.outputs[0], atol=1e-6)
