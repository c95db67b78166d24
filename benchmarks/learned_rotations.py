"""What learned and dense transforms of a token would gain over the fixed one of ``activations.ranges: token``.

    .venv/bin/python benchmarks/learned_rotations.py benchmarks/real/vit_tiny.yaml --bits 3 --blocks 2 6

The relative error of single layers' outputs, weighted by ``G = E[g gᵀ]`` of the gradients of ``v · f`` (METHOD 7), on
tokens that were not used for the fit: with the rotation alone; with gains (METHOD 8); with gains and an orthogonal
matrix that are trained; and with the best invertible matrix, ``TᵀT = Σ^-½ (Σ^½ H Σ^½)^½ Σ^-½``, ``H = Wᵀ G W``, which
makes ``tr(T Σ Tᵀ) tr(H (TᵀT)⁻¹)`` least.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from mlorq.activations.quantizers import fit_tokens
from mlorq.activations.quantizers.base import round_through
from mlorq.artifacts.store import Store
from mlorq.codecs.rotation import rotate
from mlorq.config.run import RunConfig
from mlorq.costs.measured import spread_batches
from mlorq.models.batches import move_batch
from steps.session import Session

KINDS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
HELD_OUT = 4  # one token in so many
RIDGE = 1e-3
SHARES = (1.0, 0.9, 0.8, 0.7)


def main() -> None:
    """Print a table, as Markdown."""
    parser = argparse.ArgumentParser()
    parser.add_argument("config")
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 6])
    parser.add_argument("--samples", type=int, default=128, help="of the calibration data")
    parser.add_argument("--steps", type=int, default=300, help="of Adam")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    config = RunConfig.from_yaml(arguments.config, dict(item.split("=", 1) for item in arguments.set))
    session = Session(config, Store(config.resolve(config.store)))
    print("| layer | rotation | with gains | learned | best matrix |\n|---|---|---|---|---|", flush=True)
    for name in (f"blocks.{block}.{kind}" for block in arguments.blocks for kind in KINDS):
        tokens, gradients = observed(session, name, arguments.samples)
        weight = session.model.module.get_submodule(name).weight.detach()
        found = errors(tokens, weight, gradients, arguments.bits, arguments.steps)
        print(f"| `{name}` | " + " | ".join(f"{value:.4f}" for value in found) + " |", flush=True)


def observed(session: Session, name: str, samples: int) -> tuple[Tensor, Tensor]:
    """Tokens that a layer reads, ``(tokens, in_features)``, and G, ``(out_features, out_features)`` float64."""
    module = session.model.module.requires_grad_(True)
    layer, tokens, total = module.get_submodule(name), [], torch.zeros((), dtype=torch.float64)

    def forward(_: object, args: tuple[Tensor, ...], __: Tensor) -> None:
        tokens.append(args[0].detach().flatten(0, -2))

    def backward(_: object, __: object, gradients: tuple[Tensor, ...]) -> None:
        nonlocal total
        own = gradients[0].flatten(0, -2).double()
        total = total + own.T @ own

    handles = [layer.register_forward_hook(forward), layer.register_full_backward_hook(backward)]
    for batch in spread_batches(session.calibration.batches, samples):
        outputs = session.model.outputs(module, move_batch(batch, "cpu", session.model.dtype))
        module.zero_grad()
        (outputs * torch.randn_like(outputs)).sum().backward()
    for handle in handles:
        handle.remove()
    return torch.cat(tokens)[torch.randperm(sum(map(len, tokens)))[:20000]], total


def errors(tokens: Tensor, weight: Tensor, gradients: Tensor, bits: int, steps: int) -> list[float]:
    """Relative errors of the four transforms on held-out tokens."""
    cut = len(tokens) - len(tokens) // HELD_OUT
    fitted, held_out = tokens[:cut], tokens[cut:]
    reader = (power(gradients, 0.5) @ weight.double()).float()
    columns = reader.square().sum(0)
    plain = fit_tokens(fitted, bits, rotation=0)
    gained = fit_tokens(fitted, bits, rotation=0, columns=columns)
    assert gained.gain is not None
    assert gained.shift is not None
    mean, levels = gained.shift, gained.levels

    def error(quantized: Callable[[Tensor], Tensor]) -> float:
        with torch.no_grad():
            return float(relative(quantized, held_out))

    def relative(quantized: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return ((quantized(x) - x) @ reader.T).square().sum() / ((x - mean) @ reader.T).square().sum()

    def coded(y: Tensor, share: Tensor | float) -> Tensor:
        low, high = y.detach().amin(1, keepdim=True) * share, y.detach().amax(1, keepdim=True) * share
        step = (high - low) / levels
        return round_through(((y - low) / step).clamp(0, levels)) * step + low

    turn = rotate(torch.eye(tokens.shape[1], dtype=torch.float64), 0).float()
    skew = torch.zeros_like(turn, requires_grad=True)
    growth = torch.zeros_like(gained.gain, requires_grad=True)
    share = gained.share.log().requires_grad_(True)

    def learned(x: Tensor) -> Tensor:
        matrix, gain = turn @ torch.linalg.matrix_exp(skew - skew.T), gained.gain * growth.exp()
        return coded(((x - mean) * gain) @ matrix, share.exp()) @ matrix.T / gain + mean

    optimiser = torch.optim.Adam([{"params": [skew], "lr": 1e-3}, {"params": [growth, share], "lr": 3e-3}])
    for _ in range(steps):
        loss = relative(learned, fitted[torch.randint(len(fitted), (512,))])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    centred = (fitted - mean).double()
    second, hessian = ridged(centred.T @ centred / len(centred)), ridged(reader.double().T @ reader.double())
    root, inverse = power(second, 0.5), power(second, -0.5)
    squared = inverse @ power(root @ hessian @ root, 0.5) @ inverse
    into, back = power(squared, 0.5).float() @ turn, turn.T @ power(squared, -0.5).float()
    best = min(error(lambda x, own=own: coded((x - mean) @ into, own) @ back + mean) for own in SHARES)
    return [error(plain.quantized), error(gained.quantized), error(learned), best]


def ridged(matrix: Tensor) -> Tensor:
    """A positive definite matrix near a positive semidefinite one."""
    return matrix + RIDGE * matrix.trace() / len(matrix) * torch.eye(len(matrix), dtype=matrix.dtype)


def power(matrix: Tensor, exponent: float) -> Tensor:
    """A power of a symmetric positive semidefinite matrix, float64."""
    values, vectors = torch.linalg.eigh(matrix.double())
    return (vectors * values.clamp(min=1e-12).pow(exponent)) @ vectors.T


if __name__ == "__main__":
    main()
