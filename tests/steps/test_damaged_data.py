"""Evaluation images that cannot be decoded are named before the search."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlorq.config.run import RunConfig
from mlorq.errors import DataError
from steps.base import Outcome
from steps.inprocess import InProcess
from steps.pipeline import run_pipeline
from steps.session import Session, open_store
from tests import zoo


def test_a_damaged_evaluation_image_is_found_first(tmp_path: Path) -> None:
    for index in range(4):
        zoo.save_image(tmp_path / "images" / f"{index}.png", index)
        zoo.save_image(tmp_path / "held_out" / f"{index}.png", 9 + index)
    damaged = tmp_path / "held_out" / "2.png"
    damaged.write_bytes(damaged.read_bytes()[:100])
    module = zoo.timm_model(zoo.VIT, zoo.VIT_ARGUMENTS)
    zoo.torch.save(module.state_dict(), tmp_path / "vit.pth")
    values = {
        "model": {"family": "timm", "name": zoo.VIT, "arguments": zoo.VIT_ARGUMENTS, "checkpoint": "vit.pth"},
        "data": {
            "calibration": {"source": "image_folder", "root": "images"},
            "evaluation": {"source": "image_folder", "root": "held_out"},
        },
        "budget": "8bit",
        "preset": "quick",
        "store": "file://./store",
        "engine": {"devices": "cpu", "threads": 1},
    }
    config = RunConfig.from_mapping(values, str(tmp_path))
    session, done = Session(config, open_store(config)), list[Outcome]()
    with pytest.raises(DataError, match=r"image 2\.png cannot be decoded") as caught:
        run_pipeline(session, InProcess(session, record=done.append), config.budgets)
    assert "\n" not in str(caught.value)
    assert [outcome.ref.step for outcome in done] == ["layers"]
