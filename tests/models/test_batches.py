"""Batches in any arrangement: which tensors belong to single samples, and different shapes in one data set."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mlorq
from mlorq.data import from_batches
from mlorq.errors import DataError, ModelError
from mlorq.models import from_module
from mlorq.models.arrange import arranged
from mlorq.models.base import check_weights, join_outputs
from mlorq.models.batches import (
    Listed,
    Shared,
    batch_samples,
    describe_batch,
    fold_batches,
    fresh,
    move_batch,
    split_batches,
    take_samples,
    unmarked,
)

QUICK: dict[str, Any] = {"preset": "quick", "rounding": "nearest", "search": {"sensitivity": "closed_form"}}
Pair = namedtuple("Pair", "left right")


def ones(*shape: int) -> Tensor:
    return torch.ones(*shape)


@pytest.mark.parametrize(
    ("batch", "samples"),
    [
        (ones(4, 2), 4),
        ({"position_ids": ones(1, 6), "input_ids": ones(5, 6)}, 5),
        ((ones(3, 8, 2), ones(8, 8)), 3),
        ((ones(8, 8), ones(3, 8, 2), ones(3)), 3),
        ({"a": {"b": [ones(7, 2)], "c": 3}, "d": torch.tensor(1.0)}, 7),
        (Pair(ones(2, 2), ones(2)), 2),
        ({"x": ones(1, 3), "y": ones(1)}, 1),
        (Listed([ones(3, 5), ones(3, 4)]), 2),
        ((Shared(ones(8, 8)), ones(3, 8)), 3),
    ],
)
def test_samples_are_counted(batch, samples):
    assert batch_samples(batch) == samples
    assert batch_samples(take_samples(batch, slice(0, 1))) == 1
    assert sum(map(batch_samples, fold_batches([batch, batch], 0) + fold_batches([batch, batch], 1))) == 2 * samples
    assert [*map(batch_samples, split_batches([batch], 2))] == [2] * (samples // 2) + [1] * (samples % 2)


def test_a_batch_without_tensors_is_refused():
    with pytest.raises(ModelError, match="must be a tensor, or a tuple, list or mapping that contains one"):
        batch_samples({"a": "text"})


def test_structure_and_marks_are_kept_until_the_model_gets_the_batch():
    batch = {"x": Pair(ones(3, 2), Shared(ones(3, 3))), "n": None}
    moved = move_batch(batch, "cpu", torch.float64)
    assert type(moved["x"]) is Pair
    assert moved["x"].right.tensor.dtype is torch.float64
    assert take_samples(moved, slice(0, 1))["x"].right.tensor.shape == (3, 3)
    for plain in (fresh(moved), unmarked(moved)):
        assert plain["x"].right.shape == (3, 3)
    assert describe_batch(batch) == "mapping of x: tuple of Tensor (3, 2), Tensor (3, 3), n: NoneType"


class Masked(nn.Module):
    """Attention with a mask over tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.head = nn.Linear(12, 36), nn.Linear(12, 3)

    def forward(self, mask: Tensor, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.head(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).mean(1))


def tokens(seed: int = 1, samples: int = 6) -> Tensor:
    return torch.randn(samples, 6, 12, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("additive", [False, True])
def test_a_mask_over_tokens_is_not_cut_with_the_samples(additive):
    mask = torch.ones(6, 6).tril().bool()
    if additive:
        mask = torch.zeros(6, 6).masked_fill(~mask, -torch.inf)
    module = Masked().eval()
    batches = [(mask, tokens()), (mask.clone(), tokens(2))]  # as many samples as tokens
    (first, _) = arranged(from_module(module), batches)
    assert isinstance(first[0], Shared)
    assert isinstance(first[1], Tensor)
    wanted = module(mask, tokens()).detach()
    result = mlorq.compress(module, batches, budget="40%", preset="best", rounding="closed_form", device="cpu")
    assert (result.model(mask, tokens()) - wanted).square().sum() < 0.05 * wanted.square().sum()


class Padded(Masked):
    """The mask of each sample's own tokens."""

    def forward(self, mask: Tensor, x: Tensor) -> Tensor:
        return self.head((self.qkv(x)[..., :12] * mask.unsqueeze(-1)).mean(1))


def test_a_mask_of_each_sample_is_cut_even_if_it_is_square():
    batches = [(torch.ones(6, 6).tril(), tokens())]
    (found,) = arranged(from_module(Padded()), batches)
    assert all(isinstance(part, Tensor) for part in found)


class PerImage(nn.Module):
    """Takes a list of images of various sizes, as detectors do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, images: list[Tensor]) -> Tensor:
        return torch.stack([self.head(self.conv(image[None]).mean((2, 3)))[0] for image in images])


@pytest.mark.parametrize("sizes", [(8, 10), (8, 8), (9, 8, 10)])
def test_a_list_of_images_is_a_list_of_samples(sizes):
    def images(seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(3, size, 8, generator=generator) for size in sizes]

    module = PerImage().eval()
    found = arranged(from_module(module, lambda m, batch: m(batch)), [images(1), images(2)])
    assert [batch_samples(batch) for batch in found] == [1] * 2 * len(sizes)
    wanted = module(images(1)).detach()
    batches = [images(1), images(2)]
    result = mlorq.compress(module, batches, forward=lambda m, batch: m(batch), budget="40%", device="cpu", **QUICK)
    assert len(result.allocation) == 2
    assert (result.model(images(1)) - wanted).square().sum() < 1e-2 * wanted.square().sum()


def test_labels_of_a_loader_are_refused_with_advice():
    from torch.utils.data import DataLoader, TensorDataset

    module = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    loader = DataLoader(TensorDataset(torch.randn(8, 12), torch.randint(0, 3, (8,))), batch_size=4)
    words = r"first calibration batch \(list of Tensor \(4, 12\), Tensor \(4,\)\): TypeError: .*leave labels out"
    with pytest.raises(ModelError, match=words):
        mlorq.compress(module, loader, device="cpu", **QUICK)


def test_a_model_that_fails_on_its_batch_is_one_line():
    module = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 3))
    with pytest.raises(ModelError, match=r"first calibration batch \(Tensor \(4, 11\)\): RuntimeError: mat1 and mat2"):
        mlorq.compress(module, [torch.randn(4, 11)], device="cpu", **QUICK)


def test_keys_that_a_model_does_not_take_are_named_with_advice():
    module = nn.Sequential(nn.Linear(12, 3))
    words = "unexpected keyword argument 'x'; the entries of a mapping are passed as keyword arguments"
    with pytest.raises(ModelError, match=words):
        mlorq.compress(module, [{"x": torch.randn(4, 12)}], device="cpu", **QUICK)


def test_rows_that_are_no_samples_are_refused():
    class Across(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).T

    with pytest.raises(ModelError, match="returns 3 rows for 4 samples: pass forward="):
        mlorq.compress(nn.Sequential(nn.Linear(12, 8), Across(8, 3)), [torch.randn(4, 12)], device="cpu", **QUICK)


def test_empty_batches_are_left_out():
    data = from_batches([torch.randn(3, 2), torch.zeros(0, 2), torch.randn(1, 2)])
    assert (len(data.batches), data.samples) == (2, 4)
    with pytest.raises(DataError, match="0 samples"):
        from_batches([torch.zeros(0, 2)])


@pytest.mark.parametrize("value", [torch.inf, torch.nan, -torch.inf])
def test_only_masks_may_be_infinite(value):
    bad = torch.randn(4, 4)
    bad[1, 1] = value
    with pytest.raises(DataError, match="calibration batch 0: entry '1' contains NaN or infinite values"):
        from_batches([(torch.randn(4, 2), bad)])
    from_batches([(torch.randn(4, 2), torch.zeros(4, 4).masked_fill(torch.eye(4).bool(), -torch.inf))])


def test_outputs_of_various_lengths_are_compared():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3))
    assert join_outputs([ones(2, 3), ones(1, 5)]).sum(1).tolist() == [3, 3, 5]
    result = mlorq.compress(module, [torch.randn(4, 5, 12), torch.randn(3, 7, 12)], budget="40%", device="cpu", **QUICK)
    assert 0 < result.metrics["nmse"] < 1e-2


def test_inputs_are_cast_to_the_dtype_of_most_weights():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.layer = nn.Parameter(torch.ones(1, dtype=torch.bfloat16)), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * self.scale.float()

    model = from_module(Scaled())
    assert model.dtype is torch.float32
    result = mlorq.compress(Scaled(), [torch.randn(4, 12)], budget="40%", device="cpu", **QUICK)
    assert len(result.allocation) == 1


class OwnState(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"version": 1}

    def set_extra_state(self, state: Any) -> None:
        pass


def test_models_that_cannot_be_read_say_what_to_do():
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 3))
    lazy = nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 3))
    stateful = nn.Sequential(OwnState(12, 8), nn.Linear(8, 3))
    scripted = nn.Sequential(torch.jit.trace(nn.Linear(12, 8), torch.randn(1, 12)), nn.Linear(8, 3))
    for module, words in (
        (scripted, r"module '0' is compiled by torch\.jit: pass the module that it was made from"),
        (empty, "'0.weight' is on the meta device and has no values: load the model's weights"),
        (lazy, "'0.weight' of a lazy module has no size yet: run the model once"),
        (stateful, r"module '0' \(OwnState\) keeps state outside its parameters and buffers"),
    ):
        with pytest.raises(ModelError, match=words):
            mlorq.compress(module, [torch.randn(4, 12)], device="cpu", **QUICK)


def test_buffers_may_hold_masks_and_nothing_else_may_be_infinite():
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    module.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))
    check_weights(module)
    module.mask[0, 0] = torch.nan
    with pytest.raises(ModelError, match="weight 'mask' contains NaN"):
        check_weights(module)
    module.mask[0, 0] = 0
    module[1].running_var[0] = torch.inf
    with pytest.raises(ModelError, match=r"weight '1\.running_var' contains NaN or infinite"):
        check_weights(module)
