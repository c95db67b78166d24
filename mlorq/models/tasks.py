"""Tasks of models from transformers: what they read, the Auto class that loads them, and their f(x).

Add a row to ``TASKS`` for a new task. Every command imports this module; f(x) is looked up when a model is loaded.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mlorq.models.token_masks import TokenMask

InputKind = Literal["images", "texts", "language", "targets", "speech", "sounds", "objects", "prompted", "captioned"]
"""``objects``: images for object detection; ``prompted``: images with boxes of the objects to be masked;
``captioned``: images, each with a text; ``language``: running text, whose tokens the model predicts; ``targets``: texts
with the texts to be generated from them; ``speech``: recordings to be written down;
``sounds``: recordings with classes."""


@dataclass(frozen=True)
class ModelTask:
    """A task of models from transformers.

    Attributes:
        name: ``task`` of the ``model`` section; the hub's name of it.
        inputs: kind of the inputs.
        auto: name of the Auto class.
        output: module and name of ``f(module, batch)``, the outputs that are compared; empty: an embedding of
            sentences, which depends on the model's folder.
        eager: whether attention is not fused, because some of the architectures cannot do it.
        mask: module and name of ``mask(module, batch)``, the masks of tokens; empty: the batch's attention mask.
        other_auto: a second Auto class, of configurations that the first one does not know.
    """

    name: str
    inputs: InputKind
    auto: str
    output: tuple[str, str] = ("", "")
    eager: bool = False
    mask: tuple[str, str] = ("", "")
    other_auto: str = ""

    def forward(self) -> Callable[[nn.Module, Mapping[str, Any]], Tensor]:
        """f(x) of the task: ``forward(module, batch)`` returns ``(samples, outputs)``."""
        found: Callable[[nn.Module, Mapping[str, Any]], Tensor] = _found(self.output)
        return found

    def token_mask(self) -> Callable[[nn.Module, Mapping[str, Any]], TokenMask] | None:
        """``mask`` of the task; None: the batch's attention mask."""
        return _found(self.mask) if self.mask[0] else None


def _found(place: tuple[str, str]) -> Any:
    return getattr(importlib.import_module(place[0]), place[1])


PAIRS, CLASSES = "sentence-similarity", "text-classification"
NEXT, MASKED = "text-generation", "fill-mask"
FEATURES, MAPS, DEPTHS = "image-feature-extraction", "semantic-segmentation", "depth-estimation"
TOWERS, BOXES = "zero-shot-image-classification", "object-detection"
TARGETS, SPEECH = "text2text-generation", "automatic-speech-recognition"
SOUNDS = "audio-classification"
TAGS, ANSWERS, CHOICES = "token-classification", "question-answering", "multiple-choice"
_OUTPUTS, _DETECTION = "mlorq.models.task_outputs", "mlorq.models.transformers_detection"
_TEXTS, _TOWERS = "mlorq.models.text_outputs", "mlorq.models.two_towers"
_DECODER, _SPEECH = "mlorq.models.encoder_decoder", "mlorq.models.speech_outputs"
TASKS = {
    task.name: task
    for task in (
        ModelTask(CLASSES, "texts", "AutoModelForSequenceClassification", (_OUTPUTS, "logits")),
        ModelTask(PAIRS, "texts", "AutoModel"),
        ModelTask(TAGS, "texts", "AutoModelForTokenClassification", (_TEXTS, "token_logits")),
        ModelTask(ANSWERS, "texts", "AutoModelForQuestionAnswering", (_TEXTS, "span_logits")),
        ModelTask(CHOICES, "texts", "AutoModelForMultipleChoice", (_OUTPUTS, "logits"), mask=(_TEXTS, "choice_masks")),
        ModelTask(NEXT, "language", "AutoModelForCausalLM", (_OUTPUTS, "sketched_logits")),
        ModelTask(MASKED, "language", "AutoModelForMaskedLM", (_OUTPUTS, "sketched_logits")),
        ModelTask(
            TARGETS, "targets", "AutoModelForSeq2SeqLM", (_DECODER, "target_logits"), mask=(_DECODER, "sequence_masks")
        ),
        ModelTask(
            SPEECH,
            "speech",
            "AutoModelForSpeechSeq2Seq",
            (_SPEECH, "speech_logits"),
            mask=(_SPEECH, "speech_masks"),
            other_auto="AutoModelForCTC",
        ),
        ModelTask(
            SOUNDS, "sounds", "AutoModelForAudioClassification", (_OUTPUTS, "logits"), mask=(_SPEECH, "speech_masks")
        ),
        ModelTask("image-classification", "images", "AutoModelForImageClassification", (_OUTPUTS, "logits")),
        ModelTask(FEATURES, "images", "AutoModel", (_OUTPUTS, "image_features")),
        ModelTask(MAPS, "images", "AutoModelForSemanticSegmentation", ("mlorq.models.segmentation", "map_logits")),
        ModelTask(DEPTHS, "images", "AutoModelForDepthEstimation", ("mlorq.models.segmentation", "depth_outputs")),
        ModelTask(TOWERS, "captioned", "AutoModel", (_TOWERS, "embeddings"), mask=(_TOWERS, "token_mask")),
        ModelTask(BOXES, "objects", "AutoModelForObjectDetection", (_DETECTION, "box_outputs"), True),
        ModelTask(
            "instance-segmentation", "objects", "AutoModelForUniversalSegmentation", (_DETECTION, "mask_outputs"), True
        ),
        ModelTask(
            "mask-generation",
            "prompted",
            "AutoModelForMaskGeneration",
            ("mlorq.models.mask_generation", "prompted_outputs"),
        ),
    )
}


def tasks_of(kind: InputKind) -> str:
    """The tasks with a kind of inputs, for messages: ``a or b``."""
    return " or ".join(task.name for task in TASKS.values() if task.inputs == kind)
