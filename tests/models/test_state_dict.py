"""State dicts of training scripts: the usual wrappers are taken off, and what is refused is refused with its reason."""

from __future__ import annotations

import argparse
import types
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from mlorq.errors import ModelError
from mlorq.models.state_dict import load_weights


def net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Sequential(nn.Linear(4, 2)))


STATE = net(1).state_dict()
PREFIXES = [
    "module.",
    "_orig_mod.",
    "module._orig_mod.",
    "_orig_mod.module.",
    "model.",
    "net.backbone.",
    "module.model.",
]


def under(prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in STATE.items()}


def loaded(path: Path) -> bool:
    """Whether a file fills a module with ``STATE``."""
    module = net(0)
    load_weights(module, str(path))
    return all(torch.equal(value, STATE[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("key", [None, "state_dict", "model_state_dict", "net"])
def test_prefixes_that_all_names_have(tmp_path, prefix, key):
    state = under(prefix)
    torch.save(state if key is None else {key: state, "epoch": 3, "best": torch.tensor(0.7)}, tmp_path / "x.pt")
    assert loaded(tmp_path / "x.pt")
    if key is None:
        safetensors.torch.save_file(state, tmp_path / "x.safetensors")
        assert loaded(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict_ema": STATE, "epoch": 1},
        {"model_ema": STATE},
        {"model": {"state_dict": STATE}},
        {"state_dict": {}, "ema": under("module.")},
        {"module.0._orig_mod.weight": STATE["0.weight"], **{k: v for k, v in STATE.items() if k != "0.weight"}},
    ],
)
def test_wrappers(tmp_path, content):
    torch.save(content, tmp_path / "x.pth")
    assert loaded(tmp_path / "x.pth")


def test_averaged_models_of_torch(tmp_path):
    torch.save(AveragedModel(net(1)).state_dict(), tmp_path / "x.pth")
    assert loaded(tmp_path / "x.pth")


def test_trained_weights_are_read_and_the_average_is_mentioned(tmp_path):
    torch.save({"state_dict_ema": net(2).state_dict(), "state_dict": STATE}, tmp_path / "x.pth")
    with pytest.warns(UserWarning, match=r"'state_dict' are read, not those under 'state_dict_ema'"):
        assert loaded(tmp_path / "x.pth")


def refusal(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        load_weights(net(0), str(path))
    message = str(caught.value)
    assert str(path) in message
    assert message.isprintable()
    advice = ("weights_only", "arbitrary code", "allowlist", "safe_globals")
    assert not any(word in message for word in advice)
    return message


class Own:
    """A class of a training script."""


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    ("extra", "named"),
    [
        (argparse.Namespace(lr=1), "argparse.Namespace"),
        (types.SimpleNamespace(lr=1), "types.SimpleNamespace"),
        (np.float64(0.5), "scalar"),
        (Own(), "test_state_dict.Own"),
        (eval, "eval"),
    ],
)
def test_refused_objects_are_named(tmp_path, extra, named, legacy):
    torch.save({"model": STATE, "extra": extra}, tmp_path / "x.pth", _use_new_zipfile_serialization=not legacy)
    message = refusal(tmp_path / "x.pth")
    assert named in message
    assert "torch.save(model.state_dict()" in message


def test_other_files_are_refused_with_their_reason(tmp_path):
    torch.save(net(0), tmp_path / "module.pth")
    assert "torch.nn.modules" in refusal(tmp_path / "module.pth")
    (tmp_path / "noise.pth").write_bytes(b"noise" * 50)
    assert "Unsupported operand" in refusal(tmp_path / "noise.pth")
    torch.save({"student": STATE, "teacher": STATE}, tmp_path / "two.pth")
    assert "it has student, teacher" in refusal(tmp_path / "two.pth")
    torch.save({"model": {**STATE, **under("module.")}}, tmp_path / "twice.pth")
    assert "two tensors '0.weight'" in refusal(tmp_path / "twice.pth")
    torch.save({"model": {**under("model."), "loss.weight": torch.ones(2)}}, tmp_path / "more.pth")
    assert "has no tensor '0.weight'" in refusal(tmp_path / "more.pth")
