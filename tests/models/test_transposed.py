"""``Conv1D`` of transformers: compressed like linear layers, stored and exported in the shapes that each expects."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import mlorq
from mlorq.checkpoint.io import inspect, load
from mlorq.errors import CheckpointError
from mlorq.models import from_module
from mlorq.models.layers import find_layers
from mlorq.models.transposed import TransposedLinear, transpose_conv1d

QUICK: dict[str, Any] = {"preset": "quick", "rounding": "nearest", "search": {"sensitivity": "closed_form"}}
IDS = torch.randint(1, 60, (4, 8), generator=torch.Generator().manual_seed(1))
ATTENTION = "transformer.h.0.attn.c_attn"


def gpt2() -> Any:
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
    return transformers.GPT2ForSequenceClassification(transformers.GPT2Config(**sizes, pad_token_id=0)).eval()


def logits(module: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return module(IDS).logits


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, str]:
    """GPT-2 with one ``Conv1D`` left float, and its checkpoint."""
    result = mlorq.compress(gpt2(), [IDS, IDS.flip(0)], budget="40%", exclude=["*.mlp.c_proj"], device="cpu", **QUICK)
    folder = str(tmp_path_factory.mktemp("gpt2"))
    result.save(folder)
    return result, folder


def test_they_are_found_as_linear_layers_and_the_function_is_kept():
    module = gpt2()
    wanted = logits(module)
    model = from_module(module)
    assert torch.allclose(logits(module), wanted, atol=1e-6)
    found = find_layers(model, IDS)
    assert (found[ATTENTION].out_features, found[ATTENTION].in_features) == (48, 16)
    assert isinstance(module.get_submodule(ATTENTION), TransposedLinear)
    assert module.get_submodule(ATTENTION).nf == 48


def test_a_checkpoint_loads_by_itself_and_into_an_instance(compressed):
    result, folder = compressed
    assert len(result.allocation) == 4  # three Conv1D and the head
    wanted = logits(gpt2())
    assert (logits(result.model) - wanted).square().sum() < 1e-2 * wanted.square().sum()
    given = gpt2()
    for again in (load(folder), load(folder, model=given)):
        assert torch.equal(logits(again), logits(result.model))
    assert type(given.get_submodule(ATTENTION)).__name__ == "Conv1D"
    assert len(inspect(folder)["extra"]["transposed"]) == 4


def test_a_dense_state_dict_has_the_shapes_of_the_original(compressed, tmp_path):
    result, folder = compressed
    mlorq.export(folder, str(tmp_path / "dense.safetensors"), "dense")
    module = gpt2()
    module.load_state_dict(load_file(tmp_path / "dense.safetensors"))
    assert torch.allclose(logits(module), logits(result.model), atol=1e-5)


def test_transformers_loads_the_exported_folder(compressed, tmp_path):
    import transformers

    result, folder = compressed
    mlorq.export(folder, str(tmp_path / "out"), "transformers")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(str(tmp_path / "out"))
    assert torch.allclose(logits(again), logits(result.model), atol=1e-6)


def test_a_format_without_such_layers_is_refused(tmp_path):
    search = {"forms": ["Q"], "bits": [4], "sensitivity": "closed_form"}
    result = mlorq.compress(gpt2(), [IDS], budget="60%", device="cpu", **{**QUICK, "search": search})
    result.save(str(tmp_path / "in"))
    with pytest.raises(CheckpointError, match="is a Conv1D of transformers, which the format"):
        mlorq.export(str(tmp_path / "in"), str(tmp_path / "out"), "compressed-tensors")


def test_shared_layers_stay_shared_and_those_with_hooks_stay():
    from transformers.pytorch_utils import Conv1D

    module = nn.Sequential(Conv1D(3, 4), Conv1D(4, 3))
    module.append(module[0])
    module[1].register_forward_hook(lambda *_: None)
    x = torch.randn(2, 4)
    wanted = module(x)
    transpose_conv1d(module)
    assert module[0] is module[2]
    assert type(module[1]) is Conv1D
    assert torch.allclose(module(x), wanted, atol=1e-6)
