"""Tiny models whose tokens go to experts, and their inputs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SPARSE = {**SIZES, "num_key_value_heads": 1, "num_experts_per_tok": 2, "max_position_embeddings": 32}
CONFIGS: dict[str, dict[str, Any]] = {
    "Mixtral": {**SPARSE, "intermediate_size": 24, "num_local_experts": 4},
    "Qwen3Moe": {**SPARSE, "head_dim": 8, "moe_intermediate_size": 24, "num_experts": 4, "intermediate_size": 24},
    "GptOss": {**SPARSE, "head_dim": 8, "intermediate_size": 24, "num_local_experts": 4},
    "SwitchTransformers": {
        "vocab_size": 40,
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 24,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_heads": 2,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
        "num_experts": 4,
        "pad_token_id": 0,
        "decoder_start_token_id": 0,
        "tie_word_embeddings": False,
    },
}
STACKED = ("Mixtral", "Qwen3Moe", "GptOss")  # all experts' matrices in one parameter


def library_model(kind: str) -> nn.Module:
    """A class of transformers with random weights, and with the implementation of experts that it has by default."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(**CONFIGS[kind], use_cache=False)
    torch.manual_seed(0)
    name = f"{kind}ForConditionalGeneration" if kind == "SwitchTransformers" else f"{kind}ForCausalLM"
    module: nn.Module = getattr(transformers, name)(config)
    for value in module.parameters():
        value.data.normal_(std=value.shape[-1] ** -0.5 if value.dim() > 1 else 0.1)
    return module.eval()


def texts(kind: str, samples: int = 2, length: int = 10, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 40, (samples, length), generator=generator)
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if kind == "SwitchTransformers":
        batch["decoder_input_ids"] = torch.randint(1, 40, (samples, 6), generator=generator)
    return batch


class Experts(nn.Module):
    """Experts that multiply with one matrix of a parameter each; a token's first number chooses its expert."""

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.up = nn.Parameter(torch.randn(count, 6, 4))
        self.down = nn.Parameter(torch.randn(count, 6, 4))  # (experts, in_features, out_features)

    def chosen(self, tokens: Tensor) -> Tensor:
        return (tokens[:, 0].abs() * 2).long().clamp(max=len(self.up) - 1)

    def forward(self, x: Tensor) -> Tensor:
        tokens, chosen = self.first(x).flatten(0, 1), self.chosen(x.flatten(0, 1))
        out = torch.zeros_like(tokens)
        for expert in chosen.unique():
            (rows,) = torch.where(chosen == expert)
            hidden = torch.tanh(F.linear(tokens[rows], self.up[expert]))
            out = out.index_add(0, rows, hidden @ self.down[expert])
        return self.head(torch.tanh(out).unflatten(0, x.shape[:2]).mean(1))


def tokens_of(*chosen: list[int], seed: int = 1) -> Tensor:
    """Samples whose tokens go to these experts of ``Experts``, ``(samples, tokens, 4)``."""
    x = torch.randn(len(chosen), len(chosen[0]), 4, generator=torch.Generator().manual_seed(seed))
    x[..., 0] = (torch.tensor(chosen) + 0.5) / 2
    return x
