"""Recordings of speech from encoded files: one channel, at a given sampling rate."""

from __future__ import annotations

import io
import math
import warnings

import numpy as np

from mlorq.data.packages import SOUNDFILE
from mlorq.errors import DataError, one_line

RATES = (1000, 1_000_000)  # lowest and highest, in Hz
WAV = (b"RIFF", b"RIFX", b"RF64")  # first bytes of a file


def decoded_recording(data: bytes, name: str, rate: int) -> np.ndarray:
    """The amplitudes of a recording, ``(samples,)`` float32 between -1 and 1.

    Channels are averaged. A recording of another sampling rate is resampled by a polyphase filter.

    Args:
        data: content of the file: WAV (integers of 8 to 32 bits, or floats); with the package soundfile also FLAC, Ogg,
            MP3 and its other formats.
        name: name of the file, for errors.
        rate: sampling rate of the result in Hz.

    Raises:
        DataError: the file is empty, cannot be read, or has values that are not finite; or the package is missing.
    """
    if not data:
        raise DataError(f"recording {name} is empty")
    values, own = _wav(data, name) if data[:4] in WAV else _other(data, name)
    if not len(values):
        raise DataError(f"recording {name} is empty: it has no samples")
    if not RATES[0] <= own <= RATES[1]:  # resampling from others would take all memory
        raise DataError(f"recording {name} cannot be read: its sampling rate is {own} Hz")
    if not np.isfinite(values).all():
        raise DataError(f"recording {name} has NaN or infinite values")
    mono = values.mean(axis=1) if values.ndim > 1 else values
    return resampled(mono, own, rate).astype(np.float32)


def resampled(values: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """A signal at another sampling rate, ``(⌈samples · wanted / rate⌉,)``.

    Args:
        values: ``(samples,)`` at ``rate``.
        rate, wanted: sampling rates in Hz.
    """
    if rate == wanted:
        return values
    import scipy.signal  # the import takes a second

    common = math.gcd(rate, wanted)
    found: np.ndarray = scipy.signal.resample_poly(values, wanted // common, rate // common)
    return found


def _wav(data: bytes, name: str) -> tuple[np.ndarray, int]:
    """Amplitudes ``(samples,)`` or ``(samples, channels)`` float64, and the sampling rate."""
    import scipy.io.wavfile

    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            rate, values = scipy.io.wavfile.read(io.BytesIO(data))
    except Exception as error:  # damaged headers raise errors of many types
        raise DataError(f"recording {name} cannot be read: {one_line(error)}") from error
    if any("prematurely" in str(warning.message) for warning in seen):
        raise DataError(f"recording {name} cannot be read: it is cut off")
    if values.dtype == np.uint8:
        return (values.astype(np.float64) - 128) / 128, int(rate)
    if values.dtype.kind == "i":
        return values.astype(np.float64) / -float(np.iinfo(values.dtype).min), int(rate)
    return values.astype(np.float64), int(rate)


def _other(data: bytes, name: str) -> tuple[np.ndarray, int]:
    """The same of a file that soundfile reads."""
    soundfile = SOUNDFILE.require(f"recording {name}, which is not WAV,", "convert it to WAV")
    try:
        values, rate = soundfile.read(io.BytesIO(data), dtype="float64", always_2d=True)
    except (RuntimeError, TypeError, ValueError, OSError) as error:
        raise DataError(f"recording {name} cannot be read: {one_line(error)}") from error
    return values, int(rate)
