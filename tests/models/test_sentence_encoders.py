"""Sentence encoders' pooling: as their folder says, by hand and against the sentence-transformers library."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

import mlorq
from mlorq.config.sections import model_section
from mlorq.data import load_dataset
from mlorq.errors import ModelError
from mlorq.models import FloatModel, load_model, rebuild
from mlorq.models.transformers import tokenizer
from tests import zoo

ModelConfig = model_section()

OLD = "sentence_transformers.models."
POOLING_KEYS = {"cls": "cls_token", "max": "max_tokens", "mean": "mean_tokens"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("encoders") / "plain"
    zoo.save_text_model(folder, "bert", seed=1)
    return folder


def lay_out(plain: Path, folder: Path, modules: list[str], pooling: dict, inside: str = "") -> Path:
    """An encoder's folder as the library of its time wrote it."""
    shutil.copytree(plain, folder / inside)
    paths = [inside, *(f"{index}_{name}" for index, name in enumerate(modules[1:], 1))]
    rows = [
        {"idx": i, "name": str(i), "path": path, "type": OLD + name}
        for i, (path, name) in enumerate(zip(paths, modules, strict=True))
    ]
    (folder / "modules.json").write_text(json.dumps(rows))
    for path, name in zip(paths, modules, strict=True):
        if name == "Pooling":
            (folder / path).mkdir()
            (folder / path / "config.json").write_text(json.dumps(pooling))
    return folder


def config(folder: Path) -> ModelConfig:
    return ModelConfig(family="transformers", name=str(folder), task="sentence-similarity")


def embed(model: FloatModel, folder: Path, sentences: list[str], side: str = "right") -> torch.Tensor:
    tokens = tokenizer(config(folder))
    tokens.padding_side = side
    with torch.no_grad():
        return model.outputs(model.module, dict(tokens(sentences, padding=True, return_tensors="pt")))


def by_hand(plain: Path, sentence: str, kind: str) -> torch.Tensor:
    model = load_model(config(plain))
    with torch.no_grad():
        hidden = model.module(**tokenizer(config(plain))(sentence, return_tensors="pt")).last_hidden_state[0]
    return {"cls": hidden[0], "max": hidden.max(0).values, "mean": hidden.mean(0)}[kind]


@pytest.mark.parametrize("kind", ["cls", "max", "mean"])
@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("inside", ["", "0_Transformer"])
def test_pooling_and_normalisation_are_those_of_the_folder(plain, tmp_path, kind, normalised, inside):
    settings = {f"pooling_mode_{key}": name == kind for name, key in POOLING_KEYS.items()}
    modules = ["Transformer", "Pooling", *(["Normalize"] if normalised else [])]
    folder = lay_out(plain, tmp_path / "encoder", modules, settings, inside)
    model = load_model(config(folder))
    found = embed(model, folder, zoo.SENTENCES)
    for row, sentence in enumerate(zoo.SENTENCES):
        wanted = by_hand(plain, sentence, kind)
        wanted = wanted / wanted.norm() if normalised else wanted
        torch.testing.assert_close(found[row], wanted, atol=2e-6, rtol=1e-5)
    # The usual one is what a plain folder gives; another one is another model, and both rebuild.
    same = kind == "mean" and normalised
    assert (model.key == load_model(config(plain)).key) == same
    again = rebuild(json.loads(json.dumps(model.architecture))).eval()
    again.load_state_dict(model.module.state_dict())
    with torch.no_grad():
        batch = dict(tokenizer(config(folder))(zoo.SENTENCES, padding=True, return_tensors="pt"))
        assert torch.equal(model.outputs(again, batch), found)


@pytest.mark.parametrize("kind", ["cls", "max", "mean"])
def test_the_side_of_padding_does_not_matter_to_pooling(plain, tmp_path, kind):
    from mlorq.models.sentence import SentenceEmbedding

    hidden = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    right = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])

    class Fixed(torch.nn.Module):
        def forward(self, last_hidden_state, attention_mask):
            from types import SimpleNamespace

            return SimpleNamespace(last_hidden_state=last_hidden_state)

    forward = SentenceEmbedding((kind,))
    found = forward(Fixed(), {"last_hidden_state": hidden, "attention_mask": right})
    moved = hidden.clone()
    moved[1] = hidden[1].roll(2, 0)
    left = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    assert torch.equal(forward(Fixed(), {"last_hidden_state": moved, "attention_mask": left}), found)


@pytest.mark.parametrize("mode", ["cls", "max", "mean", ("cls", "mean")])
@pytest.mark.parametrize("normalised", [True, False])
def test_embeddings_equal_those_of_sentence_transformers(plain, tmp_path, mode, normalised):
    library = pytest.importorskip("sentence_transformers")
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    parts = [modules.Transformer(str(plain)), modules.Pooling(32, mode)]
    theirs = library.SentenceTransformer(modules=parts + ([modules.Normalize()] if normalised else []), device="cpu")
    theirs.save(str(tmp_path / "saved"))
    model = load_model(config(tmp_path / "saved"))
    wanted = torch.from_numpy(theirs.encode(zoo.SENTENCES, show_progress_bar=False))
    torch.testing.assert_close(embed(model, tmp_path / "saved", zoo.SENTENCES), wanted, atol=2e-6, rtol=1e-5)


DENSE = {"in_features": 32, "out_features": 20}


def with_dense(plain: Path, folder: Path, settings: dict, weights: str | None = "model.safetensors", **tensors) -> Path:
    """An encoder with one dense layer, described and filled by hand."""
    lay_out(plain, folder, ["Transformer", "Pooling", "Dense", "Normalize"], {"pooling_mode": "mean"})
    (folder / "2_Dense").mkdir()
    (folder / "2_Dense" / "config.json").write_text(json.dumps(settings))
    if weights is not None:
        generator = torch.Generator().manual_seed(5)
        state = {"linear.weight": torch.randn(20, 32, generator=generator), "linear.bias": torch.randn(20)} | tensors
        path = folder / "2_Dense" / weights
        safetensors.torch.save_file(state, path) if weights.endswith("safetensors") else torch.save(state, path)
    return folder


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_dense_layers_are_part_of_the_model(plain, tmp_path, weights):
    folder = with_dense(plain, tmp_path / "encoder", DENSE, weights)
    model = load_model(config(folder))
    found = embed(model, folder, zoo.SENTENCES)
    layer = model.module.get_submodule("dense.0.linear")
    for row, sentence in enumerate(zoo.SENTENCES):
        wanted = torch.tanh(by_hand(plain, sentence, "mean") @ layer.weight.T + layer.bias)
        torch.testing.assert_close(found[row], wanted / wanted.norm(), atol=2e-6, rtol=1e-5)
    again = rebuild(json.loads(json.dumps(model.architecture))).eval()
    again.load_state_dict(model.module.state_dict())
    batch = dict(tokenizer(config(folder))(zoo.SENTENCES, padding=True, return_tensors="pt"))
    with torch.no_grad():
        assert torch.equal(again(**batch), found), "a loaded checkpoint gives embeddings when it is called"


@pytest.mark.parametrize("activation", ["Identity", "Tanh", "GELU"])
@pytest.mark.parametrize(("width", "residual"), [(32, False), (32, True), (20, True)])
def test_dense_layers_equal_those_of_sentence_transformers(plain, tmp_path, activation, width, residual):
    library = pytest.importorskip("sentence_transformers")
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    torch.manual_seed(0)
    kind = getattr(torch.nn, activation)
    dense = [modules.Dense(64, width, activation_function=kind())]
    dense.append(modules.Dense(width, 32, bias=False, activation_function=kind(), use_residual=residual))
    parts = [modules.Transformer(str(plain)), modules.Pooling(32, ("cls", "mean")), *dense, modules.Normalize()]
    theirs = library.SentenceTransformer(modules=parts, device="cpu")
    theirs.save(str(tmp_path / "saved"))
    wanted = torch.from_numpy(theirs.encode(zoo.SENTENCES, show_progress_bar=False))
    found = embed(load_model(config(tmp_path / "saved")), tmp_path / "saved", zoo.SENTENCES)
    torch.testing.assert_close(found, wanted, atol=2e-6, rtol=1e-5)


def test_dense_layers_are_compressed_and_come_back_from_the_checkpoint(plain, tmp_path):
    folder = with_dense(plain, tmp_path / "encoder", DENSE)
    pairs = zip(zoo.SENTENCES, zoo.SENTENCES[::-1], strict=True)
    (tmp_path / "pairs.csv").write_text("".join(f"{a},{b},{index % 3}\n" for index, (a, b) in enumerate(pairs)))
    source = {"source": "table", "path": "pairs.csv", "text": [0, 1], "label": 2, "batch_size": 4}
    values = {
        "model": {"family": "transformers", "name": str(folder), "task": "sentence-similarity"},
        "data": {"calibration": source, "evaluation": source | {"metric": "spearman"}},
        "budget": "4bit",
        "preset": "best",
        "search": {"samples": 8, "hessian_samples": 8},
        "rounding": {"iterations": 4, "tuning": 4},
    }
    result = zoo.run(tmp_path, values)
    layers = [row["layer"] for row in result["allocation"]]
    assert layers[-1] == "dense.0.linear"
    assert layers[0].startswith("transformer.")
    loaded = mlorq.load(result["checkpoint"])
    batch = dict(tokenizer(config(folder))(zoo.SENTENCES, padding=True, return_tensors="pt"))
    model = load_model(config(folder))
    with torch.no_grad():
        found, wanted = loaded(**batch), model.outputs(model.module, batch)
    assert found.shape == (len(zoo.SENTENCES), 20)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(len(found)))
    assert 0 < ((found - wanted) ** 2).sum() / (wanted**2).sum() < 0.2


@pytest.mark.parametrize(
    ("settings", "weights", "tensors", "named"),
    [
        (DENSE | {"activation_function": "os.system"}, "model.safetensors", {}, "'os.system'"),
        (DENSE | {"activation_function": "torch.nn.modules.activation.PReLU"}, "model.safetensors", {}, "PReLU"),
        (DENSE | {"module_input_name": "token_embeddings"}, "model.safetensors", {}, "token_embeddings"),
        (DENSE | {"out_features": "20"}, "model.safetensors", {}, "out_features"),
        (DENSE | {"in_features": 31}, "model.safetensors", {}, "in_features 31, but its input has 32"),
        (DENSE, None, {}, "2_Dense/model.safetensors"),
        (DENSE, "model.safetensors", {"linear.bias": torch.zeros(3)}, "linear.bias"),
        (DENSE, "model.safetensors", {"other": torch.zeros(3)}, "other"),
    ],
)
def test_dense_layers_that_cannot_be_read_are_one_line(plain, tmp_path, settings, weights, tensors, named):
    folder = with_dense(plain, tmp_path / "encoder", settings, weights, **tensors)
    with pytest.raises(ModelError) as caught:
        load_model(config(folder))
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_damaged_weights_of_a_dense_layer_are_one_line(plain, tmp_path, weights):
    folder = with_dense(plain, tmp_path / "encoder", DENSE, weights)
    (folder / "2_Dense" / weights).write_bytes(b"damaged")
    with pytest.raises(ModelError, match="2_Dense") as caught:
        load_model(config(folder))
    assert "\n" not in str(caught.value)


def test_a_source_reads_the_tokenizer_of_a_transformer_in_a_subfolder(plain, tmp_path):
    from mlorq.config.sections import source_section

    lay_out(plain, tmp_path / "e", ["Transformer", "Pooling"], {"pooling_mode": "cls"}, "0_Transformer")
    (tmp_path / "a.csv").write_text("".join(f"{text}\n" for text in zoo.SENTENCES))
    source = source_section()(source="table", path="a.csv", text=[0])
    model = load_model(config(tmp_path / "e"))
    data = load_dataset(source, "calibration", model, config(tmp_path / "e"), str(tmp_path), 0)
    assert model.outputs(model.module, data.batches[0]).shape == (8, 32)


@pytest.mark.parametrize(
    ("modules", "pooling", "named"),
    [
        (["Transformer", "Pooling", "CNN", "Normalize"], {"pooling_mode": "mean"}, "CNN"),
        (["Transformer", "Pooling", "Dense", "Normalize"], {"pooling_mode": "mean"}, "2_Dense/config.json"),
        (["Transformer", "Pooling", "Normalize", "Dense"], {"pooling_mode": "mean"}, "Dense"),
        (["Transformer", "Normalize"], {}, "Normalize"),
        (["Transformer"], {}, "no Pooling"),
        (["WordEmbeddings", "Pooling"], {"pooling_mode": "mean"}, "WordEmbeddings"),
        (["Transformer", "Pooling"], {"pooling_mode_lasttoken": True}, "lasttoken"),
        (["Transformer", "Pooling"], {"pooling_mode": "other"}, "'other'"),
        (["Transformer", "Pooling"], [], "1_Pooling/config.json"),
    ],
)
def test_what_is_not_supported_is_one_line(plain, tmp_path, modules, pooling, named):
    folder = lay_out(plain, tmp_path / "encoder", modules, pooling)
    with pytest.raises(ModelError) as caught:
        load_model(config(folder))
    assert named in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["{", "[1]", '{"a": 1}'])
def test_damaged_lists_of_modules_are_one_line(plain, tmp_path, content):
    shutil.copytree(plain, tmp_path / "encoder")
    (tmp_path / "encoder" / "modules.json").write_text(content)
    with pytest.raises(ModelError, match=r"modules\.json"):
        load_model(config(tmp_path / "encoder"))
