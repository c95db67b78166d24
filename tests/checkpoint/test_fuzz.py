"""Random damage of a checkpoint's files: loading gives equal outputs or one line of ``CheckpointError``."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mlorq
from mlorq.checkpoint.io import load
from mlorq.errors import CheckpointError
from tests.checkpoint.test_checkpoint import Everything, images, outputs, saved  # noqa: F401
from tests.golden.make import batches, net

FILES = ("mlorq.json", "model.safetensors")


def damaged(data: bytes, rng: random.Random) -> bytes:
    """One to three changes: a byte, a digit, a piece removed, doubled or cut off; mostly near the start."""
    found = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(min(len(found), rng.choice([64, 4096, len(data)])) or 1)
        size = rng.choice([1, 1, 2, 8, 40])
        kind = rng.randrange(5)
        if kind == 0:
            found[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            digits = [index for index, byte in enumerate(found[:20000]) if 48 <= byte <= 57] or [at]
            found[rng.choice(digits)] = 48 + rng.randrange(10)
        elif kind == 2:
            del found[at : at + size]
        elif kind == 3:
            found[at:at] = found[at : at + size]
        elif rng.randrange(8) == 0:
            del found[at:]
        if not found:
            return b""
    return bytes(found)


def check_damage(folder: Path, model: Callable[[], nn.Module], inputs: Tensor, count: int) -> None:
    whole = {name: (folder / name).read_bytes() for name in FILES}
    wanted = outputs(load(folder, model=model()), inputs)
    messages: list[str] = []
    for index in range(count):
        rng = random.Random(index)
        name = rng.choice(FILES)
        (folder / name).write_bytes(damaged(whole[name], rng))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = outputs(load(folder, model=model()), inputs)
            assert torch.equal(found, wanted), (index, name)
        except CheckpointError as error:
            messages.append(str(error))
        (folder / name).write_bytes(whole[name])
    assert not [message for message in messages if "\n" in message]
    assert len(messages) > count // 2


@pytest.mark.timeout(3600)  # for ten thousand beside other work
@pytest.mark.parametrize("count", [20, pytest.param(10_000, marks=pytest.mark.long)])
def test_a_damaged_checkpoint_is_refused_or_computes_the_same(saved: Path, count: int) -> None:  # noqa: F811
    check_damage(saved, Everything, images(7), count)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("count", [20, pytest.param(2_000, marks=pytest.mark.long)])
@pytest.mark.parametrize("options", [{"ranges": "token"}, {"method": "rectified", "mlp_iterations": 5}], ids=repr)
def test_a_damaged_checkpoint_with_quantized_activations(options: dict[str, Any], count: int, tmp_path: Path) -> None:
    settings = {"preset": "fast", "activations": {"bits": 6, **options}}
    mlorq.compress(net(gelu=True), batches(), budget="5bit", **settings).save(tmp_path / "out")
    check_damage(tmp_path / "out", lambda: net(gelu=True), batches(1, start=0.5)[0], count)
