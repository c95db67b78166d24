"""Configurations with numbers that JSON does not have, and parts with implementations of attention of their own."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from mlorq.models import rebuild
from mlorq.models.plain import decoded_floats, encoded_float
from mlorq.models.transformers_modules import describe
from tests import zoo
from tests.compressed import compressed, folder_of

MAMBA = {"vocab_size": 24, "hidden_size": 16, "state_size": 8, "num_hidden_layers": 1, "num_heads": 4, "head_dim": 8}


@pytest.mark.parametrize("value", [math.inf, -math.inf, 1.5, math.nan])
def test_numbers_survive_json(value: float) -> None:
    nested = {"a": [{"b": encoded_float(value)}, "Infinity", {"__float__": "x"}]}
    found = decoded_floats(json.loads(json.dumps(nested, allow_nan=False)))
    same = found["a"][0]["b"]
    assert same == value or (math.isnan(same) and math.isnan(value))
    assert found["a"][1:] == ["Infinity", {"__float__": "x"}]


def test_a_model_with_an_unbounded_setting_is_saved_and_loaded(tmp_path: Path) -> None:
    import mlorq

    config = transformers.Mamba2Config(**MAMBA, expand=2, n_groups=1, chunk_size=8)
    assert math.inf in config.time_step_limit
    module: Any = zoo.randomised(transformers.Mamba2Model(config), 0)
    architecture = describe(module)
    assert architecture is not None
    small = compressed(module)
    tokens = torch.arange(16).view(2, 8)
    loaded: Any = mlorq.load(folder_of(tmp_path / "out", small, architecture))
    with torch.no_grad():
        assert torch.equal(loaded(tokens).last_hidden_state, small(tokens).last_hidden_state)


def test_parts_keep_their_implementation_of_attention() -> None:
    sizes = {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1], "window_size": 2, "image_size": 32}
    backbone = {"model_type": "swin", **sizes, "out_features": ["stage1", "stage2", "stage3", "stage4"]}
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32,
        dim_feedforward=32, num_attention_heads=2, encoder_layers=1, decoder_layers=2, num_queries=4,
    )  # fmt: skip
    module: Any = zoo.randomised(transformers.Mask2FormerForUniversalSegmentation(config), 0)
    for layer in module.modules():
        layer.samples_axis = 1  # marks of the search are no part of an architecture
    architecture = describe(module)
    assert architecture is not None
    twin: Any = rebuild(architecture)

    def implementations(root: Any) -> list[Any]:
        return [
            getattr(part.config, "_attn_implementation", None) for part in root.modules() if hasattr(part, "config")
        ]

    assert implementations(twin) == implementations(module)
