"""Decoding of one encoded image with Pillow; used by all sources of images."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from mlorq.errors import DataError, one_line

if TYPE_CHECKING:
    from PIL.Image import Image

# Formats whose mode "I" (32-bit integers) holds 16-bit values; in others, such as TIFF, their range is unknown.
SIXTEEN_BITS = ("PNG", "PPM")
MOST_SIDES = 1000


def decoded(data: bytes, name: str, mode: str) -> Image:
    """The first frame of an encoded image, with 8 bits per channel.

    Grey images of 16 bits keep their upper 8 bits, as Pillow does for colour images; its own conversion would clip them
    to white.

    Args:
        data: the encoded bytes.
        name: the image's name, for errors.
        mode: Pillow's mode of the result, ``RGB`` or ``L``.

    Raises:
        DataError: the image cannot be decoded, is larger than Pillow's limit, or has values of unknown range.
    """
    from PIL import Image as Pillow

    try:
        with Pillow.open(io.BytesIO(data)) as opened:
            _check_sides(opened, name)
            opened.load()
            return _eight_bits(opened, name).convert(mode)
    except DataError:
        raise
    except (Pillow.DecompressionBombError, Pillow.DecompressionBombWarning) as error:
        raise DataError(f"image {name} is too large: {one_line(error)} Store it with fewer pixels.") from None
    except MemoryError:
        raise DataError(f"image {name} is too large for this machine's memory: store it with fewer pixels") from None
    except Exception as error:  # decoders raise anything for damaged files: struct.error, KeyError, zlib.error, …
        raise DataError(f"image {name} cannot be decoded: {one_line(error) or type(error).__name__}") from error


def _check_sides(opened: Image, name: str) -> None:
    """Refuse an image whose longer side would take all memory once the shorter one has the model's size."""
    width, height = opened.size
    if min(width, height) < 1 or max(width, height) > MOST_SIDES * min(width, height):
        raise DataError(f"image {name} is {width} × {height}: one side is more than {MOST_SIDES} times the other")


def _eight_bits(opened: Image, name: str) -> Image:
    """The image itself, or a grey one of 8 bits for modes of more than 8 bits per value."""
    from PIL import Image as Pillow

    if opened.mode.startswith("I;16") or (opened.mode == "I" and opened.format in SIXTEEN_BITS):
        import numpy as np

        values = np.asarray(opened).astype(np.int64)
        return Pillow.fromarray((values >> 8).clip(0, 255).astype(np.uint8))
    if opened.mode in ("I", "F"):
        raise DataError(f"image {name} has 32-bit values, whose range is unknown: store it with 8 or 16 bits")
    return opened
