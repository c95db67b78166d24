"""Rotated residual streams: orthogonal, the same float function, another basis for the weights."""

from __future__ import annotations

import pytest
import safetensors.torch
import timm
import torch

import mlorq
from mlorq.config.run import RunConfig
from mlorq.config.sections import model_section
from mlorq.errors import ConfigError, ModelError
from mlorq.models import load_model
from mlorq.models.residual_rotation import rotate_residual_stream, rotation_matrix

ModelConfig = model_section()

SIZE = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10}


def vit(seed: int, name: str = "vit_tiny_patch16_224", **arguments) -> torch.nn.Module:
    """Small, with scales, shifts and tokens that are not those of a fresh module."""
    torch.manual_seed(seed)
    module = timm.create_model(name, **(SIZE | arguments)).eval().requires_grad_(False)
    for name, parameter in module.named_parameters():
        if parameter.dim() == 1 or "token" in name or "pos_embed" in name:
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


@pytest.mark.parametrize("width", [2, 12, 48, 192])
def test_rotations_are_orthogonal_and_keep_the_vector_of_ones(width, seed):
    rotation = rotation_matrix(width, seed)
    eye, ones = torch.eye(width, dtype=torch.float64), torch.ones(width, dtype=torch.float64)
    torch.testing.assert_close(rotation @ rotation.T, eye)
    torch.testing.assert_close(rotation @ ones, ones)
    torch.testing.assert_close(rotation_matrix(width, seed), rotation)
    if width > 2:  # of width 2 there are only two
        assert not torch.allclose(rotation_matrix(width, seed + 1), rotation)
        assert not torch.allclose(rotation, eye, atol=0.1)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("vit_tiny_patch16_224", {}),
        ("vit_tiny_patch16_224", {"global_pool": "avg", "class_token": False}),
        ("vit_tiny_patch16_224", {"init_values": 0.1}),  # LayerScale
        ("vit_tiny_patch16_224", {"reg_tokens": 2}),
        ("deit_tiny_patch16_224", {}),
        ("deit3_small_patch16_224", {}),
    ],
)
def test_the_float_function_stays_the_same(name, arguments, seed):
    module = vit(seed, name, **arguments)
    images = torch.randn(3, 3, 32, 32)
    before = module(images)
    weights = {key: value.clone() for key, value in module.state_dict().items()}
    rotate_residual_stream(module, seed)
    after = module(images)
    assert (after - before).norm() <= 1e-5 * before.norm()
    changed = {key for key, value in module.state_dict().items() if not torch.equal(value, weights[key])}
    for layer in ("patch_embed.proj", "blocks.0.attn.qkv", "blocks.1.mlp.fc2", "head"):
        assert f"{layer}.weight" in changed
    norms = [part for part in module.modules() if isinstance(part, torch.nn.LayerNorm)]
    assert all(torch.equal(norm.weight, torch.ones_like(norm.weight)) and not norm.bias.any() for norm in norms)


def test_a_channel_that_stands_out_does_so_no_more(seed):
    module = vit(seed)
    module.blocks[0].mlp.fc1.weight[:, 5] *= 30

    def spread() -> float:
        weight = module.blocks[0].mlp.fc1.weight
        return float((weight.abs().amax(1) / weight.square().mean(1).sqrt()).mean())

    before = spread()
    rotate_residual_stream(module, seed)
    assert spread() < 0.7 * before


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (lambda: timm.create_model("vit_tiny_patch16_224", pre_norm=True, **SIZE), "norm_pre"),
        (lambda: timm.create_model("vit_tiny_patch16_224", qkv_bias=False, **SIZE), "blocks.0.norm1 has no bias"),
        (lambda: timm.create_model("deit_tiny_distilled_patch16_224", **SIZE), "VisionTransformerDistilled"),
        (lambda: torch.nn.Linear(2, 2), "Linear cannot be rotated"),
    ],
)
def test_what_cannot_be_rotated_is_refused_and_left_as_it_is(module, reason):
    built = module()
    before = {key: value.clone() for key, value in built.state_dict().items()}
    with pytest.raises(ModelError, match=reason):
        rotate_residual_stream(built, 0)
    assert all(torch.equal(value, before[key]) for key, value in built.state_dict().items())


def test_a_configuration_rotates_and_its_checkpoint_loads_alone(tmp_path, seed):
    module = vit(seed)
    safetensors.torch.save_file(module.state_dict(), tmp_path / "weights.safetensors")
    plain = {"family": "timm", "name": "vit_tiny_patch16_224", "arguments": SIZE}
    plain["checkpoint"] = str(tmp_path / "weights.safetensors")
    images = torch.randn(4, 3, 32, 32)
    models = [load_model(ModelConfig(**plain, rotation=rotation)) for rotation in (None, 1, 1, 2)]
    assert len({model.key for model in models}) == 3
    assert models[1].key == models[2].key
    wanted = models[0].outputs(models[0].module, images)
    torch.testing.assert_close(models[1].outputs(models[1].module, images), wanted, rtol=1e-4, atol=1e-5)

    rotated = models[1].module
    result = mlorq.compress(rotated, [images], budget="8bit", preset="quick", rounding="nearest")
    result.save(str(tmp_path / "compressed"))
    loaded = mlorq.load(str(tmp_path / "compressed"))
    torch.testing.assert_close(loaded(images), result.model(images))
    assert (loaded(images) - wanted).norm() < 0.1 * wanted.norm()


def test_rotation_of_other_families_is_a_configuration_error():
    values = {"model": {"family": "transformers", "name": "bert", "task": "text-classification", "rotation": 1}}
    with pytest.raises(ConfigError, match="does not support rotation"):
        RunConfig.from_mapping(values | {"data": {"calibration": {}, "evaluation": {}}})
