"""Recordings of speech: formats, sampling rates, channels, and files at fault."""

from __future__ import annotations

import importlib.util
import io
import wave
from typing import Any

import numpy as np
import pytest
import scipy.io.wavfile

from mlorq.data.recordings import decoded_recording, resampled
from mlorq.errors import DataError


def tone(seconds: float, rate: int, hertz: float = 440.0) -> np.ndarray:
    """A tone of amplitude one half."""
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)


def wav(values: np.ndarray, rate: int, width: int = 2) -> bytes:
    """A PCM file of ``width`` bytes a value, written by the standard library; columns are channels."""
    columns = values[:, None] if values.ndim == 1 else values
    whole = np.round(columns * (2 ** (8 * width - 1) - 1)).astype(np.int64)
    whole = whole + 128 if width == 1 else whole
    data = whole.astype("<i8").tobytes()
    cut = b"".join(data[place : place + width] for place in range(0, len(data), 8))
    file = io.BytesIO()
    with wave.open(file, "wb") as opened:
        opened.setnchannels(columns.shape[1])
        opened.setsampwidth(width)
        opened.setframerate(rate)
        opened.writeframes(cut)
    return file.getvalue()


@pytest.mark.parametrize(("width", "error"), [(1, 1 / 120), (2, 1e-4), (3, 1e-6), (4, 1e-7)])
def test_integers_of_every_width(width: int, error: float) -> None:
    values = tone(0.05, 8000)
    found = decoded_recording(wav(values, 8000, width), "a.wav", 8000)
    assert found.dtype == np.float32
    assert np.abs(found - values).max() < error


def test_floats() -> None:
    values = tone(0.05, 8000).astype(np.float32)
    file = io.BytesIO()
    scipy.io.wavfile.write(file, 8000, values)
    assert np.array_equal(decoded_recording(file.getvalue(), "a.wav", 8000), values)


def test_channels_are_averaged() -> None:
    left, right = tone(0.05, 8000), tone(0.05, 8000, 1000.0)
    found = decoded_recording(wav(np.stack([left, right], axis=1), 8000), "a.wav", 8000)
    assert np.abs(found - (left + right) / 2).max() < 1e-4


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_a_tone_stays_the_same_at_another_rate(rate: int) -> None:
    found = decoded_recording(wav(tone(0.5, rate), rate), "a.wav", 16000)
    assert len(found) == 8000
    inner = slice(800, -800)  # the filter has no neighbours at the ends
    assert np.abs(found - tone(0.5, 16000))[inner].max() < 0.01


def test_a_tone_above_the_new_band_is_gone() -> None:
    found = resampled(tone(0.5, 48000, 12000.0), 48000, 16000)
    assert np.abs(found[800:-800]).max() < 0.01


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "recording b.wav is empty"),
        (wav(np.zeros(0), 8000), "recording b.wav is empty: it has no samples"),
        (wav(tone(0.05, 8000), 8000)[:-200], "recording b.wav cannot be read"),
        (wav(tone(0.05, 8000), 8000)[:20], "recording b.wav cannot be read"),
        (b"RIFF" + bytes(60), "recording b.wav cannot be read"),
    ],
    ids=["no bytes", "no samples", "cut off", "half a header", "zeros"],
)
def test_files_at_fault_are_named(data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        decoded_recording(data, "b.wav", 16000)
    assert "\n" not in str(caught.value)


def test_values_that_are_not_finite_are_refused() -> None:
    file = io.BytesIO()
    scipy.io.wavfile.write(file, 8000, np.array([0.1, np.nan, 0.2], dtype=np.float32))
    with pytest.raises(DataError, match=r"recording c\.wav has NaN or infinite values"):
        decoded_recording(file.getvalue(), "c.wav", 8000)


def test_other_formats_need_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec

    def without(name: str, *rest: Any) -> Any:
        return None if name == "soundfile" else find(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    with pytest.raises(DataError, match=r"recording a\.flac, which is not WAV, needs the package soundfile"):
        decoded_recording(b"fLaC" + bytes(20), "a.flac", 16000)


def test_formats_of_soundfile() -> None:
    soundfile = pytest.importorskip("soundfile", reason="needs the extra audio")
    file = io.BytesIO()
    soundfile.write(file, tone(0.1, 8000), 8000, format="FLAC")
    found = decoded_recording(file.getvalue(), "a.flac", 8000)
    assert np.abs(found - tone(0.1, 8000)).max() < 1e-4
    with pytest.raises(DataError, match=r"recording a\.flac cannot be read") as caught:
        decoded_recording(b"fLaC" + bytes(20), "a.flac", 8000)
    assert "\n" not in str(caught.value)
