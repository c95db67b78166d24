"""Source ``synthetic``: images, texts and pairs for models of every family, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from mlorq.config.run import RunConfig
from mlorq.config.sections import model_section, source_section
from mlorq.data import Dataset, load_dataset
from mlorq.data.noise import drawn_tokens, natural_images, random_texts
from mlorq.errors import ConfigError, DataError
from tests import zoo
from tests.nets import TokenNet, float_model

ANY_MODEL = float_model(TokenNet())
VIT = {"family": "timm", "name": "vit_tiny_patch16_224", "checkpoint": "vit.safetensors"}
CUSTOM = {"family": "custom", "factory": "net:build"}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic")
    zoo.save_text_model(folder / "two", "bert-classifier", seed=2)
    zoo.save_text_model(folder / "encoder", "bert", seed=1)
    return folder


def load(model: dict, folder: str = "", run_seed: int = 0, **values) -> Dataset:
    source = source_section()(**{"source": "synthetic", "samples": 5, "batch_size": 3, **values})
    return load_dataset(source, "calibration", ANY_MODEL, model_section()(**model), str(folder), run_seed)


def text_model(name: str) -> dict:
    task = "sentence-similarity" if name == "encoder" else "text-classification"
    return {"family": "transformers", "name": name, "task": task}


def test_amplitudes_of_images_fall_as_one_over_f():
    made = natural_images(16, (1, 64, 64), 0)
    assert made.dtype == torch.uint8
    values = made.double()[:, 0]
    power = torch.fft.fft2(values - values.mean((1, 2), keepdim=True)).abs().square().mean(0)
    along = torch.arange(64)
    frequency = torch.minimum(along, 64 - along).double()
    radius = (frequency[:, None].square() + frequency.square()).sqrt()
    low, high = (power[(radius > a) & (radius < b)].mean() for a, b in ((3, 5), (12, 20)))
    # Frequencies of about 4 and 16: 4 times the amplitude, 16 times the power; white noise has a ratio of 1.
    assert 8 < float(low / high) < 32


def test_images_are_normalised_for_the_model():
    data = load(VIT)
    assert [batch.shape for batch in data.batches] == [(3, 3, 224, 224), (2, 3, 224, 224)]
    pixels = torch.cat(list(data.batches)) * 0.5 + 0.5  # mean and std of this model are 0.5
    assert float((pixels * 255 - (pixels * 255).round()).abs().max()) < 1e-3
    assert pixels.min() >= -1e-6
    assert pixels.max() <= 1 + 1e-6
    red, green = pixels[:, 0].flatten(), pixels[:, 1].flatten()
    assert float(torch.corrcoef(torch.stack([red, green]))[0, 1]) > 0.8


def test_images_of_a_custom_model_have_the_given_shape_and_values():
    data = load(CUSTOM, shape=[1, 8, 6], pixels=[-1, 1])
    assert data.batches[0].shape == (3, 1, 8, 6)
    values = torch.cat(list(data.batches))
    assert -1 <= float(values.min()) < -0.3
    assert 0.1 < float(values.max()) <= 1


def test_seeds_decide():
    shape = {"shape": [1, 4, 4]}
    key = load(CUSTOM, run_seed=1, **shape).key
    assert load(CUSTOM, run_seed=1, **shape).key == key
    assert load(CUSTOM, run_seed=2, **shape).key != key
    assert load(CUSTOM, run_seed=2, seed=1, **shape).key == key


def test_texts_are_tokens_of_the_vocabulary_with_the_tokenizers_special_ones(texts):
    data = load(text_model("encoder"), texts, samples=8, max_length=12)
    assert data.samples == 8
    tokens = zoo.tokenizer()
    known = {*drawn_tokens(tokens), *tokens.all_special_ids}
    for batch in data.batches:
        assert batch["input_ids"].shape[1] <= 12
        assert set(batch["input_ids"][:, 0].tolist()) == {tokens.cls_token_id}
        assert (batch["input_ids"] == tokens.sep_token_id).sum(1).eq(1).all()
        assert set(batch["input_ids"].flatten().tolist()) <= known
    again = load(text_model("encoder"), texts, samples=8, max_length=12)
    assert again.key == data.key


def test_pairs_have_two_segments(texts):
    data = load(text_model("two"), texts, pairs=True)
    for batch in data.batches:
        assert batch["token_type_ids"].amax(1).eq(1).all()
        assert (batch["input_ids"] == zoo.tokenizer().sep_token_id).sum(1).eq(2).all()
    assert load(text_model("two"), texts).batches[0]["token_type_ids"].max() == 0


def test_lengths_of_texts_vary_and_none_is_too_long():
    tokens = zoo.tokenizer()
    lengths = [len(tokens(text)["input_ids"]) for text in random_texts(tokens, 50, 20, 0)]
    assert len(set(lengths)) > 5
    assert max(lengths) <= 20


def refusal(model: dict, folder: str = "", **values) -> str:
    with pytest.raises(DataError) as caught:
        load(model, folder, **values)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_refused(texts):
    assert "give shape: [channels, height, width]" in refusal(CUSTOM)
    assert "leave shape out" in refusal(VIT, shape=[3, 8, 8])
    assert "leave pairs out" in refusal(VIT, pairs=True)
    assert "pairs is for classifiers of two texts" in refusal(text_model("encoder"), texts, pairs=True)
    for values, message in (
        ({"samples": None}, "source synthetic needs samples"),
        ({"shape": [8, 8]}, "must be .channels, height, width."),
        ({"shape": [1, 8, 8], "pixels": [1, 0]}, "must be .value of black, value of white."),
        ({"pixels": [0, 1]}, "pixels needs shape"),
    ):
        with pytest.raises(ValidationError, match=message):
            source_section()(**{"source": "synthetic", "samples": 4, **values})
    made = {"source": "synthetic", "samples": 4}
    with pytest.raises(ConfigError, match="source synthetic is for calibration"):
        RunConfig.from_mapping({"model": VIT, "data": {"calibration": made, "evaluation": made}})
