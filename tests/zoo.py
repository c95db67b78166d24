"""Tiny models of every family with random weights, small data for them, and a run over both without Prefect."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from mlorq.artifacts.store import Store
from mlorq.config.run import RunConfig
from steps.inprocess import InProcess
from steps.pipeline import result_json, run_pipeline
from steps.session import Session

VIT = "vit_tiny_patch16_224"
VIT_ARGUMENTS = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 7}
DEIT = "deit_tiny_distilled_patch16_224"
SWIN = "swin_tiny_patch4_window7_224"
SWIN_ARGUMENTS = {
    "img_size": 32,
    "window_size": 4,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "num_classes": 5,
}

WORDS = ["the", "a", "dog", "cat", "bird", "runs", "sleeps", "sings", "fast", "slow", "red", "big", "on", "mat", "##s"]
SENTENCES = [
    "the dog runs",
    "a cat sleeps on the big red mat",
    "the bird sings",
    "a big dog sleeps",
    "cats run slow",
    "the red bird sings fast on a mat",
    "dogs",
    "a slow cat runs on the mat",
]

QUICK = {"samples": 8, "points": 2, "hessian_samples": 4, "hessian_probes": 8, "factor_bits": [4]}
# Few candidates and few probes, for runs that show that all goes together, not how well.
FAST = {
    "samples": 2,
    "points": 2,
    "forms": ["Q"],
    "bits": [4, 8],
    "percentiles": [1.0],
    "hessian_samples": 2,
    "hessian_probes": 2,
    "hessian_min_probes": 2,
    "hessian_mode": "probes",
    "sensitivity": "closed_form",
}
# Every form.
WHOLE_SEARCH = {"samples": 8, "points": 3, "hessian_samples": 8, "hessian_probes": 8}


def randomised(module: nn.Module, seed: int) -> nn.Module:
    """All parameters drawn anew, also those that are initialised to constants: nothing can hide behind a zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in module.named_parameters():
        drawn = torch.randn(value.shape, generator=generator)
        spread = value.shape[-1] ** -0.5 if value.dim() > 1 else 0.1
        value.data = drawn * spread + (1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0)
    return module.eval()


def timm_model(name: str, arguments: dict[str, Any], seed: int = 0) -> nn.Module:
    return randomised(timm.create_model(name, **copy.deepcopy(arguments)), seed)


def pixels(samples: int, seed: int, size: int = 32) -> Tensor:
    return torch.randn(samples, 3, size, size, generator=torch.Generator().manual_seed(seed))


def save_image(path: Path, seed: int, size: int = 32) -> None:
    """A PNG file of smooth random colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC).save(path)


def tokenizer(lower: bool = True) -> Any:
    from transformers import BertTokenizerFast

    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    return BertTokenizerFast(vocab={word: index for index, word in enumerate(vocab)}, do_lower_case=lower)


def text_model(kind: str, seed: int = 0, **settings: Any) -> nn.Module:
    """``bert``, ``mpnet``, ``bert-classifier``, ``distilbert-classifier`` or ``roberta-classifier``."""
    import transformers

    width = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    if kind.startswith("distilbert"):
        width = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48}
    names = {
        "bert": ("BertConfig", "BertModel"),
        "mpnet": ("MPNetConfig", "MPNetModel"),
        "bert-classifier": ("BertConfig", "BertForSequenceClassification"),
        "distilbert-classifier": ("DistilBertConfig", "DistilBertForSequenceClassification"),
        "roberta-classifier": ("RobertaConfig", "RobertaForSequenceClassification"),
    }[kind]
    if kind.startswith("roberta"):
        settings = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "type_vocab_size": 2, **settings}
    config = getattr(transformers, names[0])(vocab_size=24, max_position_embeddings=40, **width, **settings)
    return randomised(getattr(transformers, names[1])(config), seed)


def save_text_model(folder: Path, kind: str, seed: int = 0, **settings: Any) -> nn.Module:
    """A model's folder: configuration, weights, tokenizer."""
    module = text_model(kind, seed, **settings)
    module.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return module


def run(folder: Path, values: dict[str, Any]) -> dict[str, Any]:
    """The result object of one run of every step in this process, on one CPU thread."""
    values = {
        "budget": "5bit",
        "preset": "quick",
        "search": QUICK,
        "rounding": {"method": "nearest"},
        "engine": {"devices": "cpu", "threads": 1},
        **values,
    }
    config = RunConfig.from_mapping(values, str(folder))
    session = Session(config, Store(config.resolve(config.store)))
    (result,) = run_pipeline(session, InProcess(session), config.budgets)
    return result_json(session, result)
