"""What compressed layers keep in memory: the same outputs from codes, from float matrices, and from both."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from mlorq.errors import ModelError
from mlorq.forms.base import FORMS, Candidate, Shape
from mlorq.forms.compressed_module import CompressedModule
from mlorq.forms.in_memory import Weights, keep_in_memory
from mlorq.forms.modules import CompressedEmbedding, CompressedLinear, replace_layers
from mlorq.forms.stored_layer import CompressedLayer
from tests.layers import hessian_fit

CANDIDATES = [
    Candidate("Q", bits=3),
    Candidate("LR", bits_a=6, bits_b=4, rank=5),
    Candidate("QLR", bits=2, bits_a=4, bits_b=4, rank=3),
    Candidate("TCQ", bits=2),
]


class Net(nn.Module):
    """An embedding table, a layer, and two further layers that share its weight, one with a bias of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 24)
        self.first = nn.Linear(24, 24)
        self.second = nn.Linear(24, 24)
        self.second.weight = self.first.weight

    def forward(self, indices: Tensor) -> Tensor:
        found: Tensor = self.second(torch.relu(self.first(self.table(indices))))
        return found


def compressed(candidate: Candidate, seed: int) -> Net:
    torch.manual_seed(seed)
    net = Net().eval().requires_grad_(False)
    layers = {}
    for name, one in {"first": candidate, "table": Candidate("Q", bits=4)}.items():
        weight = net.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        fit = hessian_fit(weight.detach(), torch.rand_like(weight) + 0.1)
        layers[name] = CompressedLayer.of_rounded(name, one, FORMS[one.form].fit(fit, one))
    replace_layers(net, layers)
    return net


@pytest.mark.parametrize("candidate", CANDIDATES, ids=lambda candidate: candidate.candidate_id)
def test_same_outputs_whatever_is_kept(candidate: Candidate, seed: int) -> None:
    net, indices = compressed(candidate, seed), torch.randint(0, 30, (4, 7))
    expected = net(indices)
    choices: tuple[Weights, ...] = ("packed", "both", "dense")
    for weights in choices:
        own = deepcopy(net)
        keep_in_memory(own, weights)
        assert torch.equal(own(indices), expected)
        assert torch.equal(own(indices), expected)
        kept = sum(len(layer._kept) for layer in own.modules() if isinstance(layer, CompressedModule))
        assert bool(kept) == (weights == "both")


@pytest.mark.parametrize("candidate", CANDIDATES, ids=lambda candidate: candidate.candidate_id)
def test_dense_layers_are_their_matrices_alone(candidate: Candidate, seed: int) -> None:
    net = compressed(candidate, seed)
    rows, columns = 24, 24
    sizes = FORMS[candidate.form].matrices(candidate, Shape(rows, columns)).values()
    keep_in_memory(net, "dense")
    assert isinstance(net.first, CompressedLinear)
    held = {name: buffer for name, buffer in net.first.named_buffers()}
    assert sum(buffer.nbytes for buffer in held.values()) == sum(4 * r * c for r, c, _ in sizes)
    assert set(net.first.state_dict()) == {"bias"}
    twins = dict(net.second.named_buffers())
    assert all(buffer.data_ptr() == twins[name].data_ptr() for name, buffer in held.items())
    assert isinstance(net.table, CompressedEmbedding)
    assert net.table.stored_bytes  # tables stay packed
    with pytest.raises(ModelError, match=r"layer 'first' has dropped its codes.*packed"):
        net.first.compressed_layer()


def test_dense_layers_move_and_are_cast(seed: int) -> None:
    net, indices = compressed(CANDIDATES[1], seed), torch.randint(0, 30, (2, 5))
    expected = deepcopy(net).bfloat16()(indices)
    keep_in_memory(net, "dense")
    found = deepcopy(net.bfloat16())(indices)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)
