"""Configurations: strict, lossless, and clear about what is wrong."""

from __future__ import annotations

import copy
import os

import fsspec
import pytest
import yaml

from mlorq.artifacts.locations import absolute_folder, resolve_location
from mlorq.config.run import PRESETS, RunConfig
from mlorq.errors import ConfigError

BASE = {
    "model": {"family": "timm", "name": "vit_tiny_patch16_224", "checkpoint": "w.safetensors"},
    "data": {
        "calibration": {"source": "image_folder", "root": "images"},
        "evaluation": {"source": "image_folder", "root": "images", "labels": "labels.tsv"},
    },
}


def config(**changes) -> RunConfig:
    values = copy.deepcopy(BASE)
    for key, value in changes.items():
        target, parts = values, key.split("__")
        for part in parts[:-1]:
            target = target.setdefault(part, {})
        target[parts[-1]] = value
    return RunConfig.from_mapping(values)


def test_yaml_round_trip_is_lossless(tmp_path):
    first = config(budget=["3bit", "25%"], search__bits=[8, 2], seed=7)
    file = tmp_path / "c.yaml"
    file.write_text(first.to_yaml())
    second = RunConfig.from_yaml(file)
    assert second.model_copy(update={"folder": ""}) == first
    assert second.folder == str(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"serach": {}}, ["unknown key 'serach'", "'search'"]),
        ({"search__sampels": 3}, ["'search.sampels'", "'samples'"]),
        ({"data__calibration__rot": "x"}, ["data.calibration.rot", "'root'"]),
        ({"model__family": "tim"}, ["model.family", "tim"]),
        ({"search__bits": [3, 9]}, ["search.bits", "2 to 8"]),
        ({"search__bits": []}, ["bits"]),
        ({"search__samples": 0}, ["search.samples"]),
        ({"search__percentiles": [0.2]}, ["search.percentiles"]),
        ({"rounding__iterations": "many"}, ["rounding.iterations", "many"]),
        ({"data__calibration__root": None}, ["data.calibration", "needs root"]),
        ({"model__checkpoint": None}, ["model", "pretrained"]),
        ({"model__family": "custom"}, ["factory"]),
        ({"preset": "good"}, ["preset", "'good'", "'best'", "'fast'"]),
        ({"search__sensitivity": "guess"}, ["search.sensitivity", "'guess'", "'measured'"]),
        ({"search__forms": ["LR"]}, ["search", "forms must include Q"]),
        ({"rounding__method": "adaround"}, ["rounding.method", "'adaround'", "'nearest'", "'block'"]),
        ({"activations": {"bits": 40}}, ["activations.bits"]),
        ({"activations": {"choices": [4, 8], "compute": "4by4"}}, ["activations", "'4by4'", '"20G"']),
        ({"activations": {"choices": [6, 8], "compute": "4x4"}}, ["activations", "bits", "choices [6, 8]"]),
        ({"activations": {"choices": [4, 8]}}, ["activations", "choices and compute"]),
        ({"activations": {"method": "rep"}}, ["activations.method", "'repq'"]),
        ({"search__layers": {"blocks.*.fc1": {"bit": [8]}}}, ["'search.layers.blocks.*.fc1.bit'", "'bits'"]),
        ({"search__layers": {"head": {"bits": [9]}}}, ["search.layers.head.bits", "2 to 8"]),
        ({"search__layers": {"head": {"forms": ["LR"]}}}, ["search.layers.head", "forms must include Q"]),
        ({"search__layers": ["head"]}, ["search.layers"]),
    ],
)
def test_mistakes_are_one_line_that_names_the_key(changes, words):
    with pytest.raises(ConfigError) as caught:
        config(**changes)
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"search__rounds": 3},
            "search.rounds: removed; allocations are those of the integer program; delete the key",
        ),
        (
            {"search__tolerance": 0.1},
            "search.tolerance: removed; closed_form measures one candidate per layer; delete the key",
        ),
        ({"search__sensitivity": "auto"}, "search.sensitivity: auto was removed; use closed_form"),
    ],
)
def test_what_was_removed_is_one_line_that_says_what_to_do(changes, line):
    with pytest.raises(ConfigError) as caught:
        config(**changes)
    assert str(caught.value) == line


def test_missing_key_is_named():
    with pytest.raises(ConfigError, match="'data' is missing"):
        RunConfig.from_mapping({"model": BASE["model"]})


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"model": {"famly": "bert", "name": "x"}}, "unknown key 'model.famly'; did you mean 'family'?"),
        ({"model": None, "modle": BASE["model"]}, "unknown key 'modle'; did you mean 'model'?"),
        ({"data": {"calibraton": {}, "evaluation": {}}}, "unknown key 'data.calibraton'; did you mean 'calibration'?"),
        ({"model": {"name": "x", "colour": "blue"}}, "key 'model.family' is missing"),  # misspelt by neither
        ({"model": {"name": "x"}, "famly": "bert"}, "key 'model.family' is missing"),  # of another section
    ],
)
def test_a_misspelt_key_is_named_before_the_missing_one(changes, line):
    values = {key: value for key, value in (BASE | changes).items() if value is not None}
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_mapping(values)
    assert str(caught.value) == line


def test_presets_fill_in_beneath_what_is_written():
    paper = config(preset="paper", rounding__iterations=10)
    assert paper.rounding.iterations == 10
    assert paper.search.samples == PRESETS["paper"]["search"]["samples"] == 1024
    assert paper.search.hessian_probes == 100
    assert paper.search.time_limit == 120
    assert config(preset="paper").rounding.iterations == 20_000
    assert (config().preset, config().rounding.method) == ("best", "block")
    quick = config(preset="quick")
    assert (quick.rounding.method, quick.rounding.iterations) == ("lra", 500)


def test_files_that_are_no_configuration(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml does not exist"):
        RunConfig.from_yaml(tmp_path / "nowhere.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1,")
    with pytest.raises(ConfigError, match="is not YAML"):
        RunConfig.from_yaml(broken)
    broken.write_text("- 1")
    with pytest.raises(ConfigError, match="mapping"):
        RunConfig.from_yaml(broken)


def test_overrides_are_dotted_keys(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(config().to_yaml())
    found = RunConfig.from_yaml(file, {"search.samples": 5, "rounding.method": "nearest", "preset": "paper"})
    assert (found.search.samples, found.rounding.method, found.preset) == (5, "nearest", "paper")
    with pytest.raises(ConfigError, match="did you mean 'samples'"):
        RunConfig.from_yaml(file, {"search.samplse": 5})
    with pytest.raises(ConfigError, match="seed is a value"):
        RunConfig.from_yaml(file, {"seed.x": 5})


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("a/b.csv", "/base/a/b.csv"),
        ("../a", "/a"),
        ("/abs/x", "/abs/x"),
        ("file://./.mlorq", "file:///base/.mlorq"),
        ("file:///abs", "file:///abs"),
        ("s3://bucket/x", "s3://bucket/x"),
        ("memory://x", "memory://x"),
    ],
)
def test_relative_paths_start_at_the_configuration(location, expected):
    assert resolve_location(location, "/base") == expected


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("a/b.csv", "s3://bucket/runs/a/b.csv"),
        ("../a.csv", "s3://bucket/a.csv"),
        ("/abs/x", "/abs/x"),
        ("gs://other/x", "gs://other/x"),
        ("file://./.mlorq", f"file://{os.getcwd()}/.mlorq"),  # on this machine, whatever the file came from
    ],
)
def test_relative_paths_start_at_the_folder_of_a_configuration_behind_a_url(location, expected):
    assert resolve_location(location, "s3://bucket/runs") == expected
    for outside in ("../../other/x", "../.."):
        with pytest.raises(ConfigError, match="leads out of s3://bucket/runs"):
            resolve_location(outside, "s3://bucket/runs")


def test_a_configuration_behind_a_url(tmp_path):
    with fsspec.open("memory://runs/here/run.yaml", "w") as file:
        file.write(yaml.safe_dump(BASE))
    found = RunConfig.from_yaml("memory://runs/here/run.yaml", {"search.samples": 5})
    assert (found.folder, found.search.samples) == ("memory://runs/here", 5)
    assert absolute_folder(found.folder) == found.folder
    with pytest.raises(ConfigError, match=r"memory://runs/none\.yaml does not exist"):
        RunConfig.from_yaml("memory://runs/none.yaml")
    with pytest.raises(ConfigError, match="plain file"):
        RunConfig.from_yaml("zip://run.yaml::memory://runs/here/a.zip")
