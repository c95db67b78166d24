"""A service that answers requests from one exported file: probabilities of images, or embeddings of texts.

``MODEL`` is the file. ``TOKENIZER`` is its ``tokenizer.json``, by default beside the file. ``THREADS`` is the number of
threads of one operator.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from inference import Classifier, Encoder, Graph, WrongInput
from pydantic import BaseModel, Field

LARGEST_BODY = 20_000_000  # bytes of an image file
MOST_TEXTS = 64  # of one request


class Texts(BaseModel):
    """Texts to embed."""

    texts: list[str] = Field(min_length=1, max_length=MOST_TEXTS)


class Pair(BaseModel):
    """Two texts to compare."""

    first: str
    second: str


def served() -> Classifier | Encoder:
    """What the environment names.

    Raises:
        SystemExit: the file is missing or lacks something; the message says what.
    """
    file = Path(os.environ.get("MODEL", "model.onnx"))
    graph = Graph(file, int(os.environ.get("THREADS", "0")))
    if graph.preprocessing["kind"] == "image":
        return Classifier(graph)
    return Encoder(graph, Path(os.environ.get("TOKENIZER", file.parent / "tokenizer.json")))


model = served()
app = FastAPI(title="A compressed model")


@app.exception_handler(WrongInput)
def _refuse(request: Request, error: WrongInput) -> JSONResponse:
    return JSONResponse({"detail": str(error)}, 422)


@app.exception_handler(RequestValidationError)
def _explain(request: Request, error: RequestValidationError) -> JSONResponse:
    """The first problem of a malformed request, in one line."""
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"])
    return JSONResponse({"detail": f"{where}: {problem['msg']}"}, 422)


@app.get("/health")
def health() -> dict[str, str]:
    """Answers when the model is loaded."""
    return {"kind": "image" if isinstance(model, Classifier) else "text"}


if isinstance(model, Classifier):
    classifier = model

    @app.post("/classify")
    async def classify(request: Request, k: Annotated[int, Query(ge=1)] = 5) -> dict[str, list[dict[str, float]]]:
        """The ``k`` most probable classes of the image that is the body of the request, most probable first."""
        data = bytearray()
        async for part in request.stream():
            data += part
            if len(data) > LARGEST_BODY:
                raise HTTPException(413, f"the body has more than {LARGEST_BODY} bytes: send a smaller image")
        found = await run_in_threadpool(classifier.probabilities, bytes(data))
        return {"classes": [{"class": int(i), "probability": float(found[i])} for i in (-found).argsort()[:k]]}

else:
    encoder = model

    @app.post("/embed")
    def embed(request: Texts) -> dict[str, list[list[float]]]:
        """The embedding of every text."""
        return {"embeddings": encoder.embeddings(request.texts).tolist()}

    @app.post("/similarity")
    def similarity(request: Pair) -> dict[str, float]:
        """The cosine of the embeddings of two texts."""
        return {"similarity": encoder.similarity(request.first, request.second)}
