"""How fast images become batches: one thread, several threads, several processes; and what keeping bytes saves.

    .venv/bin/python benchmarks/decoding.py --images ../shared/data/imagenet_700/images [--enlarge 2]

The images are read into memory first, so that decoding and resampling alone are timed. Processes are started anew, as
a run would have to: their start-up is shown apart. `--enlarge` makes larger JPEG files of the same images beforehand.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image as Pillow

from mlorq.data.images import Image, ImageBatches, decode, decoder
from mlorq.models.timm import TimmSettings, preprocessing

MODEL = TimmSettings(name="vit_tiny_patch16_224")  # its preprocessing; nothing is fetched
BATCH = 32


def decode_part(images: list[Image]) -> torch.Tensor:
    """A batch in one worker; the transform is made there, for it cannot be sent in every case."""
    transform, mode = decoder(preprocessing(MODEL))
    return torch.stack([decode(image, transform, mode) for image in images])


def with_workers(pool: Executor, images: list[Image]) -> float:
    """Seconds to have all batches back."""
    parts = [images[start : start + BATCH] for start in range(0, len(images), BATCH)]
    started = time.perf_counter()
    for batch in pool.map(decode_part, parts):
        assert batch.dtype == torch.uint8
    return time.perf_counter() - started


def row(name: str, start: float, seconds: float, count: int) -> None:
    print(f"| {name} | {start:.2f} | {seconds:.2f} | {count / seconds:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--enlarge", type=float, default=1.0)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    images = []
    for file in sorted(arguments.images.iterdir()):
        data = file.read_bytes()
        if arguments.enlarge != 1:
            opened = Pillow.open(io.BytesIO(data)).convert("RGB")
            size = (round(opened.width * arguments.enlarge), round(opened.height * arguments.enlarge))
            buffer = io.BytesIO()
            opened.resize(size).save(buffer, "JPEG", quality=90)
            data = buffer.getvalue()
        images.append(Image(file.name, data, None, ""))
    size = Pillow.open(io.BytesIO(images[0].data)).size
    print(f"{len(images)} images of {size[0]} x {size[1]}, batches of {BATCH}\n")
    print("| workers | start-up, s | decoding, s | images a second |\n|---|---|---|---|")
    decode_part(images[:1])
    for workers in arguments.workers:
        with ThreadPoolExecutor(workers) as pool:
            row(f"{workers} threads", 0.0, with_workers(pool, images), len(images))
    for workers in arguments.workers:
        started = time.perf_counter()
        # Not forked: a process with threads of torch and CUDA in it cannot be.
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            list(pool.map(decode_part, [images[:1]] * workers * 2))
            ready = time.perf_counter() - started
            row(f"{workers} processes", ready, with_workers(pool, images), len(images))
    batches = ImageBatches(images, preprocessing(MODEL), BATCH)
    first = timed(lambda: list(batches))
    again = timed(lambda: list(batches))
    kept = sum(value.numel() * value.element_size() for value in batches._kept.values())
    print(f"\nAs a run does it ({len(batches)} batches): first use {first:.2f} s, every later one {again:.2f} s; kept")
    print(f"{kept / 1e6:.0f} MB of pixels, {4 * kept / 1e6:.0f} MB as float32")


def timed(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
