"""Checkpoints behind drivers of fsspec: what these refuse is one line, whatever class their exceptions have."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from flows.result_commands import write_file
from mlorq.checkpoint.format import checkpoint_files
from mlorq.checkpoint.io import inspect, load, save
from mlorq.checkpoint.places import TENSORS
from mlorq.checkpoint.preparation import described, placed, read_preparation
from mlorq.data.contents import contents
from mlorq.errors import CheckpointError, DataError, MlorqError, StoreError
from mlorq.export_targets.graph_files import write_files
from tests.checkpoint.test_checkpoint import ALLOCATION, DESCRIPTION, Everything, compress

TOKENIZER = {"tokenizer.json": b'{"a": 1}'}
URL = "refusing://bucket/model"


class ClientError(Exception):
    """As botocore's: no ``OSError``."""

    def __init__(self, status: int = 403) -> None:
        super().__init__(f"An error occurred ({status})\nwhen calling GetObject at https://me:secret@host/")
        self.response = {"Error": {"Code": "AccessDenied"}, "ResponseMetadata": {"HTTPStatusCode": status}}


class Refusing(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """Files in memory, behind a driver that refuses one of its methods for one of the files."""

    protocol = "refusing"
    cachable = False
    files = MemoryFileSystem()
    fault: Callable[[str, str], Exception | None] = staticmethod(lambda method, path: None)

    def __init__(self, **options: Any) -> None:
        self._ask("connect", "")
        super().__init__(**options)

    def _ask(self, method: str, path: str) -> str:
        if (error := Refusing.fault(method, path)) is not None:
            raise error
        return f"/{path.lstrip('/')}"

    def open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        return Guarded(self, path) if mode == "rb" else self.files.open(self._ask("write", path), mode)

    def get_file(self, path: str, target: str, **options: Any) -> None:
        Path(target).write_bytes(self.files.cat_file(self._ask("get_file", path)))


class Guarded(io.BytesIO):
    """An open file whose reads are refused."""

    def __init__(self, fs: Refusing, path: str) -> None:
        super().__init__(fs.files.cat_file(fs._ask("open", path)))
        self.place = fs, path

    def read(self, size: int | None = -1) -> bytes:
        self.place[0]._ask("read", self.place[1])
        return super().read(size)


def _method(name: str) -> Callable[..., Any]:
    return lambda self, path, *rest, **options: getattr(self.files, name)(self._ask(name, path), *rest, **options)


for _name in ("cat_file", "pipe_file", "info", "size", "exists", "isdir", "isfile", "ls", "makedirs", "rm_file"):
    setattr(Refusing, _name, _method(_name))
fsspec.register_implementation("refusing", Refusing, clobber=True)


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Stores a checkpoint; a function that makes the driver refuse a method for paths with an ending."""
    files = {**DESCRIPTION, "preparation": described(TOKENIZER)}
    save(checkpoint_files(compress(Everything(), ALLOCATION), files) | placed(TOKENIZER), URL)

    def set_fault(method: str, end: str = "", error: Exception | None = None) -> None:
        fault = ClientError() if error is None else error
        monkeypatch.setattr(
            Refusing,
            "fault",
            staticmethod(lambda asked, path: fault if asked == method and path.endswith(end) else None),
        )

    return set_fault


def preparation(url: str) -> Any:
    return read_preparation(url, inspect(url))


def test_it_is_read(refuse: Callable[..., None]) -> None:
    assert inspect(URL)["layers"]
    assert load(URL, Everything()) is not None
    assert preparation(URL) == TOKENIZER


@pytest.mark.parametrize(
    ("method", "end", "call", "name"),
    [
        ("connect", "", inspect, ""),
        ("cat_file", "mlorq.json", inspect, "mlorq.json cannot be read: "),
        ("open", TENSORS, inspect, f"{TENSORS} cannot be read: "),
        ("size", TENSORS, inspect, f"{TENSORS} cannot be read: "),
        ("read", TENSORS, inspect, f"{TENSORS} cannot be read: "),
        ("get_file", TENSORS, lambda url: load(url, Everything()), f"{TENSORS} cannot be read: "),
        ("exists", "preparation", preparation, "preparation cannot be read: "),
        ("open", "tokenizer.json", preparation, "preparation/tokenizer.json cannot be read: "),
        ("read", "tokenizer.json", preparation, "preparation/tokenizer.json cannot be read: "),
        ("pipe_file", TENSORS, lambda url: save({TENSORS: b""}, url), "it cannot be written: "),
    ],
)
def test_a_refusal_is_one_line_that_names_the_file(
    method: str, end: str, call: Callable[[str], Any], name: str, refuse: Callable[..., None]
) -> None:
    refuse(method, end)
    with pytest.raises(CheckpointError) as caught:
        call(URL)
    line = f"checkpoint {URL}: {name}AccessDenied: An error occurred (403) when calling GetObject at https://***@host/"
    assert str(caught.value).replace("me:***", "***") == line


@pytest.mark.parametrize(
    ("method", "call", "kind"),
    [
        ("pipe_file", lambda url: write_files(url, {url: b""}), CheckpointError),
        ("write", lambda url: write_file(url, b""), StoreError),
        ("cat_file", lambda url: contents(Refusing(), url, "labels.tsv"), DataError),
    ],
)
def test_other_files_are_named_too(
    method: str, call: Callable[[str], Any], kind: type[MlorqError], refuse: Callable[..., None]
) -> None:
    refuse(method)
    with pytest.raises(kind, match=r"cannot be (read|written): AccessDenied: An error occurred \(403\) when"):
        call(f"{URL}/labels.tsv")


def test_a_file_that_is_gone_is_missing(refuse: Callable[..., None]) -> None:
    refuse("get_file", TENSORS, FileNotFoundError(TENSORS))
    with pytest.raises(CheckpointError, match=re.escape(f"the folder has no {TENSORS}")):
        load(URL, Everything())
    refuse("read", TENSORS, FileNotFoundError(2, "gone"))
    with pytest.raises(CheckpointError, match=f"{TENSORS} cannot be read: .*gone"):
        inspect(URL)


@pytest.mark.parametrize("error", [KeyError("x"), AttributeError("x")])
def test_a_defect_keeps_its_traceback(error: Exception, refuse: Callable[..., None]) -> None:
    refuse("get_file", TENSORS, error)
    with pytest.raises(type(error)):
        load(URL, Everything())


def test_errors_of_the_model_are_not_taken_for_the_file_s(refuse: Callable[..., None]) -> None:
    class Wrong(Everything):
        def __deepcopy__(self, memo: Any) -> Any:
            raise OSError("of the model")

    with pytest.raises(CheckpointError, match="model: the model cannot be copied: OSError: of the model"):
        load(URL, Wrong())
