"""Small models of transformers and timm, compressed, and their exported folders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import mlorq
from tests import zoo

WIDTH = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
BERT = {"vocab_size": 24, "max_position_embeddings": 40, **WIDTH}
VIT = {"image_size": 32, "patch_size": 8, "num_labels": 5, **WIDTH}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
T5 = {"vocab_size": 24, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}


def texts(types: bool = True) -> dict[str, torch.Tensor]:
    found = dict(zoo.tokenizer()(zoo.SENTENCES, padding=True, return_tensors="pt"))
    return found if types else {name: found[name] for name in ("input_ids", "attention_mask")}


def pixels() -> dict[str, torch.Tensor]:
    return {"pixel_values": zoo.pixels(4, 1)}


def made(name: str, config: Any, **arguments: Any) -> nn.Module:
    """A model of transformers with random weights."""
    return zoo.randomised(getattr(transformers, name)(config, **arguments), 0)


def shared_bert() -> nn.Module:
    """The queries of both layers have one weight."""
    model = zoo.text_model("bert")
    first, second = (layer.attention.self.query for layer in model.encoder.layer)
    second.weight = first.weight
    return model


@dataclass(frozen=True)
class Case:
    """A float model, a batch, and options of ``mlorq.compress``."""

    make: Callable[[], nn.Module]
    batch: Callable[[], Any]
    options: dict[str, Any] = field(default_factory=dict)

    def compressed(self, folder: Path) -> Path:
        """The checkpoint of the model at 5 bits."""
        torch.manual_seed(0)
        result = mlorq.compress(
            self.make(),
            [self.batch()],
            budget="5bit",
            preset="quick",
            search=zoo.QUICK,
            rounding="nearest",
            device="cpu",
            forward=first_output,
            **self.options,
        )
        result.save(str(folder))
        return folder


def first_output(model: nn.Module, batch: Any) -> torch.Tensor:
    found = model(batch) if isinstance(batch, torch.Tensor) else model(**batch)[0]
    assert isinstance(found, torch.Tensor)
    return found


CASES = {
    "bert": Case(lambda: zoo.text_model("bert"), texts),
    "bert without a pooler": Case(
        lambda: made("BertModel", transformers.BertConfig(**BERT), add_pooling_layer=False), texts
    ),
    "bert with quantized embeddings": Case(
        lambda: zoo.text_model("bert"), texts, {"embeddings": {"bits": 4, "smallest": 100}}
    ),
    "bert with shared weights": Case(shared_bert, texts),
    "roberta-classifier": Case(lambda: zoo.text_model("roberta-classifier"), texts),
    "distilbert-classifier": Case(lambda: zoo.text_model("distilbert-classifier"), lambda: texts(types=False)),
    "classifier in bfloat16": Case(lambda: zoo.text_model("bert-classifier").bfloat16(), texts),
    "tied language model": Case(lambda: made("BertForMaskedLM", transformers.BertConfig(**BERT)), texts),
    "t5 encoder": Case(lambda: made("T5EncoderModel", transformers.T5Config(**T5)), lambda: texts(types=False)),
    "vit": Case(lambda: made("ViTForImageClassification", transformers.ViTConfig(**VIT)), pixels),
    "swin": Case(
        lambda: made("SwinForImageClassification", transformers.SwinConfig(num_labels=5, **SWIN)),
        pixels,
    ),
    "timm vit": Case(lambda: zoo.timm_model(zoo.VIT, zoo.VIT_ARGUMENTS), lambda: zoo.pixels(4, 1)),
    "timm swin": Case(lambda: zoo.timm_model(zoo.SWIN, zoo.SWIN_ARGUMENTS), lambda: zoo.pixels(4, 1)),
    "quantized activations, repq": Case(
        lambda: zoo.text_model("bert-classifier"), texts, {"activations": {"bits": 6, "method": "repq"}}
    ),
    "quantized activations, adalog, timm": Case(
        lambda: zoo.timm_model(zoo.VIT, zoo.VIT_ARGUMENTS),
        lambda: zoo.pixels(4, 1),
        {"activations": {"bits": 6, "method": "adalog"}},
    ),
    "quantized activations, rectified, timm": Case(
        lambda: zoo.timm_model(zoo.VIT, zoo.VIT_ARGUMENTS),
        lambda: zoo.pixels(4, 1),
        {"activations": {"bits": 6, "method": "rectified", "mlp_iterations": 5}},
    ),
}


def arguments_of(batch: Any) -> dict[str, torch.Tensor]:
    """A batch as arguments of a model of transformers."""
    return {"pixel_values": batch} if isinstance(batch, torch.Tensor) else batch


def outputs(model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
    """All tensors that a model returns, by name."""
    with torch.no_grad():
        found = model(batch) if isinstance(batch, torch.Tensor) else model(**batch)
    if isinstance(found, torch.Tensor):
        return {"logits": found}
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}
