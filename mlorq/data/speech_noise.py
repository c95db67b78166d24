"""Made recordings: noise with the spectrum and the rhythm of speech (source ``synthetic``).

The amplitudes are equal up to some 500 Hz and fall by 9 dB per octave above, as in the long-term average spectrum of
speech, which is much the same in all languages (Byrne et al. 1994, J. Acoust. Soc. Am. 96(4)). The loudness varies most
at some 4 Hz, the rate of syllables (Houtgast and Steeneken 1985, J. Acoust. Soc. Am. 77(3)). There are no vowels and no
words.
"""

from __future__ import annotations

import numpy as np

SECONDS = (2.0, 4.0, 8.0)  # lengths of recordings
KNEE, LOWEST = 500.0, 80.0  # Hz, where the spectrum starts to fall, and below which there is nothing
SLOPE = 1.5  # of the amplitudes: 9 dB per octave
SYLLABLES = (2.0, 8.0)  # Hz, the rates at which the loudness varies
LOUDNESS_SPREAD = 1.0  # standard deviation of the loudness's logarithm
PEAK = 0.5  # largest amplitude


def speech_noise(samples: int, seconds: float, rate: int, seed: int) -> np.ndarray:
    """Recordings of equal length.

    Args:
        samples: number of recordings.
        seconds: length of each.
        rate: samples per second.
        seed: of the noise; the first recordings do not depend on the number of recordings.

    Returns:
        ``(samples, round(seconds · rate))`` float32 within ±``PEAK``.
    """
    count = max(2, round(seconds * rate))
    frequency = np.fft.rfftfreq(count, 1 / rate)
    spectrum = np.where(frequency < LOWEST, 0.0, np.maximum(frequency / KNEE, 1.0) ** -SLOPE)
    rhythm = ((frequency >= SYLLABLES[0]) & (frequency <= SYLLABLES[1])).astype(float)
    made = (_recording(np.random.default_rng([seed, index]), spectrum, rhythm, count) for index in range(samples))
    return np.stack(list(made))


def _recording(generator: np.random.Generator, spectrum: np.ndarray, rhythm: np.ndarray, count: int) -> np.ndarray:
    """Noise of a spectrum, times the exponential of slow noise."""
    carrier, slow = (_noise(generator, amplitudes, count) for amplitudes in (spectrum, rhythm))
    spread = slow.std()
    found = carrier * np.exp(LOUDNESS_SPREAD * slow / spread if spread > 0 else slow)
    most = np.abs(found).max()
    scaled: np.ndarray = (PEAK * found / most if most > 0 else found).astype(np.float32)
    return scaled


def _noise(generator: np.random.Generator, amplitudes: np.ndarray, count: int) -> np.ndarray:
    """Gaussian noise with the given amplitudes per frequency, ``(count,)``."""
    real, imaginary = generator.standard_normal((2, len(amplitudes)))
    return np.fft.irfft(amplitudes * (real + 1j * imaginary), n=count)
