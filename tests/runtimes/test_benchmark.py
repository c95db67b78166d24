"""``mlorq benchmark``: cold processes, their statistics, and wrong use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flows.cli import main
from mlorq.checkpoint.io import inspect
from mlorq.checkpoint.tensor_file import digest
from mlorq.errors import ConfigError, MlorqError
from mlorq.runtimes.benchmark import Variant, _row, benchmark, picture, read_result
from tests import zoo
from tests.compressed import compressed, folder_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    architecture = {"family": "timm", "name": zoo.VIT, "arguments": zoo.VIT_ARGUMENTS}
    module = compressed(zoo.timm_model(zoo.VIT, zoo.VIT_ARGUMENTS))
    return folder_of(tmp_path_factory.mktemp("vit") / "out", module, architecture)


def test_a_checkpoint_in_torch(folder: Path) -> None:
    calls: list[tuple[int, int]] = []
    found = benchmark(
        str(folder),
        ["torch"],
        batches=(1, 3),
        turns=1,
        seconds=0.01,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert calls == [(done, 3) for done in range(1, 4)]
    about, rows = inspect(folder), {row["name"]: row for row in found["rows"]}
    assert list(rows) == ["float", "dense", "packed"]
    assert rows["dense"]["bytes"] == rows["packed"]["bytes"] == about["file_bytes"]
    assert rows["float"]["bytes"] == about["sizes"]["float_bytes"] + about["sizes"]["rest_bytes"]
    assert rows["float"]["ratio"] == {key: {"median": 1, "least": 1, "largest": 1} for key in ("1", "3")}
    assert rows["float"]["difference"] is None
    assert rows["dense"]["difference"] == rows["packed"]["difference"] == 0  # the same outputs bit for bit
    for row in rows.values():
        assert row["load"] > 0
        assert row["peak"] >= row["resident"] > 0
        assert row["throughput"]["3"] == pytest.approx(3 / row["latency"]["3"])
    assert picture(found).startswith(b"\x89PNG")


def test_statistics_of_turns() -> None:
    """Ratios are taken turn by turn: a slow turn of the machine slows both models and changes no ratio."""
    own, base = [2.0, 20.0, 3.0], [1.0, 10.0, 2.0]

    def turns(times: list[float]) -> list[dict[str, object]]:
        return [{"resident": 1, "peak": 2, "load": 0.1, "first_call": 0.1, "latency": [[one] * 3]} for one in times]

    found = _row(Variant("torch", "dense", "torch", "x", 5), turns(own), turns(base), [4])
    assert found["latency"] == {"4": 3.0}
    assert found["ratio"] == {"4": {"median": 2.0, "least": 1.5, "largest": 2.0}}
    assert found["throughput"] == {"4": pytest.approx(4 / 3)}


@pytest.mark.long
def test_the_command_prints_every_runtime(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package, reason="needs the extra onnx")
    file = tmp_path / "picture.png"
    few = ["--turns", "1", "--seconds", "0.01", "--batch", "2", "--runtime", "torch", "--runtime", "onnxruntime"]
    files = ["--picture", str(file), "--output", str(tmp_path / "result.json")]
    assert main(["benchmark", str(folder), *few, *files, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert read_result(str(tmp_path / "result.json")) == found
    assert found["description"] == digest((folder / "mlorq.json").read_bytes())
    rows = found["rows"]
    assert [(row["runtime"], row["name"]) for row in rows] == [
        *(("torch", name) for name in ("float", "dense", "packed")),
        *(("onnxruntime", name) for name in ("float", "exact", "fast")),
    ]
    exact, fast = rows[4], rows[5]
    assert 0 < exact["difference"] < 1e-5 < fast["difference"]
    assert exact["nmse_added"] < 1e-9 < fast["nmse_added"]
    assert file.read_bytes().startswith(b"\x89PNG")


def test_wrong_use(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"unknown runtime 'tourch'; did you mean 'torch'"):
        benchmark(str(folder), ["tourch"])
    assert main(["benchmark", str(folder), "--turns", "0"]) == 2
    assert "--turns 0: must be at least 1" in capsys.readouterr().err
    assert main(["benchmark", str(folder / "missing"), "--runtime", "torch"]) == 2
    assert "does not exist" in capsys.readouterr().err
    monkeypatch.setattr("mlorq.runtimes.benchmark.PROCESS", "mlorq.no_such_module")
    with pytest.raises(MlorqError, match=r"benchmark of torch, float: .*no_such_module"):
        benchmark(str(folder), ["torch"], turns=1)
