"""Resized position embeddings: products against torch's interpolation of one image after another."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mlorq.export_targets.onnx_graph.positions import resized


@pytest.mark.parametrize("seed", range(20))
def test_products_resize_as_interpolation_does(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (int(torch.randint(1, 17, (1,), generator=generator)) for _ in range(2))
    embeddings = torch.randn(rows, columns, 5, generator=generator)
    shapes = torch.randint(2, 20, (4, 2), generator=generator)
    longest = int(shapes.prod(1).max()) + 3
    found = resized(embeddings, shapes, longest)
    assert found.shape == (4, longest, 5)
    for image, (height, width) in zip(found, shapes.tolist(), strict=True):
        source = embeddings.permute(2, 0, 1).unsqueeze(0)
        wanted = F.interpolate(source, size=(height, width), mode="bilinear", align_corners=False, antialias=True)
        patches = height * width
        assert torch.allclose(image[:patches], wanted[0].flatten(1).T, atol=1e-5)
        assert torch.allclose(image[patches:], image[:1].expand(longest - patches, -1), atol=1e-6)


def test_embeddings_keep_their_dtype() -> None:
    assert resized(torch.ones(2, 2, 3, dtype=torch.bfloat16), torch.tensor([[2, 3]]), 8).dtype == torch.bfloat16
