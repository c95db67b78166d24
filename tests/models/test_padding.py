"""Padding is no data: more of it in a batch changes no statistic, whatever stands in its places."""

from __future__ import annotations

import inspect

import pytest
import torch

from mlorq.calibration.collect import capture
from mlorq.calibration.covariance import OuterProducts
from mlorq.calibration.label_free_hessian import label_free_hessian
from mlorq.calibration.token_importance import token_importance
from mlorq.config.sections import model_section
from mlorq.models import FloatModel, load_model
from mlorq.models.layers import find_layers
from tests import zoo

ModelConfig = model_section()

KINDS = [
    ("bert", "sentence-similarity", {}),
    ("mpnet", "sentence-similarity", {}),
    ("bert-classifier", "text-classification", {"num_labels": 3}),
    ("distilbert-classifier", "text-classification", {}),
    ("roberta-classifier", "text-classification", {"num_labels": 1}),
]


@pytest.fixture(params=KINDS, ids=[kind for kind, _, _ in KINDS])
def model(request, tmp_path) -> FloatModel:
    kind, task, settings = request.param
    zoo.save_text_model(tmp_path / "model", kind, seed=7, **settings)
    return load_model(ModelConfig(family="transformers", name="model", task=task), str(tmp_path))


def batches(model: FloatModel, extra: int = 0, noise: int | None = None) -> list[dict[str, torch.Tensor]]:
    """Two batches of sentences, with ``extra`` places of padding after the longest one."""
    tokens = zoo.tokenizer()
    known = inspect.signature(model.module.forward).parameters
    found = []
    for part in (zoo.SENTENCES[:5], zoo.SENTENCES[5:]):
        length = max(len(ids) for ids in tokens(part)["input_ids"]) + extra
        batch = dict(tokens(part, padding="max_length", max_length=length, return_tensors="pt"))
        if noise is not None:
            batch["input_ids"] = torch.where(batch["attention_mask"] == 1, batch["input_ids"], noise)
        found.append({name: value for name, value in batch.items() if name in known})
    return found


def variants(model: FloatModel) -> list[list[dict[str, torch.Tensor]]]:
    found = [batches(model, 1), batches(model, 9)]
    # RoBERTa and MPNet find positions by looking for the padding token: another one there is another text.
    if model.module.config.model_type not in ("roberta", "mpnet"):
        found.append(batches(model, 3, noise=9))
    return found


def test_second_moments_and_outputs(model):
    plain = batches(model)
    layers = find_layers(model, plain[0]).layers
    wanted = capture(model, layers, plain, moments=True)
    for padded in variants(model):
        found = capture(model, layers, padded, moments=True)
        torch.testing.assert_close(found.reference, wanted.reference, atol=2e-6, rtol=1e-5)
        for name, products in found.inputs.items():
            assert products.counts == wanted.inputs[name].counts, name
            torch.testing.assert_close(products.means(), wanted.inputs[name].means(), rtol=1e-4, atol=1e-5)


def test_the_hessian_and_second_moments_of_gradients(model):
    plain = batches(model)
    layers = find_layers(model, plain[0]).layers

    def measured(data: list) -> tuple[dict, dict]:
        gradients = {layer.name: OuterProducts(layer.out_features, "cpu") for layer in layers}
        return label_free_hessian(model, layers, data, mode="exact", gradients=gradients), gradients

    wanted, wanted_gradients = measured(plain)
    for padded in variants(model):
        found, gradients = measured(padded)
        for name, value in wanted.items():
            assert (found[name] - value).abs().max() <= 1e-4 * float(value.max()), name
            assert gradients[name].counts == wanted_gradients[name].counts, name
            scale = float(wanted_gradients[name].means().abs().max())
            assert (gradients[name].means() - wanted_gradients[name].means()).abs().max() <= 1e-4 * scale, name


def test_weights_of_tokens(model):
    plain = batches(model)
    layers, blocks = find_layers(model, plain[0]).layers, model.blocks
    wanted = token_importance(model, layers, blocks, plain, seed=3)
    compared = 0
    for padded in variants(model):
        found = token_importance(model, layers, blocks, padded, seed=3)
        for before, after, batch, other in zip(wanted, found, plain, padded, strict=True):
            assert list(before) == list(after)
            mask, longer = batch["attention_mask"] == 1, other["attention_mask"] == 1
            for name, value in before.items():
                if value.shape == mask.shape:
                    torch.testing.assert_close(after[name][longer], value[mask], rtol=2e-3, atol=1e-4)
                    compared += 1
                else:
                    torch.testing.assert_close(after[name], value, rtol=2e-3, atol=1e-4)
    assert compared >= 20


def test_weighted_second_moments(model):
    plain = batches(model)
    layers, blocks = find_layers(model, plain[0]).layers, model.blocks

    def weighted(data: list) -> dict[str, OuterProducts]:
        importance = token_importance(model, layers, blocks, data, seed=3)
        return capture(model, layers, data, moments=True, importance=importance).inputs

    wanted = weighted(plain)
    for padded in variants(model):
        for name, products in weighted(padded).items():
            scale = float(wanted[name].means().abs().max())
            assert (products.means() - wanted[name].means()).abs().max() <= 1e-3 * scale, name


def test_segments_that_are_not_given_are_the_first(model):
    """RoBERTa's and DistilBERT's tokenizers give no ``token_type_ids``; without them BERT takes zeros."""
    plain = batches(model)
    bare = [{name: value for name, value in batch.items() if name != "token_type_ids"} for batch in plain]
    with torch.no_grad():
        for one, other in zip(plain, bare, strict=True):
            assert torch.equal(model.outputs(model.module, one), model.outputs(model.module, other))
    assert ("token_type_ids" in plain[0]) == (model.module.config.model_type in ("bert", "roberta"))
