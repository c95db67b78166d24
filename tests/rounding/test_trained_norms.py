"""Training of normalisation layers with the compressed layers, and of matrices whose codes stay fixed."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from mlorq.codecs.affine import QuantizedMatrix
from mlorq.codecs.base import Codec, StoredMatrix
from mlorq.forms import FORMS, Candidate
from mlorq.forms.stored_layer import CompressedLayer
from mlorq.models.base import FloatModel
from mlorq.models.layers import Layer, find_layers, weight_matrix
from mlorq.models.norms import norm_parameters
from mlorq.rounding.block import ReconstructionSettings, TuningSettings
from mlorq.rounding.brecq import SoftSettings
from mlorq.rounding.finetune import tune
from mlorq.rounding.paired_forward import PairedForward
from mlorq.rounding.reconstruction import reconstruct, reconstruct_softly
from mlorq.rounding.trainable import Rates, TrainableLayer
from tests.layers import hessian_fit, stored
from tests.nets import float_model, images, token_net

Pairs = list[tuple[Layer, CompressedLayer]]
# All but the norms fixed, or nearly so: codes must have a step size.
NORMS_ONLY = {"scale_rate": 0.0, "bias_rate": 0.0}


def in_dtype(model: FloatModel, dtype: torch.dtype) -> FloatModel:
    return replace(model, module=model.module.to(dtype), dtype=dtype)


def rounded(model: FloatModel, batch: Tensor, bits: int) -> tuple[list[str], Pairs]:
    listed = find_layers(model, batch.to(model.dtype))
    pairs = []
    for layer in listed.layers:
        weight = weight_matrix(model.module.get_submodule(layer.name)).float()
        pairs.append((layer, stored(hessian_fit(weight), Candidate("Q", bits=bits), layer.name)))
    return listed.blocks, pairs


def paired_with(model: FloatModel, batches: list[Tensor], block: int, bits: int) -> tuple[PairedForward, Pairs]:
    blocks, pairs = rounded(model, batches[0], bits)
    paired = PairedForward(model, blocks, batches)
    for layer, compressed in pairs:
        paired.set(layer, compressed)
    return paired, [(layer, one) for layer, one in pairs if layer.name.startswith(f"blocks.{block}.")]


def norm_tensors(module: nn.Module) -> dict[str, Tensor]:
    return {parameter.name: parameter.tensor.detach().clone() for parameter in norm_parameters(module)}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_tuning_starts_from_the_given_norms_and_brings_them_back(seed: int) -> None:
    """Norms moved away from those of the float model: tuning them alone removes nearly all of the error."""
    model = token_net(seed)
    batches = [images(8, seed * 100 + index) for index in range(15)]
    blocks, pairs = rounded(model, batches[0], 8)
    wanted = norm_tensors(model.module)
    generator = torch.Generator().manual_seed(seed)
    moved = {name: value + 0.2 * torch.randn(value.shape, generator=generator) for name, value in wanted.items()}
    settings = TuningSettings(tuning=150, tuning_rate=1e-9, norm_rate=0.01, **NORMS_ONLY)
    result = tune(model, blocks, pairs, batches, settings, seed=seed, rest=moved)
    assert result.loss_after < 0.1 * result.loss_before
    assert result.rest.keys() == wanted.keys()

    def distance(found: dict[str, Tensor]) -> float:
        return sum(float((value - wanted[name]).square().sum()) for name, value in found.items())

    assert distance(result.rest) < 0.5 * distance(moved)
    assert equal(norm_tensors(model.module), wanted)
    fixed = tune(model, blocks, pairs, batches, settings.model_copy(update={"norm_rate": 0.0}), seed=seed, rest=moved)
    assert fixed.loss_before == result.loss_before
    assert equal(fixed.rest, moved)  # what earlier steps trained stays in the result
    assert tune(model, blocks, pairs, batches, TuningSettings(tuning=1, norm_rate=0.0)).rest == {}


def test_a_block_trains_its_own_norms_and_changes_neither_model(seed: int) -> None:
    model = token_net(seed)
    batches = [images(8, seed * 100 + index) for index in range(10)]
    paired, inside = paired_with(model, batches, 1, 2)
    kept, before = norm_tensors(model.module), dict(paired.compressed.named_parameters())
    values = {name: value.detach().clone() for name, value in before.items()}
    settings = ReconstructionSettings(iterations=80, code_rate=1e-9, norm_rate=0.01, **NORMS_ONLY)
    result = reconstruct(paired, 1, inside, settings, seed=seed)
    assert result.loss_after < result.loss_before
    assert result.rest.keys() == {"blocks.1.norm.weight", "blocks.1.norm.bias"}
    assert not any(torch.equal(value, kept[name]) for name, value in result.rest.items())
    after = dict(paired.compressed.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is value and torch.equal(value, values[name]) for name, value in before.items())
    paired.set_rest(result.rest)
    assert equal(norm_tensors(paired.compressed), kept | result.rest)
    assert equal(norm_tensors(model.module), kept)
    # With these norms, and these codes, the block has the loss that training ended with.
    for (layer, _), compressed in zip(inside, result.layers, strict=True):
        paired.set(layer, compressed)
    again = reconstruct(paired, 1, [(layer, one) for (layer, _), one in zip(inside, result.layers, strict=True)],
                        ReconstructionSettings(iterations=1))  # fmt: skip
    assert again.loss_before == pytest.approx(result.loss_after, rel=1e-5)
    fixed = reconstruct(paired, 1, inside, settings.model_copy(update={"norm_rate": 0.0}), seed=seed)
    assert fixed.rest == {}


def test_the_published_methods_train_no_norms(seed: int) -> None:
    model = token_net(seed)
    batches = [images(8, index) for index in range(5)]
    paired, inside = paired_with(model, batches, 0, 3)
    parts = {}
    for layer, _ in inside:
        fit = hessian_fit(weight_matrix(model.module.get_submodule(layer.name)))
        found = FORMS["Q"].fit(fit, Candidate("Q", bits=3))
        parts[layer.name] = {name: (part.values, part.quantizer) for name, part in found.items()}
    result = reconstruct_softly(paired, 0, inside, SoftSettings(iterations=6), parts)
    assert result.rest == {}
    assert result.iterations == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_does_not_lower_the_loss_leaves_codes_and_norms(dtype: torch.dtype, seed: int) -> None:
    model = in_dtype(token_net(seed), dtype)
    batches = [images(8, seed * 100 + index) for index in range(5)]
    blocks, pairs = rounded(model, batches[0], 8)
    given = norm_tensors(model.module)
    tuned = tune(model, blocks, pairs, batches, TuningSettings(tuning=8, tuning_rate=1e-9, norm_rate=100.0))
    paired, inside = paired_with(model, batches, 0, 8)
    block = reconstruct(paired, 0, inside, ReconstructionSettings(iterations=8, code_rate=100.0, norm_rate=100.0))
    assert tuned.loss_after == tuned.loss_before
    assert block.loss_after == block.loss_before
    assert tuned.layers == [layer for _, layer in pairs]
    assert block.layers == [layer for _, layer in inside]
    assert equal(tuned.rest, given)
    assert equal(block.rest, {name: value for name, value in given.items() if name.startswith("blocks.0.")})


def test_norms_of_lower_precision_keep_their_dtype(seed: int) -> None:
    model = in_dtype(token_net(seed), torch.bfloat16)
    batches = [images(8, seed * 100 + index) for index in range(10)]
    blocks, pairs = rounded(model, batches[0], 2)
    result = tune(model, blocks, pairs, batches, TuningSettings(tuning=80, norm_rate=0.01), seed=seed)
    assert result.loss_after < result.loss_before
    given = norm_tensors(model.module)
    assert {value.dtype for value in result.rest.values()} == {torch.bfloat16}
    assert any(not torch.equal(value, given[name]) for name, value in result.rest.items())


def test_shared_norms_are_trained_as_one_and_by_no_block(seed: int) -> None:
    model = token_net(seed)
    blocks = model.module.blocks
    blocks[1].norm.weight = blocks[0].norm.weight
    blocks[2].norm = blocks[1].norm
    batches = [images(8, seed * 100 + index) for index in range(10)]
    names, pairs = rounded(model, batches[0], 2)
    result = tune(model, names, pairs, batches, TuningSettings(tuning=60, norm_rate=0.01), seed=seed)
    assert result.loss_after < result.loss_before
    assert result.rest.keys() == {"blocks.0.norm.weight", "blocks.0.norm.bias", "blocks.1.norm.bias"}
    assert blocks[1].norm.weight is blocks[0].norm.weight
    paired, inside = paired_with(model, batches, 0, 2)
    assert reconstruct(paired, 0, inside, ReconstructionSettings(iterations=4)).rest.keys() == {"blocks.0.norm.bias"}


class BatchNormNet(nn.Module):
    """A convolution with a batch norm whose statistics are fixed, and a norm without parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.plain = nn.LayerNorm(6, elementwise_affine=False)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.plain(torch.relu(self.norm(self.conv(x))).mean((2, 3))))


def test_batch_norms_are_trained_and_their_statistics_stay(seed: int) -> None:
    torch.manual_seed(seed)
    module = BatchNormNet()
    for index in range(5):
        module(images(16, index))
    model = float_model(module.eval())
    batches = [images(8, seed * 100 + index) for index in range(10)]
    statistics = {name: value.clone() for name, value in module.named_buffers()}
    blocks, pairs = rounded(model, batches[0], 2)
    settings = TuningSettings(tuning=80, tuning_rate=1e-9, norm_rate=0.01, **NORMS_ONLY)
    result = tune(model, blocks, pairs, batches, settings, seed=seed)
    assert result.loss_after < result.loss_before
    assert result.rest.keys() == {"norm.weight", "norm.bias"}
    assert all(torch.equal(value, statistics[name]) for name, value in module.named_buffers())


# -- matrices that supply less than affine codes ----------------------------------------------------------------------


@dataclass(frozen=True)
class DenseMatrix(StoredMatrix):
    """Any values, with nothing to train."""

    dense: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return (self.dense.shape[0], self.dense.shape[1])

    @property
    def codec(self) -> Codec:
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        return {"dense": self.dense}

    def dequantize(self) -> Tensor:
        return self.dense

    def to(self, device: torch.device | str) -> DenseMatrix:
        return replace(self, dense=self.dense.to(device))


@dataclass(frozen=True)
class ScaledMatrix(DenseMatrix):
    """Fixed codes with a trainable scale per row."""

    def trainable(self, device: torch.device | str) -> GrowingRows:
        return GrowingRows(self.to(device))


class GrowingRows:
    latent = None

    def __init__(self, matrix: ScaledMatrix) -> None:
        self.matrix = matrix
        self.growth = nn.Parameter(torch.zeros(matrix.shape[0], 1))

    def values(self) -> Tensor:
        return self.matrix.dense * self.growth.exp()

    def result(self) -> ScaledMatrix:
        return replace(self.matrix, dense=self.values().detach())


def with_matrices(pairs: Pairs, kind: type[DenseMatrix], factor: float = 1.0) -> Pairs:
    return [(layer, replace(one, matrices={"weight": kind(factor * one.dense())})) for layer, one in pairs]


def test_matrices_with_scales_alone_are_trained(seed: int) -> None:
    model = token_net(seed)
    batches = [images(8, seed * 100 + index) for index in range(10)]
    blocks, pairs = rounded(model, batches[0], 8)
    shrunk = with_matrices(pairs, ScaledMatrix, 0.9)
    root = deepcopy(model.module)
    groups = Rates(1.0, 2.0, 3.0).groups([TrainableLayer(root, layer, one) for layer, one in shrunk])
    assert [group["lr"] for group in groups] == [2.0, 3.0]
    assert len(groups[0]["params"]) == len(shrunk)
    settings = TuningSettings(tuning=100, scale_rate=0.01, bias_rate=0.0, norm_rate=0.0)
    result = tune(model, blocks, shrunk, batches, settings, seed=seed)
    assert result.loss_after < 0.2 * result.loss_before
    assert all(isinstance(one.matrices["weight"], ScaledMatrix) for one in result.layers)


def test_without_anything_to_train_the_layers_are_returned(seed: int) -> None:
    torch.manual_seed(seed)
    model = float_model(nn.Sequential(nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 3, bias=False)))
    batches = [torch.randn(8, 6) for _ in range(5)]
    blocks, pairs = rounded(model, batches[0], 3)
    fixed = with_matrices(pairs, DenseMatrix)
    result = tune(model, blocks, fixed, batches, TuningSettings(tuning=5))
    assert result.iterations == 0
    assert result.layers == [one for _, one in fixed]
    assert result.loss_after == result.loss_before > 0
    mixed = [fixed[0], pairs[1]]
    result = tune(model, blocks, mixed, batches, TuningSettings(tuning=40), seed=seed)
    assert result.layers[0].matrices == fixed[0][1].matrices
    assert isinstance(result.layers[1].matrices["weight"], QuantizedMatrix)
    assert result.iterations == 40
