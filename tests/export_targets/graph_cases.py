"""Models of every family for tests of exported graphs, and comparisons of their outputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests import zoo
from tests.compressed import folder_of, trellis

EXACT = 1e-5  # of the largest output
NMSE = 0.05  # that ``fast`` may add in networks with random weights


def text_batch(samples: int, tokens: int, *names: str, seed: int = 0) -> dict[str, Tensor]:
    """Random tokens; the second sample is padded."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 20, (samples, tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[1:2, tokens // 2 :] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    return {name: batch[name] for name in names or batch}


def text_architecture(module: nn.Module, task: str) -> dict[str, Any]:
    from mlorq.models.transformers_modules import describe

    found = describe(module)
    assert found is not None
    return {**found, "task": task}


def timm_case(name: str, arguments: dict[str, Any], size: int = 32) -> tuple[nn.Module, dict[str, Any], Any]:
    architecture = {"family": "timm", "name": name, "arguments": arguments}
    return zoo.timm_model(name, arguments), architecture, zoo.pixels(5, 3, size)


def text_case(kind: str, task: str, *names: str) -> tuple[nn.Module, dict[str, Any], Any]:
    module = zoo.text_model(kind)
    return module, text_architecture(module, task), text_batch(5, 23, *names)


def trellis_folder(folder: Path) -> Path:
    """A checkpoint of some size, of a ViT with trellis codes of 3 bits and no large float tensor."""
    from mlorq.forms.base import Candidate
    from mlorq.forms.modules import replace_layers
    from mlorq.forms.stored_layer import CompressedLayer

    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 512, "depth": 3, "num_heads": 4, "num_classes": 10}
    module = zoo.timm_model(zoo.VIT, arguments)
    layers = {}
    for index, (name, child) in enumerate(module.named_modules()):
        if isinstance(child, nn.Linear) and child.out_features > 12:
            matrix = trellis(child.out_features, child.in_features, 3, index)
            layers[name] = CompressedLayer(name, Candidate("TCQ", bits=3), {"weight": matrix})
    replace_layers(module, layers)
    return folder_of(folder, module, {"family": "timm", "name": zoo.VIT, "arguments": arguments})


CONVNEXT = {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32], "num_classes": 5}
NO_TYPES = ("input_ids", "attention_mask")
CASES: dict[str, Callable[[], tuple[nn.Module, dict[str, Any], Any]]] = {
    "vit": lambda: timm_case(zoo.VIT, zoo.VIT_ARGUMENTS),
    "deit": lambda: timm_case(zoo.DEIT, zoo.VIT_ARGUMENTS),
    "swin": lambda: timm_case(zoo.SWIN, zoo.SWIN_ARGUMENTS),
    "convnext": lambda: timm_case("convnext_atto", CONVNEXT, 224),
    "bert": lambda: text_case("bert", "sentence-similarity"),
    "bert-classifier": lambda: text_case("bert-classifier", "text-classification"),
    "roberta-classifier": lambda: text_case("roberta-classifier", "text-classification"),
    "distilbert-classifier": lambda: text_case("distilbert-classifier", "text-classification", *NO_TYPES),
    "mpnet": lambda: text_case("mpnet", "sentence-similarity", *NO_TYPES),
}


def call(model: Any, batch: Any) -> Any:
    with torch.no_grad():
        return model(**batch) if isinstance(batch, dict) else model(batch)


def tensors_of(output: Any) -> dict[str, Tensor]:
    return {"": output} if isinstance(output, Tensor) else dict(output)


def assert_close(found: Any, expected: Any, tolerance: float = EXACT) -> None:
    left, right = tensors_of(found), tensors_of(expected)
    assert left.keys() == right.keys()
    for name, value in right.items():
        assert left[name].shape == value.shape
        assert float((left[name] - value).abs().max() / value.abs().max()) < tolerance, name


def nmse(found: Any, expected: Any) -> float:
    left, right = tensors_of(found), tensors_of(expected)
    return max(float((left[name] - value).square().sum() / value.square().sum()) for name, value in right.items())
