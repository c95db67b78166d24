"""An exported graph in onnxruntime with the preparation of its inputs: images to probabilities, texts to embeddings.

Everything is read from the file's metadata (docs/ONNX.md): session options, names of inputs and outputs, preparation.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image
from tokenizers import Tokenizer

LARGEST_IMAGE = 64_000_000  # pixels
PADDINGS = ("[PAD]", "<pad>")
INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
NEEDED = ("input_size", "resize", "interpolation", "mean", "std")


class WrongInput(Exception):
    """An input that cannot be answered; the message says why, in one line."""


class Graph:
    """A session with what the metadata of its file says.

    Args:
        file: the exported file.
        threads: threads of one operator; 0: onnxruntime's choice.

    Attributes:
        about: names of inputs, structure of outputs, precision.
        preprocessing: preparation of the inputs.
    """

    def __init__(self, file: Path, threads: int = 0) -> None:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        # Nothing is decoded in this session: it only reads the metadata, which has the options of the second one.
        metadata = _session(file, options).get_modelmeta().custom_metadata_map
        if not {"mlorq", "preprocessing"} <= metadata.keys():
            raise SystemExit(f"{file}: the metadata says neither how to call the graph nor how to prepare its inputs")
        self.about: dict[str, Any] = json.loads(metadata["mlorq"])
        self.preprocessing: dict[str, Any] = json.loads(metadata["preprocessing"])
        if self.about["part"]:
            raise SystemExit(f"{file} is a part of a model ({self.about['part']}): its outputs answer no request")
        if self.preprocessing["kind"] not in ("image", "text"):
            raise SystemExit(f"{file} takes {self.preprocessing['kind']}, which this service does not prepare")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        for key, value in self.about["session_options"].items():
            options.add_session_config_entry(key, value)
        self._session = _session(file, options)
        self._outputs = {output.name for output in self._session.get_outputs()}

    def output(self, *names: str) -> str:
        """The first of these outputs that the graph has."""
        found = [name for name in names if name in self._outputs]
        if not found:
            raise SystemExit(f"the graph has no output {' or '.join(names)}, but {', '.join(sorted(self._outputs))}")
        return found[0]

    def run(self, output: str, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """One output, ``(samples, …)`` float32."""
        (found,) = self._session.run([output], {name: inputs[name] for name in self.about["call"]["names"]})
        return found


class Classifier:
    """Images to class probabilities."""

    def __init__(self, graph: Graph) -> None:
        self._graph, described = graph, graph.preprocessing
        missing = [name for name in NEEDED if described.get(name) is None]
        if missing or described["interpolation"] not in INTERPOLATIONS:
            lacks = ", ".join(missing) or f"a known interpolation: {described['interpolation']}"
            raise SystemExit(f"the metadata of the graph does not say how images are prepared: it lacks {lacks}")
        self._output = graph.output("logits", "output")
        (self._input,) = graph.about["call"]["names"]

    def probabilities(self, data: bytes) -> np.ndarray:
        """Class probabilities of an image, ``(classes,)``.

        Args:
            data: the image as a file.

        Raises:
            WrongInput: it is not an image, or too large.
        """
        logits = self._graph.run(self._output, {self._input: self.pixels(data)[None]})[0].astype(np.float64)
        raised = np.exp(logits - logits.max())
        return raised / raised.sum()

    def pixels(self, data: bytes) -> np.ndarray:
        """Normalised pixels of an image, ``(channels, height, width)`` float32: resized, cropped in the centre."""
        described = self._graph.preprocessing
        channels, height, width = described["input_size"]
        try:
            with Image.open(io.BytesIO(data)) as image:
                size = _size(image.size, described["resize"])
                if max(image.width * image.height, size[0] * size[1]) > LARGEST_IMAGE:
                    raise WrongInput(f"an image of {image.width} x {image.height} pixels is too large or too long")
                image = image.convert("L" if channels == 1 else "RGB")
        except (OSError, ValueError, SyntaxError):
            raise WrongInput("the body is not an image: send the content of a PNG or JPEG file") from None
        except Image.DecompressionBombError as error:
            raise WrongInput(f"the image is too large: {error}") from None
        image = image.resize(size, INTERPOLATIONS[described["interpolation"]])
        left, top = round((image.width - width) / 2), round((image.height - height) / 2)
        values = np.asarray(image.crop((left, top, left + width, top + height)), np.float32)
        values = values.reshape(height, width, channels).transpose(2, 0, 1)
        mean, std = (np.array(described[name], np.float32)[:, None, None] for name in ("mean", "std"))
        return (values / np.float32(255) - mean) / std


class Encoder:
    """Texts to embeddings.

    Args:
        graph: a text encoder.
        tokenizer: its ``tokenizer.json``.
    """

    def __init__(self, graph: Graph, tokenizer: Path) -> None:
        self._graph = graph
        self._output = graph.output("sentence_embedding", "output")
        self._longest: int | None = graph.preprocessing.get("max_length")
        if not tokenizer.is_file():
            raise SystemExit(f"{tokenizer} does not exist: export with --option tokenizer=NAME")
        self._tokenizer = Tokenizer.from_file(str(tokenizer))
        self._tokenizer.no_truncation()
        known = [name for name in PADDINGS if self._tokenizer.token_to_id(name) is not None]
        if known:
            self._tokenizer.enable_padding(pad_id=self._tokenizer.token_to_id(known[0]), pad_token=known[0])

    def embeddings(self, texts: list[str]) -> np.ndarray:
        """Embeddings, ``(texts, width)``.

        Raises:
            WrongInput: a text is empty or too long.
        """
        for index, text in enumerate(texts):
            if not text.strip():
                raise WrongInput(f"text {index} is empty")
        encoded = self._tokenizer.encode_batch(texts)
        for index, one in enumerate(encoded):
            tokens = sum(one.attention_mask)
            if self._longest is not None and tokens > self._longest:
                raise WrongInput(f"text {index} has {tokens} tokens: at most {self._longest} are possible")
        inputs = {
            "input_ids": np.array([one.ids for one in encoded], np.int64),
            "attention_mask": np.array([one.attention_mask for one in encoded], np.int64),
            "token_type_ids": np.array([one.type_ids for one in encoded], np.int64),
        }
        return self._graph.run(self._output, inputs)

    def similarity(self, first: str, second: str) -> float:
        """Cosine of the embeddings of two texts."""
        left, right = self.embeddings([first, second]).astype(np.float64)
        return float(left @ right / np.sqrt((left @ left) * (right @ right)))


def _session(file: Path, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    options.log_severity_level = 3  # errors
    try:
        return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no common class
        raise SystemExit(f"{file} cannot be loaded: {' '.join(str(error).split())}") from None


def _size(size: tuple[int, int], resize: int | list[int]) -> tuple[int, int]:
    """Width and height of the resized image: ``resize`` is the shorter side, or height and width."""
    if not isinstance(resize, int):
        return resize[1], resize[0]
    width, height = size
    longer = int(resize * max(size) / min(size))
    return (resize, longer) if width <= height else (longer, resize)
