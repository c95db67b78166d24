"""Tiny models of every class behind transformers' ``AutoModel``, and inputs that they take.

A configuration is made from the defaults of its class: sizes that have a known name are replaced by small ones, also in
configurations inside it. Inputs are made from the signature of the forward pass.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING

LARGEST = 40_000_000  # parameters of a model that is still tried
TOKENS, VOCABULARY, FIRST_WORD, IMAGE_SIZE = 8, 160, 20, 64
# Names of sizes, and what takes their place. The first match counts.
SIZES: tuple[tuple[str, int], ...] = (
    (r"vocab_size|_vocab_size_|vocabulary_size", VOCABULARY),
    (r"max_.*position|n_positions|max_seq_len|max_.*length", 160),
    (r"(num|n)_.*(heads|head)$|^(n|num)_head$|heads$", 2),
    (r"head_dim|^d_kv$|qk_nope_head_dim|v_head_dim|kv_channels", 16),
    (r"(^|_)layers?$|^depth$|^n_layers?$|num_.*layers|num_.*blocks$", 2),
    (r"intermediate_size|ffn_dim|ffn_hidden|d_ff$|n_inner|mlp_dim|feedforward|feed_forward|hidden_dim$", 64),
    (r"q_lora_rank|kv_lora_rank|lora", 16),
    (r"num_experts_per_tok|top_k|topk", 2),
    (r"n_group$|topk_group", 1),
    (r"expert", 4),
    (r"hidden_size|d_model|d_embed|n_embd|embed_dim|^dim$|^width$|projection_dim|proj_dim|embedding_size|_dim$", 32),
    (r"image_size|img_size|input_resolution", IMAGE_SIZE),
    (r"num_queries|num_proposals", 10),
    (r"state_size|d_state", 8),
)
KEPT = re.compile(r"rotary|rope|pad_|num_labels|drop|_factor|per_block|feat_extract|num_stages|conv_kernel|conv_dim")
SPECIAL = re.compile(r"(_token_id|_token_index|_token)$|^(image|video|audio)_token")


def small_config(kind: type[PreTrainedConfig], only_depth: bool = False) -> PreTrainedConfig:
    """A configuration of few, narrow layers.

    Args:
        kind: its class.
        only_depth: leave widths as they are.

    Raises:
        Exception: the class accepts none of the attempts.
    """
    config = kind()
    changes = _changes(config, only_depth)
    failed: Exception | None = None
    for leave in ((), _lists(config)):
        try:
            return kind(**{name: value for name, value in changes.items() if name not in leave})
        except Exception as error:  # checks of configurations raise anything
            failed = failed or error
    assert failed is not None
    raise failed


def _lists(config: PreTrainedConfig) -> list[str]:
    return [name for name, value in vars(config).items() if isinstance(value, (list, tuple))]


def _changes(config: PreTrainedConfig, only_depth: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    special = 3
    for name, value in vars(config).items():
        if name.startswith("_"):
            continue
        if isinstance(value, PreTrainedConfig):
            found[name] = small_config(type(value), only_depth)
        elif SPECIAL.search(name) and isinstance(value, int) and not isinstance(value, bool):
            special += 1
            found[name] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}.get(name, special)
        elif KEPT.search(name) or isinstance(value, bool):
            continue
        elif isinstance(value, int) and value > 0 and (size := _size(name, only_depth)) is not None:
            found[name] = min(value, size)
        elif isinstance(value, (list, tuple)) and value and all(type(item) is int for item in value):
            size = _size("layer" if name in ("depths", "layers") else name.removesuffix("s"), only_depth)
            size = size if size is not None else _size(name, only_depth)
            if size is not None:
                # Widths of the stages of a hierarchy often have to grow: doubled from stage to stage they do.
                grows = len(set(value)) > 1 and size == 32
                found[name] = [16 * 2**index if grows else min(item, size) for index, item in enumerate(value)]
    return found


def _size(name: str, only_depth: bool) -> int | None:
    for pattern, size in SIZES:
        if re.search(pattern, name):
            return None if only_depth and size not in (2, 4, VOCABULARY) else size
    return None


def build(model_type: str, seed: int = 0) -> tuple[nn.Module, dict[str, Tensor]]:
    """A tiny model of ``AutoModel`` with random weights in eval mode, and a batch of two that it takes.

    Raises:
        ValueError: there is no such configuration, or no such batch; the message has the first error.
    """
    kind, failed = CONFIG_MAPPING[model_type], ""  # the first failure says most
    for only_depth in (False, True):
        try:
            config = small_config(kind, only_depth)
            cls = MODEL_MAPPING[kind]
            cls = cls[0] if isinstance(cls, (list, tuple)) else cls
            with torch.device("meta"):
                count = sum(value.numel() for value in cls(config).parameters())
            if count > LARGEST:
                raise ValueError(f"{count} parameters")
            torch.manual_seed(seed)
            model = cls(config).eval()
        except Exception as error:  # models raise anything at sizes that they do not foresee
            failed = failed or f"{type(error).__name__}: {error}"
            continue
        for batch in batches(model, config, seed):
            with torch.no_grad():
                for _ in range(3):
                    try:
                        model(**batch)
                    except Exception as error:
                        problem = f"{type(error).__name__}: {error}"
                        failed = failed or problem
                        if not _place_images(batch, config, problem):
                            break
                    else:
                        return model, batch
    raise ValueError(" ".join(failed.split())[:300])


def _place_images(batch: dict[str, Tensor], config: PreTrainedConfig, failed: str) -> bool:
    """Put as many image tokens into the texts as the message of a model asks for."""
    wanted = re.search(r"tokens: (\d+).*?features:? (\d+)", failed)
    token = _attribute(config, "image_token_id", _attribute(config, "image_token_index", None))
    if wanted is None or not isinstance(token, int) or "input_ids" not in batch or "pixel_values" not in batch:
        return False
    count = int(wanted[2]) // len(batch["input_ids"])
    words = batch["input_ids"][:, :TOKENS]
    if batch["input_ids"].shape[1] > TOKENS or not count:
        return False
    batch["input_ids"] = torch.cat([words, torch.full((len(words), count), token)], 1)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    return True


def batches(model: nn.Module, config: PreTrainedConfig, seed: int = 0) -> Iterator[dict[str, Tensor]]:
    """Batches that a model may take, those with most inputs first."""
    accepted = inspect.signature(model.forward).parameters
    main = str(model.main_input_name)
    inputs = _inputs(config, torch.Generator().manual_seed(seed))
    offered = {name: values for name, values in inputs.items() if name in accepted}
    without = {name: values for name, values in offered.items() if name != "attention_mask"}
    texts = {name: values for name, values in offered.items() if name in ("input_ids", "attention_mask")}
    for index in range(3):
        choices = [offered, without, {main: inputs[main]} if main in inputs else {}]
        choices += [texts | {name: offered[name]} for name in ("decoder_input_ids", "bbox") if name in offered]
        choices += [texts, *({name: values} for name, values in without.items())]
        for choice in choices:
            if choice and (index == 0 or any(len(values) > index for values in choice.values())):
                yield {name: values[min(index, len(values) - 1)].clone() for name, values in choice.items()}


def _inputs(config: PreTrainedConfig, generator: torch.Generator) -> dict[str, list[Tensor]]:
    """Values of inputs by name: several where shapes differ between models."""

    def floats(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def ids(count: int) -> Tensor:
        last = max(FIRST_WORD + 1, min(VOCABULARY, int(_attribute(config, "vocab_size", VOCABULARY))))
        return torch.randint(FIRST_WORD, last, (2, count), generator=generator)

    size = _attribute(config, "image_size", IMAGE_SIZE)
    high, wide = size if isinstance(size, (list, tuple)) else (size, size)
    channels, mels = int(_attribute(config, "num_channels", 3)), int(_attribute(config, "num_mel_bins", 80))
    frames = int(_attribute(config, "num_frames", 2))
    texts = ids(TOKENS)
    images = [floats(2, channels, high, wide), floats(2, channels, 224, 224), floats(2, frames, channels, high, wide)]
    spectra = int(_attribute(config, "max_length", 64))
    sources = 2 * int(_attribute(config, "max_source_positions", 50))
    return {
        "input_ids": [texts],
        "attention_mask": [torch.ones_like(texts)],
        "pixel_values": images,
        "decoder_input_ids": [ids(6)],
        "input_features": [floats(2, mels, sources), floats(2, 100, mels), floats(2, 100, 160)],
        "input_values": [
            floats(2, 4000),
            floats(2, 1, 4000),
            floats(2, spectra, mels),
        ],
        "bbox": [torch.zeros(2, TOKENS, 4, dtype=torch.long)],
        "past_values": [floats(2, int(_attribute(config, "context_length", 32)), 1)],
    }


def _attribute(config: PreTrainedConfig, name: str, default: Any) -> Any:
    """An attribute of a configuration, or of the first one inside it that has it."""
    value = getattr(config, name, None)
    if value is not None:
        return value
    inside = [child for child in vars(config).values() if isinstance(child, PreTrainedConfig)]
    return next((found for child in inside if (found := _attribute(child, name, None)) is not None), default)
