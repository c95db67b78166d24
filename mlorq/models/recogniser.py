"""The interface between the source of recordings and the models of all libraries that recognise speech."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from mlorq.models.batches import Batch


@dataclass(frozen=True)
class Recogniser:
    """Preparation of recordings for a model, and the texts that it hears in them.

    Attributes:
        rate: its sampling rate in Hz.
        longest: seconds of a recording that it hears; None: any number.
        decodes: whether it has a decoder, which reads the transcripts of a batch.
        equal_lengths: whether all recordings of a batch must have the same length, because the model takes no mask.
        prepare: ``prepare(recordings, texts)`` makes a batch of mono recordings, ``(amplitudes,)`` float32 at ``rate``,
            and of their transcripts; None: only start tokens for a decoder.
        transcribe: ``transcribe(module, batch)`` returns one text per recording, by greedy decoding.
        described: settings of the preparation as JSON values; part of the key of the data.
        tokenizer: of the transcripts, with the interface of transformers.
    """

    rate: int
    longest: float | None
    decodes: bool
    equal_lengths: bool
    prepare: Callable[[Sequence[np.ndarray], Sequence[str] | None], Batch]
    transcribe: Callable[[nn.Module, Batch], list[str]]
    described: dict[str, Any]
    tokenizer: Any
