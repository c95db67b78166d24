"""examples/service: a process without torch, transformers and mlorq gives the answers of ``mlorq.load``."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import mlorq
from mlorq.data.images import Image as Encoded
from mlorq.data.images import ImageBatches
from mlorq.models.timm import TimmSettings, preprocessing
from tests import zoo
from tests.compressed import compressed, folder_of
from tests.long import few

pytest.importorskip("onnx", reason="needs the extra onnx")
pytest.importorskip("onnxruntime", reason="needs the extra onnx")
pytest.importorskip("onnxscript", reason="needs the extra onnx")

SERVICE = Path(__file__).parents[2] / "examples" / "service"
# The socket listens before the model is loaded: a request waits until it is.
SERVER = """
import socket, sys
for name in ("torch", "torchvision", "timm", "transformers", "mlorq", "steps", "flows", "onnx"):
    sys.modules[name] = None
import uvicorn
listening = socket.create_server(("127.0.0.1", 0))
print(listening.getsockname()[1], flush=True)
uvicorn.Server(uvicorn.Config("app:app", log_level="warning")).run(sockets=[listening])
"""


def environment(file: Path) -> dict[str, str]:
    own = {"MODEL": str(file), "THREADS": "1", "PYTHONPATH": str(SERVICE), "PYTHONDONTWRITEBYTECODE": "1"}
    return {**os.environ, **own}


@contextmanager
def serving(file: Path) -> Iterator[str]:
    """The URL of the service of an exported file."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER], cwd=file.parent, env=environment(file), stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.terminate()
        process.communicate()


def ask(url: str, body: Any = None) -> tuple[int, Any]:
    """Status and JSON of the answer to bytes, or to a JSON value."""
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, {"Content-Type": kind})) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def refused(url: str, body: Any) -> str:
    """The message of a request that is refused, which is one line."""
    status, answer = ask(url, body)
    assert 400 <= status < 500
    assert set(answer) == {"detail"}
    assert answer["detail"]
    assert "\n" not in answer["detail"]
    return str(answer["detail"])


def encoded(width: int, height: int, seed: int, kind: str = "PNG", mode: str = "RGB") -> bytes:
    """An image file of smooth random colours."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).convert(mode)
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("settings", few([{}, {"in_chans": 1}], {}), ids=["colour", "grey"])
def test_images(settings: dict[str, Any], tmp_path: Path) -> None:
    arguments = {**zoo.VIT_ARGUMENTS, **settings}
    architecture = {"family": "timm", "name": zoo.VIT, "arguments": arguments}
    folder = folder_of(tmp_path / "out", compressed(zoo.timm_model(zoo.VIT, arguments)), architecture)
    (file,) = mlorq.export(folder, tmp_path / "model.onnx")
    files = [encoded(50, 71, 0), encoded(90, 40, 1, "JPEG"), encoded(20, 21, 2, mode="L"), encoded(33, 33, 3)]
    images = [Encoded(str(index), data, None, "") for index, data in enumerate(files)]
    described = preprocessing(TimmSettings(name=zoo.VIT, arguments=arguments))
    (pixels,) = ImageBatches(images, described, len(images))
    with torch.no_grad():
        expected = mlorq.load(folder)(pixels).softmax(1)
    with serving(Path(file)) as url:
        assert ask(f"{url}/health") == (200, {"kind": "image"})
        for data, wanted in zip(files, expected, strict=True):
            status, answer = ask(f"{url}/classify?k=3", data)
            assert status == 200
            found = answer["classes"]
            assert [one["class"] for one in found] == wanted.topk(3).indices.tolist()
            assert [one["probability"] for one in found] == pytest.approx(wanted.topk(3).values.tolist(), rel=1e-4)
        assert len(ask(f"{url}/classify", files[0])[1]["classes"]) == 5
        assert len(ask(f"{url}/classify?k=100", files[0])[1]["classes"]) == 7, "all that the model has"
        assert "not an image" in refused(f"{url}/classify", b"text")
        assert "not an image" in refused(f"{url}/classify", b"")
        assert "not an image" in refused(f"{url}/classify", files[0][:200])
        assert "too long" in refused(f"{url}/classify", encoded(1, 60000, 0))
        assert "query.k" in refused(f"{url}/classify?k=0", files[0])
        assert refused(f"{url}/embed", {"texts": ["a dog"]}) == "Not Found"


@pytest.mark.parametrize("kind", few(["bert", "mpnet"], "bert"))
def test_texts(kind: str, tmp_path: Path) -> None:
    from mlorq.models.sentence import SentenceEmbedding
    from mlorq.models.transformers_modules import describe

    float_model = zoo.save_text_model(tmp_path / "float", kind)
    architecture = describe(float_model)
    assert architecture is not None
    folder = folder_of(tmp_path / "out", compressed(float_model), {**architecture, "task": "sentence-similarity"})
    (file, *_) = mlorq.export(folder, str(tmp_path / "model.onnx"), tokenizer=str(tmp_path / "float"))
    module, tokenizer = mlorq.load(folder), zoo.tokenizer()

    def embedded(text: str) -> torch.Tensor:
        batch = tokenizer([text], return_tensors="pt")
        names = ("input_ids", "attention_mask", *(("token_type_ids",) if kind == "bert" else ()))
        with torch.no_grad():
            return SentenceEmbedding()(module, {name: batch[name] for name in names})[0]

    longest = {"bert": 40, "mpnet": 38}[kind]  # of 40 positions; MPNet's start at 2
    texts = [*zoo.SENTENCES, " ".join(["dog"] * (longest - 2))]
    expected = torch.stack([embedded(text) for text in texts])
    with serving(Path(file)) as url:
        assert ask(f"{url}/health") == (200, {"kind": "text"})
        status, answer = ask(f"{url}/embed", {"texts": texts})
        assert status == 200
        assert torch.allclose(torch.tensor(answer["embeddings"]), expected, atol=1e-5)
        status, answer = ask(f"{url}/similarity", {"first": texts[0], "second": texts[1]})
        assert status == 200
        assert answer["similarity"] == pytest.approx(float(expected[0] @ expected[1]), abs=1e-5)
        assert refused(f"{url}/embed", {"texts": ["a dog", " "]}) == "text 1 is empty"
        long = " ".join(["dog"] * (longest - 1))
        assert f"text 0 has {longest + 1} tokens: at most {longest}" in refused(f"{url}/embed", {"texts": [long]})
        assert "text 1" in refused(f"{url}/similarity", {"first": "a dog", "second": long})
        assert "texts" in refused(f"{url}/embed", {"texts": []})
        assert "texts" in refused(f"{url}/embed", {"texts": ["a dog"] * 65})
        assert "second" in refused(f"{url}/similarity", {"first": "a dog"})
        assert refused(f"{url}/embed", b"{")


def test_a_file_that_cannot_be_served_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "damaged.onnx").write_bytes(b"no graph")
    architecture = {"family": "timm", "name": zoo.VIT, "arguments": zoo.VIT_ARGUMENTS}
    module = compressed(zoo.timm_model(zoo.VIT, zoo.VIT_ARGUMENTS))
    mlorq.export(folder_of(tmp_path / "out", module, architecture), tmp_path / "part.onnx", part="blocks.0")
    refusals = {"damaged": "cannot be loaded", "missing": "cannot be loaded", "part": "is a part of a model (blocks.0)"}
    for name, said in refusals.items():
        code = SERVER.partition("import uvicorn")[0] + "import app"
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment(tmp_path / f"{name}.onnx"), capture_output=True, text=True
        )
        assert done.returncode == 1
        assert said in done.stderr
        assert done.stderr.count("\n") == 1


def test_the_packages_of_the_service_are_bounded_and_those_that_the_tests_run_with() -> None:
    from importlib.metadata import version

    from packaging.requirements import Requirement

    listed = [Requirement(line) for line in (SERVICE / "requirements.txt").read_text().splitlines()]
    assert {one.name for one in listed} == {"fastapi", "numpy", "onnxruntime", "pillow", "tokenizers", "uvicorn"}
    for one in listed:
        assert {specifier.operator for specifier in one.specifier} == {">=", "<"}, one.name
        assert version(one.name) in one.specifier, one.name
