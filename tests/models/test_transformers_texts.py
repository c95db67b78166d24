"""Tokenizers that lack something: an error that names it, or batches that the model takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from mlorq.errors import ModelError
from mlorq.models.transformers import CLASSES, TransformersSettings, tokenizer
from tests import zoo

CONFIGS = {
    "bert": transformers.BertConfig,
    "roberta": transformers.RobertaConfig,
    "xlm-roberta": transformers.XLMRobertaConfig,
    "gpt2": transformers.GPT2Config,
    "llama": transformers.LlamaConfig,
}


def load(folder: Path):
    return tokenizer(TransformersSettings(name=str(folder), task=CLASSES))


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_folder_without_a_tokenizer_is_refused(tmp_path, kind):
    CONFIGS[kind]().save_pretrained(tmp_path)
    assert "tokenizer" in refusal(tmp_path)


def test_the_missing_vocabulary_is_named(tmp_path):
    transformers.BertConfig().save_pretrained(tmp_path)
    zoo.tokenizer().save_pretrained(tmp_path)
    assert load(tmp_path)("the dog")["input_ids"]
    (tmp_path / "tokenizer.json").unlink()  # the settings of the tokenizer stay
    assert "tokenizer.json or vocab.txt is missing" in refusal(tmp_path)


def plain_tokenizer(words: list[str]) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of whole words without special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    found = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=words[0]))
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=found)


def test_the_padding_token_is_that_of_the_models_configuration(tmp_path):
    plain_tokenizer(["unknown", "a", "dog", "nothing"]).save_pretrained(tmp_path)
    transformers.BertConfig(pad_token_id=3).save_pretrained(tmp_path)
    found = load(tmp_path)
    rows = found(["a", "a dog a"], padding=True)
    assert rows["input_ids"] == [[1, 3, 3], [1, 2, 1]]
    assert rows["attention_mask"] == [[1, 0, 0], [1, 1, 1]]


@pytest.mark.parametrize("number", [None, 4])
def test_without_a_padding_token_the_setting_is_named(tmp_path, number):
    plain_tokenizer(["unknown", "a", "dog", "nothing"]).save_pretrained(tmp_path)
    transformers.BertConfig(pad_token_id=number).save_pretrained(tmp_path)
    assert "pad_token" in refusal(tmp_path)


@pytest.mark.parametrize("kind", ["bert-classifier", "roberta"])
def test_texts_are_cut_at_the_models_positions(tmp_path, kind):
    if kind == "roberta":
        sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
        config = transformers.RobertaConfig(vocab_size=64, max_position_embeddings=20, **sizes)
        model = transformers.RobertaForSequenceClassification(config)
        model.save_pretrained(tmp_path)
    else:
        zoo.save_text_model(tmp_path, kind, seed=0)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    transformers.BertTokenizerFast(vocab=zoo.tokenizer().get_vocab()).save_pretrained(tmp_path)
    found = load(tmp_path)
    rows = found(["the dog runs " * 200], truncation=True, max_length=found.model_max_length, return_tensors="pt")
    positions = model.config.max_position_embeddings
    assert rows["input_ids"].shape[1] == positions - (model.config.pad_token_id + 1 if kind == "roberta" else 0)
    with torch.no_grad():
        assert model(**{k: v for k, v in rows.items() if k != "token_type_ids"}).logits.isfinite().all()
