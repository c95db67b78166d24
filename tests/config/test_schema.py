"""The JSON schema of configurations: it accepts what the loader accepts, and refuses unknown keys and choices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from flows.cli import main
from flows.setup_commands import SCHEMA_FILE
from flows.template import template
from mlorq.config.run import RunConfig
from mlorq.config.schema import DIALECT, json_schema
from mlorq.errors import MlorqError
from mlorq.models import FAMILIES

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(path for path in (ROOT / "examples").rglob("*.yaml") if "model:" in path.read_text())
VALUES: dict[str, Any] = {
    "model": {"family": "custom", "factory": "a:b"},
    "data": {role: {"source": "custom", "factory": "a:c"} for role in ("calibration", "evaluation")},
}


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_valid(path: Path, validator: jsonschema.Draft202012Validator) -> None:
    validator.validate(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize("family", FAMILIES.names())
def test_templates_are_valid(family: str, validator: jsonschema.Draft202012Validator) -> None:
    validator.validate(yaml.safe_load(template(family)))


def test_all_examples_were_found() -> None:
    assert len(EXAMPLES) >= 25


@pytest.mark.parametrize(
    "changes",
    [
        {"budget": {"disk": "25MB", "memory": "40MB"}, "target": "onnxruntime"},
        {"budget": [{"memory": "40MB"}, "25MB"], "target": {"runtime": "torch", "weights": "packed"}},
        {"budget": ["3bit", "10%"], "target": None},
        {"search": None, "rounding": None, "embeddings": None},
        {"search": {"layers": {"head": {"bits": [8], "forms": ["Q"]}}, "token_weights": 0.5}},
        {"export": [{"to": "onnx", "precision": "fast"}], "embeddings": {"bits": "auto"}},
        {"engine": {"devices": ["cuda:0"], "dask": {"arguments": {"n_workers": 4}}}},
    ],
    ids=str,
)
def test_both_accept(changes: dict[str, Any], validator: jsonschema.Draft202012Validator) -> None:
    RunConfig.from_mapping(VALUES | changes)
    validator.validate(VALUES | changes)


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"serach": {}}, []),
        ({"folder": "elsewhere"}, []),
        ({"search": {"smaples": 3}}, ["search"]),
        ({"search": {"layers": {"head": {"btis": [8]}}}}, ["search"]),
        ({"engine": {"docker": {"imgae": "x"}}}, ["engine", "docker"]),
        ({"preset": "rapid"}, ["preset"]),
        ({"rounding": {"method": "adaround"}}, ["rounding"]),
        ({"search": {"samples": 0}}, ["search"]),
        ({"target": "tensorrt"}, ["target"]),
        ({"budget": {"disc": "25MB"}}, ["budget"]),
        ({"export": [{"to": "tensorrt"}]}, ["export", 0, "to"]),
        ({"model": {"factory": "a:b"}}, ["model"]),
    ],
    ids=str,
)
def test_both_refuse(
    changes: dict[str, Any], where: list[str | int], validator: jsonschema.Draft202012Validator
) -> None:
    with pytest.raises(MlorqError):
        RunConfig.from_mapping(VALUES | changes)
    assert [list(error.absolute_path) for error in validator.iter_errors(VALUES | changes)] == [where]


def test_keys_have_their_meaning_and_the_defaults_of_the_default_preset() -> None:
    schema = json_schema()
    search = schema["$defs"]["SearchConfig"]["properties"]
    default = RunConfig.from_mapping(VALUES)
    assert schema["$schema"] == DIALECT
    assert search["samples"]["description"] == "calibration samples for measured costs"
    assert {key: field["default"] for key, field in search.items() if "default" in field}.items() <= (
        default.search.model_dump(mode="json").items()
    )
    assert schema["$defs"]["RoundingConfig"]["properties"]["method"]["default"] == default.rounding.method
    assert schema["properties"]["preset"]["default"] == default.preset


def test_the_command_writes_it_and_init_names_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed) == json_schema()
    file = tmp_path / SCHEMA_FILE
    assert main(["schema", "--output", str(file)]) == 0
    assert (capsys.readouterr().out, file.read_text()) == ("", printed)
    assert main(["init", str(tmp_path / "run.yaml")]) == 0
    assert (tmp_path / "run.yaml").read_text() == f"# yaml-language-server: $schema={SCHEMA_FILE}\n{template()}"
    capsys.readouterr()
    assert main(["schema", "--output", str(tmp_path / "none" / "file")]) == 2
    assert "cannot be written: No such file or directory" in capsys.readouterr().err
