"""Tiny models of every class behind transformers' ``AutoModel``, and inputs that they take.

A configuration is made from the defaults of its class: sizes that have a known name are replaced by small ones, also in
configurations inside it. Sizes that do not fit each other are left as they are, one kind after another, until the model
runs. Inputs (``benchmarks/tiny_inputs.py``) are made from the signature of the forward pass.
"""

from __future__ import annotations

import re
import time
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from benchmarks.tiny_inputs import IMAGE_SIZE, VOCABULARY, Packed, batches, place_images
from mlorq.models.output_tensors import output_tensor

LARGEST = 100_000_000  # parameters of a model that is still tried
LONGEST = 30.0  # seconds of CPU time for all attempts of one model
STAGES = 6  # of a hierarchy, at most
DEEPEST = 8  # layers of a model that has several kinds of them
LEAST = 1e-3  # standard deviation of random weights; some classes have zeros in their place
# Names of sizes, and what takes their place. The first match counts.
SIZES: tuple[tuple[str, int], ...] = (
    (r"vocab_size|_vocab_size_|vocabulary_size", VOCABULARY),
    (r"max_.*position|n_positions|max_seq_len|max_.*length", 160),
    (r"(num|n)_.*(heads|head)$|^(n|num)_head$|heads$", 2),
    (r"head_dim|^d_kv$|kv_channels|^rotary_dim$", 16),
    (r"first_k_dense_replace", 1),
    (r"(^|_)layers?$|^depth$|^n_layers?$|num_.*layers|num_.*blocks$|^depths$", 2),
    (r"intermediate_size|ffn_dim|ffn_hidden|d_ff$|n_inner|mlp_dim|feedforward|feed_forward|hidden_dim$", 64),
    (r"q_lora_rank|kv_lora_rank|lora", 16),
    (r"n_group$|topk_group", 1),
    (r"(^|_)n_?groups$", 2),
    (r"index_topk", 16),
    (r"num_experts_per_tok|top_k|topk", 2),
    (r"expert", 4),
    (
        r"hidden_size|d_model|d_latents|d_embed|n_embd|^dim$|^width$|embedding_size|_dim$",
        32,
    ),
    (r"upsample_groups", 32),
    (r"image_size|img_size|input_resolution", IMAGE_SIZE),
    (r"num_queries|num_proposals", 10),
    (r"state_size|d_state", 8),
)
DEPTH = next(pattern for pattern, _ in SIZES if "depth$" in pattern)
KEPT = re.compile(
    r"rotary_(?!dim$)|rope_(?!head_dim$)|pad_|num_labels|drop|_factor|per_block|feat_extract|num_stages|conv_kernel"
    r"|conv_dim|(^|_)in(put)?_dim$"
)
SPECIAL = re.compile(r"(_token_id|_token_index|_token)$|^(image|video|audio)_token")
# Values of attributes that have none by default, where a model needs one.
MISSING: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "prediction_length": 4,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "image_token_id": 4,
    "image_token_index": 4,
    "vocabulary_map": {"<image>": 4},
}
MISSING_WIDTHS = {"head_dim": 16, "num_key_value_heads": 2}
LISTS = "lists of sizes"
ORIGIN = ("model_type", "transformers_version", "architectures", "_name_or_path", "dtype", "torch_dtype")
SMALL_BACKBONE = "resnet10t"  # of timm, in place of ResNet-50


def small_config(config: PreTrainedConfig, only_depth: bool = False, leave: str | None = None) -> PreTrainedConfig:
    """A configuration of few, narrow layers.

    Args:
        config: the defaults of its class, or what a configuration around it sets.
        only_depth: leave widths as they are.
        leave: pattern of ``SIZES`` whose sizes stay as they are; or ``LISTS``.

    Raises:
        Exception: the class accepts none of the attempts.
    """
    changes = _changes(config, only_depth, leave)
    given = _given(config)
    failed: Exception | None = None
    for left in ((), _lists(config)):
        try:
            return type(config)(**given | {name: value for name, value in changes.items() if name not in left})
        except Exception as error:  # checks of configurations raise anything
            failed = failed or error
    assert failed is not None
    raise failed


def _given(config: PreTrainedConfig) -> dict[str, Any]:
    """What differs from the defaults of the class: a configuration around it has set it."""
    default = vars(type(config)())
    features = getattr(config, "_out_features", None)  # of a backbone: behind a property
    return ({"out_features": list(features)} if features else {}) | {
        name: value
        for name, value in vars(config).items()
        if not name.startswith("_")
        and name not in ORIGIN
        and not isinstance(value, PreTrainedConfig)
        and (name not in default or default[name] != value)
    }


def _lists(config: PreTrainedConfig) -> list[str]:
    return [name for name, value in vars(config).items() if isinstance(value, (list, tuple))]


def _changes(config: PreTrainedConfig, only_depth: bool, leave: str | None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    special = 3
    depth, layers = _depth(config, leave)
    for name, value in vars(config).items():
        if name.startswith("_"):
            continue
        if isinstance(value, PreTrainedConfig):
            found[name] = small_config(value, only_depth, leave)
        elif name == "rope_parameters" and value == {}:
            found[name] = {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in config.layer_types}
        elif value is None and name == "layer_types":
            found[name] = ["full_attention"] * depth
        elif value is None and name == "pad_token_id" and getattr(config, "vocab_size", 0) is None:
            found[name] = 0
        elif value is None and name in MISSING:
            found[name] = MISSING[name]
        elif value is None and name in MISSING_WIDTHS and not only_depth and leave is None:
            found[name] = MISSING_WIDTHS[name]
        elif name == "use_cache":
            found[name] = False
        elif name in ("backbone", "architecture") and value == "resnet50":
            found[name] = SMALL_BACKBONE
        elif re.fullmatch(r"init\w*_(range|std)", name) and isinstance(value, float):
            found[name] = max(value, 20 * LEAST)
        elif SPECIAL.search(name) and isinstance(value, int) and not isinstance(value, bool):
            special += 1
            found[name] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}.get(name, special)
        elif _of_layers(value, layers) and layers > depth:
            found[name] = value[:depth]
        elif KEPT.search(name) or isinstance(value, bool):
            continue
        elif isinstance(value, int) and value > 0 and (size := _size(name, only_depth, leave)) is not None:
            found[name] = min(value, depth if re.search(DEPTH, name) and value == layers else size)
        elif leave != LISTS and isinstance(value, (list, tuple)) and value and all(type(item) is int for item in value):
            size = _size(name.removesuffix("s"), only_depth, leave)
            size = size if size is not None else _size(name, only_depth, leave)
            if size is not None:
                # Widths of the stages of a hierarchy often have to grow: doubled from stage to stage they do.
                grows = len(set(value)) > 1 and size == 32
                found[name] = [16 * 2**index if grows else min(item, size) for index, item in enumerate(value)]
    if isinstance(expand := getattr(config, "expand", None), int) and {"num_heads", "head_dim"} <= set(found):
        found["num_heads"] = expand * found.get("hidden_size", 0) // found["head_dim"] or found["num_heads"]
    return found | _sections(config, found)


def _depth(config: PreTrainedConfig, leave: str | None) -> tuple[int, int]:
    """Number of layers that a small model has, and that of its configuration: each kind of layer is in it."""
    layers = getattr(config, "num_hidden_layers", None)
    if not isinstance(layers, int) or leave == DEPTH:
        return 2, 2
    depth = 2
    for value in vars(config).values():
        if _of_layers(value, layers) and isinstance(value[0], str):
            depth = max(depth, *(value.index(kind) + 1 for kind in set(value)))
    return min(depth, DEEPEST), layers


def _of_layers(value: Any, layers: int) -> bool:
    """Whether a value has an item for each layer; short lists of numbers have one for each stage of a hierarchy."""
    return (
        isinstance(value, (list, tuple))
        and len(value) == layers > 0
        and (layers > STAGES or not isinstance(value[0], int) or isinstance(value[0], bool))
    )


def _sections(config: PreTrainedConfig, changed: dict[str, Any]) -> dict[str, Any]:
    """Sections of rotary embeddings (time, height, width): as many as half a head has."""
    found: dict[str, Any] = {}
    for name in ("rope_parameters", "rope_scaling"):
        rope, values = vars(config).get(name), vars(config) | changed
        heads, width = values.get("num_attention_heads"), values.get("hidden_size")
        if (
            not isinstance(rope, dict)
            or "rope_theta" not in rope
            or not (isinstance(heads, int) and isinstance(width, int))
        ):
            continue
        if any(isinstance(value, dict) for value in rope.values()):  # of each kind of layer
            continue
        half = int((values.get("head_dim") or width // heads) * rope.get("partial_rotary_factor", 1.0)) // 2
        count = len(rope.get("mrope_section") or "thw")
        sections = [half // count] * count
        sections[0] += half - sum(sections)
        found[name] = rope | {"mrope_section": sections}
    return found


def _size(name: str, only_depth: bool, leave: str | None) -> int | None:
    for pattern, size in SIZES:
        if re.search(pattern, name):
            return None if pattern == leave or (only_depth and size not in (2, 4, VOCABULARY)) else size
    return None


def build(model_type: str, seed: int = 0) -> tuple[nn.Module, dict[str, Tensor]]:
    """A tiny model of ``AutoModel`` with random weights in eval mode, and a batch of two that it takes.

    A batch of one, if the model joins all images of a batch to one sequence.

    Raises:
        ValueError: there is no such configuration, or no such batch; the message has the first error.
    """
    kind, failed = CONFIG_MAPPING[model_type], ""  # the first failure says most
    started = time.process_time()
    attempts: list[tuple[bool, str | None]] = [(False, None), (True, None), (False, LISTS)]
    attempts += [(False, pattern) for pattern, _ in SIZES]
    for only_depth, leave in attempts:
        if time.process_time() - started > LONGEST:
            break
        try:
            config = small_config(kind(), only_depth, leave)
            model = _model(config, seed)
        except Exception as error:  # models raise anything at sizes that they do not foresee
            failed = failed or f"{type(error).__name__}: {error}"
            continue
        for batch in batches(model, config, seed):
            whole = Packed(model) if Packed.needed(batch) else model
            with torch.no_grad():
                for _ in range(3):
                    try:
                        returned = whole(**batch)
                    except Exception as error:
                        problem = f"{type(error).__name__}: {error}"
                        failed = failed or problem
                        if not place_images(batch, config, problem):
                            break
                    else:
                        if output_tensor(returned, 2).shape[0] == 1:  # all images are one sequence
                            return whole, {name: value[:1] for name, value in batch.items()}
                        return whole, batch
    raise ValueError(" ".join(failed.split())[:300])


def _model(config: PreTrainedConfig, seed: int) -> nn.Module:
    cls = MODEL_MAPPING[type(config)]
    cls = cls[0] if isinstance(cls, (list, tuple)) else cls
    inside = (one for one in vars(config).values() if isinstance(one, cls.config_class))
    config = config if isinstance(config, cls.config_class) else next(inside, config)
    with torch.device("meta"):
        count = sum(value.numel() for value in cls(config).parameters())
    if count > LARGEST:
        raise ValueError(f"{count} parameters")
    torch.manual_seed(seed)
    model: nn.Module = cls(config).eval()
    return model
