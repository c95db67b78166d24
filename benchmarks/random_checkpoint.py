"""A checkpoint of a timm model with random weights and random codes, for bytes, memory and time at full size.

    .venv/bin/python benchmarks/random_checkpoint.py vit_base_patch16_224 --form TCQ --bits 3 --output /tmp/vit_b
    .venv/bin/mlorq benchmark /tmp/vit_b --turns 3

Memory and time depend on shapes, forms and widths alone. Layers are linear layers inside the blocks; the others stay
float.
"""

from __future__ import annotations

import argparse

import timm
import torch
from torch import nn

from mlorq.checkpoint.format import checkpoint_files
from mlorq.checkpoint.io import save
from mlorq.codecs.affine import QuantizedMatrix
from mlorq.codecs.base import StoredMatrix
from mlorq.codecs.trellis import TrellisMatrix
from mlorq.forms import Candidate
from mlorq.forms.modules import replace_layers
from mlorq.forms.stored_layer import CompressedLayer


def random_matrix(form: str, rows: int, columns: int, bits: int, generator: torch.Generator) -> StoredMatrix:
    """Random codes with values of about unit norm per row."""
    if form == "TCQ":
        codes = torch.randint(0, 2**bits, (columns, rows), generator=generator, dtype=torch.uint8)
        scale = torch.full((rows,), 24, dtype=torch.uint8)
        return TrellisMatrix(codes, scale, torch.tensor([columns**-0.5]), torch.tensor([5], dtype=torch.int32), bits)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    scale = torch.full((rows,), 2.0**-bits * columns**-0.5, dtype=torch.float16)
    return QuantizedMatrix(codes, scale, torch.full((rows,), 2 ** (bits - 1), dtype=torch.uint8), bits)


def main() -> None:
    """Write the checkpoint."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name", help="of a timm model, such as deit_small_patch16_224")
    parser.add_argument("--form", choices=["Q", "TCQ"], default="TCQ")
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--output", required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    generator = torch.Generator().manual_seed(arguments.seed)
    model = timm.create_model(arguments.name).eval()
    layers = {}
    for name, child in model.named_modules():
        if isinstance(child, nn.Linear) and name != "head":
            size = (child.out_features, child.in_features)
            matrix = random_matrix(arguments.form, *size, arguments.bits, generator)
            layers[name] = CompressedLayer(name, Candidate(arguments.form, bits=arguments.bits), {"weight": matrix})
    replace_layers(model, layers)
    architecture = {"family": "timm", "name": arguments.name, "arguments": {}}
    save(checkpoint_files(model, {"architecture": architecture}), arguments.output)
    print(f"{arguments.output}: {len(layers)} layers")


if __name__ == "__main__":
    main()
