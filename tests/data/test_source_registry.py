"""The registry of data sources: configurations offer what is registered, also from outside."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import pytest
import torch
from pydantic import Field

from flows.runners.container_setup import binds_of
from mlorq.artifacts.locations import resolve_location
from mlorq.config.run import RunConfig
from mlorq.config.sections import registries_version, source_section
from mlorq.data import SOURCES, Dataset, DataSource, from_batches, load_dataset
from mlorq.data.choose import before_glob
from mlorq.data.packages import OptionalPackage
from mlorq.data.source import BatchSettings, ModelSettings, RefusedElsewhere, Role, SourceSettings
from mlorq.errors import ConfigError, DataError
from mlorq.extras import install_command
from tests.nets import TokenNet, float_model


class NumbersSettings(BatchSettings):
    """Keys of a text file of numbers."""

    numbers: str | None = Field(None, description="text file with one number per line")
    columns: int = Field(3, ge=1, description="numbers per sample")
    skipped: Annotated[int, RefusedElsewhere()] = Field(0, ge=0, description="lines to leave out at the start")

    def check(self) -> None:
        super().check()
        if self.batch_size % 2:
            raise ValueError("batch_size of numbers is even")


class Numbers(DataSource[NumbersSettings]):
    name = "numbers"
    settings = NumbersSettings
    needed = ("numbers",)

    def locations(self, settings: NumbersSettings) -> Sequence[str | None]:
        return (settings.numbers,)

    def check_role(self, settings: NumbersSettings, role: Role) -> None:
        if role == "evaluation" and settings.columns == 1:
            raise ValueError("columns: evaluation compares at least two")

    def load(self, settings: NumbersSettings, role: Role, model: ModelSettings, folder: str, seed: int) -> Dataset:
        assert settings.numbers is not None
        lines = Path(resolve_location(settings.numbers, folder)).read_text().split()[settings.skipped :]
        rows = torch.tensor([float(line) for line in lines]).reshape(-1, settings.columns)
        return from_batches(rows.split(settings.batch_size), role)


@pytest.fixture
def numbers():
    with SOURCES.added(Numbers()) as source:
        yield source


def config(folder: Path, evaluation: dict | None = None, **calibration) -> RunConfig:
    values = {
        "model": {"family": "custom", "factory": "net:build"},
        "data": {
            "calibration": {"source": "numbers", "numbers": "n.txt", "batch_size": 2, **calibration},
            "evaluation": evaluation or {"source": "custom", "factory": "net:evaluate"},
        },
    }
    return RunConfig.from_mapping(values, str(folder))


def refusal(*arguments, **values) -> str:
    with pytest.raises(ConfigError) as caught:
        config(*arguments, **values)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_source_from_outside_loads_through_a_configuration(numbers, tmp_path):
    (tmp_path / "n.txt").write_text("\n".join(str(value) for value in range(13)))
    made = config(tmp_path, columns=4, skipped=1)
    assert isinstance(made.data.calibration.own, NumbersSettings)
    data = load_dataset(made.data.calibration, "calibration", float_model(TokenNet()), made.model, made.folder, 0)
    assert [batch.tolist() for batch in data.batches] == [[[1, 2, 3, 4], [5, 6, 7, 8]], [[9, 10, 11, 12]]]
    assert RunConfig.from_mapping(made.model_dump(mode="json", exclude={"folder"}), made.folder) == made
    (tmp_path / "n.txt").write_text("1 2 3")
    made = config(tmp_path)
    with pytest.raises(DataError, match="has 1 samples"):
        load_dataset(made.data.calibration, "calibration", float_model(TokenNet()), made.model, made.folder, 0)


def test_mistakes_in_the_keys_of_a_source_from_outside(numbers, tmp_path):
    assert "unknown key 'data.calibration.nubmers'; did you mean 'numbers'?" in refusal(tmp_path, nubmers="a")
    assert "data.calibration.columns" in refusal(tmp_path, columns=0)
    assert "data.calibration: source numbers needs numbers" in refusal(tmp_path, numbers=None)
    assert "data.calibration: batch_size of numbers is even" in refusal(tmp_path, batch_size=3)
    own = {"source": "numbers", "numbers": "n.txt", "columns": 1}
    assert "data: evaluation.columns: evaluation compares" in refusal(tmp_path, evaluation=own)
    assert config(tmp_path, columns=1).data.calibration.columns == 1
    other = {"source": "custom", "factory": "a:b", "skipped": 2}
    assert "skipped is for source numbers, not for source custom" in refusal(tmp_path, evaluation=other)
    assert config(tmp_path, {**other, "skipped": 0, "columns": 5}), "most keys of other sources are ignored"
    assert "'numbers'" in refusal(tmp_path, source="nunbers")


def test_sections_follow_the_registry(tmp_path):
    before, fields = registries_version(), set(source_section().model_fields)
    with SOURCES.added(Numbers()):
        assert registries_version() > before
        section = source_section()
        assert set(section.model_fields) == fields | {"numbers", "columns", "skipped"}
        assert section.model_fields["columns"].description == "numbers: numbers per sample"
        assert section.model_fields["batch_size"].description.endswith("numbers: samples per forward pass")
        config(tmp_path)
    assert "'numbers'" in refusal(tmp_path)
    assert set(source_section().model_fields) == fields
    with pytest.raises(ConfigError, match="unknown data source 'numbers'"):
        SOURCES["numbers"]


def test_files_of_a_source_from_outside_are_mounted(numbers, tmp_path):
    for name in ("run", "elsewhere"):
        (tmp_path / name).mkdir()
    (tmp_path / "elsewhere" / "n.txt").write_text("1")
    made = config(tmp_path / "run", numbers="../elsewhere/n.txt")
    assert str(tmp_path / "elsewhere" / "n.txt") in [bind.target for bind in binds_of(made, None, {})]


def test_all_sources_name_their_locations_and_packages():
    given = {"root": "images", "labels": "l.tsv", "annotations": "a.json", "path": "shards/*.parquet", "list": "r.txt"}
    given |= {"masks": "m", "class_names": "c.txt"}
    named = {}
    for source in SOURCES:
        known = {key: location for key, location in given.items() if key in source.settings.model_fields}
        own = source.settings.model_validate(known)
        assert isinstance(own, SourceSettings)
        named[source.name] = {location for location in source.locations(own) if location}
        assert {location for key, location in known.items() if key != "path"} <= named[source.name]
        assert not set(source.needed) - set(source.settings.model_fields)
    assert named["image_parquet"] == named["glue"] == {"shards", "r.txt"}
    assert {source.name: source.package.extra for source in SOURCES if source.package} == {
        "audio": "audio",
        "coco": "detection",
        "glue": "hub",
    }


def test_before_glob():
    assert before_glob("a/b*/c.parquet") == "a"
    assert before_glob("*.parquet") == "."
    assert before_glob("a/b.parquet") == "a/b.parquet"
    assert before_glob(None) is None


def test_a_missing_package_is_named_with_what_installs_it():
    assert OptionalPackage("json", "x").require("this").loads("1") == 1
    found = re.escape(f"source x needs the package nowhere_at_all ({install_command('y')}), or go")
    with pytest.raises(DataError, match=found):
        OptionalPackage("nowhere_at_all", "y").require("source x", "go")


def test_sources_are_registered_without_torch():
    code = (
        "import sys, mlorq.data, mlorq.config.run\n"
        "assert len(mlorq.data.SOURCES.names()) == 11\n"
        "heavy = {'torch', 'pyarrow', 'PIL', 'pycocotools', 'transformers', 'datasets', 'timm'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "mlorq.data.from_batches\n"
        "assert 'torch' in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
