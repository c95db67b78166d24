"""Made inputs: images with the spectrum of natural ones, boxes, and texts of random tokens (source ``synthetic``).

Images are Gaussian noise whose amplitudes fall as 1/f, as those of natural images do on average (Field 1987, J. Opt.
Soc. Am. A 4(12)), with most of their variance common to all channels. They have no edges and no objects.

Texts are drawn from the tokenizer's vocabulary, every token with the same probability: how often tokens occur is not
stored in tokenizers. Special tokens, placeholders such as ``[unused7]`` and single characters are not drawn.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlorq.errors import DataError

COMMON = 0.9  # share of the variance that all channels have in common
BRIGHTNESS, BRIGHTNESS_SPREAD = 0.45, 0.12  # mean over images, and its standard deviation; white is 1
CONTRAST = (0.1, 0.3)  # standard deviation within an image, lowest and highest
BOX_SIDES = (0.2, 0.8)  # of an image's sides
TOKENS, TOKENS_SPREAD, FEWEST_TOKENS = 16.0, 0.6, 4  # median length of texts, standard deviation of its logarithm
MANY_TOKENS = 512  # longest text where texts are joined
PLACEHOLDER = re.compile(r"^[\[<].+[\]>]$")
MARKS = "#▁Ġ"  # marks of word pieces in vocabularies, which are no characters of the text


def natural_images(samples: int, shape: tuple[int, int, int], seed: int) -> Tensor:
    """Noise with amplitudes 1/f, as pixels.

    Args:
        samples: number of images.
        shape: channels, height and width.
        seed: of the noise; the first images do not depend on the number of images.

    Returns:
        ``(samples, channels, height, width)`` uint8.
    """
    return torch.from_numpy(np.stack([_image(np.random.default_rng([seed, index]), shape) for index in range(samples)]))


def _image(generator: np.random.Generator, shape: tuple[int, int, int]) -> np.ndarray:
    """One image, ``shape`` uint8."""
    channels, height, width = shape
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf  # no constant part: the brightness is drawn by itself
    noise = generator.standard_normal((channels + 1, height, width))
    smooth = np.fft.irfft2(np.fft.rfft2(noise) / frequency, s=(height, width))
    spread = smooth.std((1, 2), keepdims=True)
    smooth /= np.where(spread > 0, spread, 1.0)  # an image of one pixel has none
    mixed = COMMON**0.5 * smooth[:1] + (1 - COMMON) ** 0.5 * smooth[1:] if channels > 1 else smooth[:1]
    brightness = generator.normal(BRIGHTNESS, BRIGHTNESS_SPREAD)
    pixels = 255 * (brightness + generator.uniform(*CONTRAST) * mixed)
    return pixels.round().clip(0, 255).astype(np.uint8)


def random_boxes(sizes: Sequence[tuple[int, int]], seed: int) -> list[tuple[float, ...]]:
    """A box in each of several images: each side a fifth to four fifths of the image's, anywhere inside.

    Args:
        sizes: width and height of the images.
        seed: of the boxes.

    Returns:
        left, top, right and bottom of each, in pixels.
    """
    generator = np.random.default_rng(seed)
    found = []
    for size in sizes:
        sides = generator.uniform(*BOX_SIDES, 2)
        corner = generator.uniform(0, 1 - sides)
        found.append(tuple((np.concatenate([corner, corner + sides]) * [*size, *size]).tolist()))
    return found


def random_texts(tokenizer: Any, samples: int, longest: int, seed: int) -> list[str]:
    """Texts of random tokens, of plausible lengths (log-normal, median 16 tokens).

    Args:
        tokenizer: of the model, with the interface of transformers.
        samples: number of texts.
        longest: tokens of the longest text, with special ones.
        seed: of the lengths and tokens.

    Raises:
        DataError: the vocabulary has no tokens to draw.
    """
    drawn = drawn_tokens(tokenizer)
    generator = np.random.default_rng(seed)
    room = max(1, longest - tokenizer.num_special_tokens_to_add())
    lengths = np.exp(generator.normal(np.log(TOKENS), TOKENS_SPREAD, samples)).round().astype(int)
    lengths = lengths.clip(min(FEWEST_TOKENS, room), room)
    return [str(tokenizer.decode(generator.choice(drawn, length).tolist())) for length in lengths]


def texts_of_tokens(tokenizer: Any, tokens: int, seed: int) -> list[str]:
    """Texts of random tokens that a tokenizer makes at least ``tokens`` tokens of.

    Raises:
        DataError: the vocabulary has no tokens to draw, or the tokenizer drops the texts.
    """
    count = max(1, round(tokens / TOKENS))
    while True:
        texts = random_texts(tokenizer, count, MANY_TOKENS, seed)
        found = sum(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"]))
        if found >= tokens:
            return texts
        if not found:
            raise DataError("source synthetic: the tokenizer makes no tokens of texts of its own vocabulary")
        count *= 2


def drawn_tokens(tokenizer: Any) -> list[int]:
    """The ids of tokens that texts are made of, in ascending order.

    Single characters are left out where enough tokens remain: most are of foreign scripts, which words do not contain.

    Raises:
        DataError: there are none.
    """
    special = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    known = {
        number: token.strip(MARKS)
        for token, number in tokenizer.get_vocab().items()
        if token not in special and token.strip(MARKS) and not PLACEHOLDER.match(token)
    }
    longer = [number for number, token in known.items() if len(token) > 1]
    found = sorted(longer if 2 * len(longer) >= len(known) else known)
    if not found:
        raise DataError("source synthetic: the tokenizer's vocabulary has nothing but special tokens")
    return found
