"""Decoded images: 16 bits keep their brightness, and what cannot be read is named."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageFile

from mlorq.data.pixels import decoded
from mlorq.errors import DataError

RAMP = np.tile(np.linspace(0, 65535, 32).astype(np.uint16), (8, 1))


def encoded(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, format=kind)
    return file.getvalue()


def refusal(data: bytes) -> str:
    with pytest.raises(DataError) as caught:
        decoded(data, "x.png", "RGB")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_grey_images_of_16_bits_keep_their_upper_8_bits(kind, mode):
    found = np.asarray(decoded(encoded(Image.fromarray(RAMP), kind), "x", mode))
    wanted = (RAMP >> 8).astype(np.uint8)
    assert np.array_equal(found, wanted if mode == "L" else np.repeat(wanted[..., None], 3, 2))


def test_big_endian_values_are_read_right():
    data = encoded(Image.frombytes("I;16B", (32, 8), RAMP.astype(">u2").tobytes()), "TIFF")
    assert np.array_equal(np.asarray(decoded(data, "x", "L")), RAMP >> 8)


def test_images_of_8_bits_are_converted_as_pillow_does():
    colours = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8))
    for image in (colours, colours.convert("L"), colours.convert("P"), colours.convert("LA"), colours.convert("1")):
        assert np.array_equal(np.asarray(decoded(encoded(image, "PNG"), "x", "RGB")), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("values", [RAMP.astype(np.int32) * 9, RAMP.astype(np.float32) / 65535])
def test_values_of_unknown_range_are_refused(values):
    assert "32-bit" in refusal(encoded(Image.fromarray(values), "TIFF"))


def test_images_with_too_many_pixels_are_refused(monkeypatch):
    data = encoded(Image.new("1", (64, 64)), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    message = refusal(data)
    assert "x.png" in message
    assert "4096 pixels" in message


def test_damaged_images_are_named(monkeypatch):
    data = encoded(Image.fromarray(RAMP), "PNG")
    for cut in range(1, len(data) - 20, 11):
        assert "x.png" in refusal(data[:cut])

    whole = encoded(Image.new("L", (2, 2)), "BMP")

    def fails(*arguments, **keywords):
        raise KeyError(7)

    monkeypatch.setattr(ImageFile.ImageFile, "load", fails)  # decoders raise more than Pillow documents
    assert "x.png cannot be decoded: 7" in refusal(whole)
