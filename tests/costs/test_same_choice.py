"""What another device computes otherwise changes no choice: signs of eigenvectors, and the last bit of products."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import mlorq
from mlorq.fitting.gram import principal_directions
from tests import zoo


def with_other_signs(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Have eigenvectors come out with random signs."""
    eigh, generator = torch.linalg.eigh, torch.Generator().manual_seed(seed)

    def other(matrix: torch.Tensor) -> Any:
        values, vectors = eigh(matrix)
        signs = torch.rand(vectors.shape[-1], generator=generator, dtype=vectors.dtype) < 0.5
        return torch.return_types.linalg_eigh((values, torch.where(signs, -vectors, vectors)))

    monkeypatch.setattr(torch.linalg, "eigh", other)


def with_other_last_bits(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Have linear layers' products come out as another order of summation would have them."""
    linear, generator = F.linear, torch.Generator().manual_seed(seed)

    def other(*arguments: Any) -> torch.Tensor:
        found = linear(*arguments)
        noise = torch.randn(found.shape, generator=generator, dtype=found.dtype)
        return found * (1 + torch.finfo(found.dtype).eps / 2 * noise)

    monkeypatch.setattr(F, "linear", other)


@pytest.mark.parametrize(("rows", "columns"), [(12, 40), (40, 12), (30, 30)])
def test_principal_directions(rows: int, columns: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    found = principal_directions(matrix @ matrix.T)
    torch.testing.assert_close(found.T @ found, torch.eye(rows, dtype=torch.float64))
    energies = (found.T @ matrix).square().sum(1)
    wanted = torch.zeros(rows, dtype=torch.float64)
    wanted[: min(rows, columns)] = torch.linalg.svdvals(matrix).square()
    torch.testing.assert_close(energies, wanted, atol=1e-9, rtol=1e-9)
    assert (found.pow(3).sum(0) >= 0).all()
    with_other_signs(monkeypatch, seed)
    assert torch.equal(principal_directions(matrix @ matrix.T), found)


@pytest.mark.parametrize("preset", ["quick", "best"])
def test_choices_do_not_depend_on_the_device(preset: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module = zoo.timm_model(zoo.VIT, zoo.VIT_ARGUMENTS, seed)
    batches = [zoo.pixels(8, seed + index) for index in range(4)]

    def result() -> Any:
        return mlorq.compress(
            module, batches, device="cpu", budget="3.5bit", preset=preset, search=zoo.WHOLE_SEARCH, rounding="gptq"
        )

    here = result()
    with_other_signs(monkeypatch, seed)
    with_other_last_bits(monkeypatch, seed)
    there = result()
    assert here.allocation.column("candidate_id") == there.allocation.column("candidate_id")
    for name in ("predicted_cost", "nmse"):
        assert there.metrics[name] == pytest.approx(here.metrics[name], rel=1e-4)
