"""Models run on copies of their inputs, without fused layers and without activation checkpointing."""

from __future__ import annotations

from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.utils.checkpoint as checkpointing
import transformers
from torch import Tensor, nn

import mlorq
from mlorq.calibration.collect import capture
from mlorq.calibration.label_free_hessian import label_free_hessian
from mlorq.errors import ModelError
from mlorq.models import from_module
from mlorq.models.batches import fresh
from mlorq.models.layers import find_layers
from mlorq.models.partial_forward import Segments
from mlorq.models.passes import plain_passes

QUICK: dict[str, Any] = {"preset": "quick", "rounding": "nearest", "search": {"sensitivity": "closed_form"}}


def inputs(seed: int = 1, rows: int = 6) -> Tensor:
    return torch.randn(rows, 12, generator=torch.Generator().manual_seed(seed))


class Writing(nn.Module):
    """Normalises its input in place, as preprocessing inside a model does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x.sub_(1).mul_(2))))


def test_batches_of_the_caller_are_not_written_to():
    module, given = Writing().eval(), [inputs(), inputs(2)]
    wanted = module(inputs()).detach()
    result = mlorq.compress(module, given, budget="40%", device="cpu", **QUICK)
    assert torch.equal(given[0], inputs())
    assert torch.equal(given[1], inputs(2))
    error = (result.model(inputs()) - wanted).square().sum() / wanted.square().sum()
    assert error < 1e-2
    assert result.metrics["nmse"] < 1e-2


def test_copies_of_inputs_keep_their_structure():
    pair = namedtuple("pair", "left right")
    value = {"a": [torch.ones(2), "text"], "b": pair(torch.zeros(1), 3), "c": (None, torch.ones(1))}
    found = fresh(value)
    assert type(found["b"]) is pair
    assert found["a"][0] is not value["a"][0]
    assert torch.equal(found["a"][0], torch.ones(2))
    assert (found["a"][1], found["b"].right, found["c"][0]) == ("text", 3, None)
    with torch.inference_mode():
        made = torch.ones(2)
    assert not fresh(made).is_inference()


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.reentrant = reentrant
        self.a = nn.Sequential(nn.Linear(12, 12), nn.GELU(), nn.Linear(12, 12))
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpointing.checkpoint(self.a, x, use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_no_statistic(reentrant):
    module = Checkpointed(reentrant)
    plain = nn.Sequential(module.a, module.head)
    found = []
    for one, names in ((module, ("a.0", "a.2", "head")), (plain, ("0.0", "0.2", "1"))):
        model = from_module(one)
        layers = find_layers(model, inputs()).layers
        assert [layer.name for layer in layers] == list(names)
        hessian = label_free_hessian(model, layers, [inputs()], mode="exact")
        found.append([hessian[name] for name in names])
    for own, wanted in zip(*found, strict=True):
        assert torch.allclose(own, wanted)
        assert wanted.abs().sum() > 0


def test_settings_of_the_process_are_restored_after_the_last_pass():
    before = vars(checkpointing.CheckpointFunction).get("apply"), checkpointing._checkpoint_without_reentrant_generator
    torch.backends.mha.set_fastpath_enabled(True)

    def run(_: int) -> bool:
        with plain_passes(), plain_passes():
            return bool(torch.backends.mha.get_fastpath_enabled())

    with ThreadPoolExecutor(4) as pool:
        assert not any(pool.map(run, range(50)))
    assert torch.backends.mha.get_fastpath_enabled()
    assert before == (
        vars(checkpointing.CheckpointFunction).get("apply"),
        checkpointing._checkpoint_without_reentrant_generator,
    )


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(12, 2, 16, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(12, 3)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.head(self.encoder(x, src_key_padding_mask=padding)[:, 0])


@pytest.mark.filterwarnings("ignore:.*nested tensors.*:UserWarning")
def test_an_encoder_with_a_padding_mask_is_compressed():
    padding = torch.zeros(4, 5, dtype=torch.bool)
    padding[:, 3:] = True
    x = torch.randn(4, 5, 12, generator=torch.Generator().manual_seed(1))
    module = Encoder().eval()
    with torch.no_grad():
        wanted = module(x, padding)  # by the fused layers
    result = mlorq.compress(module, [(x, padding), (x + 1, padding)], budget="40%", device="cpu", **QUICK)
    names = result.allocation["layer"].to_pylist()
    assert {"encoder.layers.0.linear1", "encoder.layers.1.linear2", "head"} <= set(names)
    with torch.no_grad():
        error = (result.model(x, padding) - wanted).square().sum() / wanted.square().sum()
    assert error < 1e-2


class InPlaceResidual(nn.Module):
    """Adds into the tensor that its first layer has read."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 3)
        self.in_place = True

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        read = torch.sin(self.second(x))
        x = x.add_(read) if self.in_place else x + read
        return self.head(x)


def test_inputs_that_are_overwritten_later_count_as_they_were_read():
    module = InPlaceResidual()
    model = from_module(module)
    layers = find_layers(model, inputs()).layers
    found = label_free_hessian(model, layers, [inputs()], mode="exact")
    samples = capture(model, layers, [inputs()], rows=100).samples
    module.in_place = False
    wanted = label_free_hessian(model, layers, [inputs()], mode="exact")
    for name, value in wanted.items():
        assert torch.allclose(found[name], value, rtol=1e-4), name
    assert torch.equal(samples["second"].x, capture(model, layers, [inputs()], rows=100).samples["second"].x)


def test_a_model_that_returns_one_number_is_refused_in_one_line():
    class Mean(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).mean()

    model = from_module(nn.Sequential(nn.Linear(12, 4), Mean(4, 4)))
    with pytest.raises(ModelError, match="returns a single number, not one output or more per sample: pass forward="):
        find_layers(model, inputs())


def test_a_forward_can_return_what_a_model_can():
    module = nn.Sequential(nn.Linear(12, 4))
    wanted = module(inputs())
    for wrap in (lambda y: {"logits": y}, lambda y: (y, None), lambda y: y):
        model = from_module(module, lambda m, batch, wrap=wrap: wrap(m(batch)))
        assert torch.equal(model.outputs(module, inputs()), wanted)
    model = from_module(module, lambda m, batch: {"values": m(batch).int()})
    with pytest.raises(ModelError, match="the model returns dict without a tensor of floating-point numbers"):
        model.outputs(module, inputs())


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.layer, self.head = nn.Conv2d(1, 4, 3), nn.Linear(16, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(input=x).flatten(1)
        return self.head(input=torch.relu(self.layer(input=x)))


@pytest.mark.parametrize("more", [{}, {"activations": {"bits": 8}}, {"rounding": "lra", "rounding_iterations": 5}])
def test_layers_can_be_called_by_keyword(more):
    images = torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    module = ByKeyword().eval()
    wanted = module(images).detach()
    result = mlorq.compress(module, [images, images + 1], budget="40%", device="cpu", **{**QUICK, **more})
    assert len(result.allocation) == 3
    assert (result.model(images) - wanted).square().sum() < 0.02 * wanted.square().sum()


def decoder() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    return transformers.LlamaForCausalLM(config).eval()


def test_a_block_of_a_decoder_runs_again_as_before() -> None:
    """Its cache of keys and values would grow with each run."""
    module = decoder()
    model = from_module(module, lambda net, batch: net(**batch).logits)
    texts = {"input_ids": torch.randint(40, (3, 7), generator=torch.Generator().manual_seed(1))}
    segments = Segments(model, module, ["model.layers.0", "model.layers.1"])
    arguments, named = segments.block_arguments(texts, 0, None, 1)
    block = segments.blocks[1]
    with torch.no_grad():
        first, again = (block(*arguments, **named) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(first, segments.advance(texts, 0, None, 2))
    assert module.config.use_cache, "the setting is the caller's"


def test_blocks_of_a_decoder_are_trained() -> None:
    texts = torch.randint(40, (4, 8, 7), generator=torch.Generator().manual_seed(1))
    result = mlorq.compress(
        decoder(),
        [{"input_ids": part} for part in texts],
        budget="6bit",
        preset="fast",
        search={"forms": ["Q"], "bits": [4, 6, 8]},
        rounding="block",
        rounding_iterations=4,
        device="cpu",
    )
    assert result.metrics["nmse"] < 0.02
    assert result.model.config.use_cache
