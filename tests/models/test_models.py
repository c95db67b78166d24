"""Models given as instances: those of timm and transformers are described well enough to be rebuilt."""

from __future__ import annotations

import types
import warnings

import pytest
import timm.data
import torch
from torch import nn
from transformers import BertConfig, BertModel

import mlorq
from mlorq.config.sections import model_section, source_section
from mlorq.data import load_dataset
from mlorq.errors import CheckpointError, DataError, ModelError
from mlorq.models import from_module, load_model, rebuild
from mlorq.models.timm import TimmSettings, check_arguments, preprocessing

ModelConfig = model_section()

SMALL = {"img_size": 32, "num_classes": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}


def _vit(**changes):
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **{**SMALL, **changes}).eval()


def _bert(**changes):
    torch.manual_seed(0)
    config = BertConfig(vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    return BertModel(config, **changes).eval()


@pytest.mark.parametrize(
    ("build", "inputs"),
    [
        (_vit, torch.randn(2, 3, 32, 32)),
        (lambda: _vit(global_pool="avg"), torch.randn(2, 3, 32, 32)),
        (_bert, torch.randint(5, 50, (2, 7))),
        (lambda: _bert(add_pooling_layer=False), torch.randint(5, 50, (2, 7))),
    ],
)
def test_library_instances_rebuild_to_equal_outputs(build, inputs):
    module = build()
    state = torch.get_rng_state()
    architecture = from_module(module).architecture
    assert torch.equal(torch.get_rng_state(), state)  # the trial leaves the caller's random numbers alone
    assert architecture["family"] in ("timm", "transformers")
    other = rebuild(architecture).eval()
    other.load_state_dict(module.state_dict())
    with torch.no_grad():
        ours, theirs = module(inputs), other(inputs)
    assert torch.equal(*((x if isinstance(x, torch.Tensor) else x[0]) for x in (ours, theirs)))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m, "global_pool", "avg"),
        lambda m: setattr(m, "head", nn.Linear(32, 5)),
        lambda m: setattr(m.blocks[0], "forward", types.MethodType(lambda self, x: x, m.blocks[0])),
        lambda m: m.blocks[0].register_forward_hook(lambda *given: given[-1] * 2),
        lambda m: setattr(m.blocks[0].mlp, "act", nn.ReLU()),
    ],
)
def test_changed_instances_are_the_users_own(change):
    module = _vit()
    change(module)
    assert from_module(module).architecture["family"] == "custom"


def test_checkpoints_of_library_instances_load_alone(tmp_path):
    module, batches = _vit(), [torch.randn(8, 3, 32, 32) for _ in range(2)]
    search = {"hessian_probes": 4, "hessian_min_probes": 2, "factor_bits": []}
    result = mlorq.compress(module, batches, budget="6bit", rounding="nearest", search=search, device="cpu")
    result.save(str(tmp_path / "out"))
    loaded = mlorq.load(str(tmp_path / "out"))
    with torch.no_grad():
        assert torch.equal(loaded(batches[0]), result.model(batches[0]))


def test_padding_of_batches_in_memory_is_masked():
    mask = torch.tensor([[1, 1, 0]])
    model = from_module(_bert())
    found = model.token_mask({"input_ids": torch.tensor([[5, 6, 0]]), "attention_mask": mask})
    assert found is not None
    assert torch.equal(found, mask.bool())
    assert model.token_mask(torch.zeros(1, 3)) is None


def test_a_sentence_encoder_stored_without_its_pooler_loads(tmp_path):
    _bert(add_pooling_layer=False).save_pretrained(tmp_path)
    model = load_model(ModelConfig(family="transformers", name=str(tmp_path), task="sentence-similarity"))
    assert model.architecture["arguments"] == {"add_pooling_layer": False}
    rebuild(model.architecture).load_state_dict(model.module.state_dict())


@pytest.mark.parametrize(
    ("arguments", "size"),
    [({"img_size": [64, 32]}, [3, 64, 32]), ({"img_size": 64}, [3, 64, 64]), ({"in_chans": 1}, [1, 224, 224])],
)
def test_preprocessing_follows_the_arguments(arguments, size):
    found = preprocessing(TimmSettings(name="vit_tiny_patch16_224", arguments=arguments))
    assert found["input_size"] == size
    assert list(found["mean"]) == [0.5] * size[0]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("vit_tiny_patch16_224_in21k", {}),
        ("swin_base_patch4_window7_224_in22k", {}),
        ("vit_tiny_patch16_224.augreg_in21k", {}),
        ("vit_tiny_patch16_224", {"pretrained_cfg": "augreg_in21k"}),
        ("resnet18", {"pretrained_cfg_overlay": {"mean": (0.1, 0.2, 0.3), "crop_pct": 0.7}}),
        ("deit_tiny_distilled_patch16_224", {"num_classes": 3}),
    ],
)
def test_preprocessing_is_the_one_that_timm_gives_the_model(name, arguments):
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm mentions names that it has changed
        module = timm.create_model(name, **arguments)
    wanted = timm.data.resolve_data_config({}, model=module)
    found = preprocessing(TimmSettings(name=name, arguments=arguments))
    assert found == {key: list(value) if isinstance(value, tuple) else value for key, value in wanted.items()}


def test_names_and_tags_that_timm_does_not_have_are_refused():
    for name in ("vit_tinny", "resnet18.no_such_tag"):
        with pytest.raises(ModelError, match=name):
            preprocessing(TimmSettings(name=name))


def test_deprecated_names_take_the_arguments_of_the_current_ones():
    check_arguments("vit_tiny_patch16_224_in21k", {"img_size": 32, "depth": 1})
    with pytest.raises(CheckpointError, match="'checkpoint_path'"):
        check_arguments("vit_tiny_patch16_224_in21k", {"checkpoint_path": "x"})


def test_arguments_that_change_the_preprocessing_are_refused(tmp_path):
    arguments = {"img_size": 32, "depth": 1, "embed_dim": 12, "num_heads": 1, "num_classes": 2}
    module = timm.create_model("vit_tiny_patch16_224", **arguments)
    torch.save(module.state_dict(), tmp_path / "w.pt")

    def load(**more):
        settings = {"name": "vit_tiny_patch16_224", "checkpoint": "w.pt", "arguments": arguments | more}
        return load_model(ModelConfig(family="timm", **settings), str(tmp_path))

    assert load(pretrained_cfg_overlay={"url": ""}).architecture["arguments"] == arguments
    with pytest.raises(ModelError, match="changes the preprocessing"):
        load(pretrained_cfg_overlay={"mean": (0.1, 0.2, 0.3)})


def test_modules_of_one_name_in_two_folders(tmp_path):
    for width in (3, 5):
        folder = tmp_path / str(width)
        folder.mkdir()
        (folder / "width_helper.py").write_text(f"WIDTH = {width}\n")
        # Imported when it is called, which must find the helper beside it as well.
        code = "import torch\n\ndef build():\n    import width_helper\n"
        (folder / "namesake.py").write_text(f"{code}    return torch.nn.Linear({width}, width_helper.WIDTH)\n")
        model = load_model(ModelConfig(family="custom", factory="namesake:build"), str(folder))
        assert model.module.in_features == width


@pytest.mark.parametrize(
    ("values", "named"), [({"metric": "spearman"}, "metric 'spearman'"), ({"split": "test"}, "split 'test'")]
)
def test_settings_that_image_folders_cannot_follow(tmp_path, values, named):
    config = ModelConfig(family="timm", name="vit_tiny_patch16_224", pretrained=True)
    source = source_section()(source="image_folder", root=str(tmp_path), **values)
    with pytest.raises(DataError, match=named):
        load_dataset(source, "evaluation", from_module(_vit()), config, "", 0)
