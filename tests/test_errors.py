"""Secrets of URLs appear in no error, cause, log line or configuration."""

from __future__ import annotations

import pickle
import traceback

import pytest

import mlorq
from mlorq.artifacts.locations import folder_of_url
from mlorq.config.run import RunConfig
from mlorq.config.sections import model_section
from mlorq.errors import KINDS, ConfigError, DataError, MlorqError, hide_secrets, no_secrets, one_line
from mlorq.models import load_model
from tests import zoo

SECRET = "hunter2"
URLS = [
    "sftp://me:hunter2@host/x",
    "s3://AKIA:hun@ter2hunter2@bucket/p",
    "https://hunter2@github.com/x.safetensors",
    "https://:hunter2@host:8080/x?y=1",
    "https://host/x?sig=hunter2&sv=3",
    "https://host/x?a=b&X-Amz-Signature=hunter2&X-Amz-Security-Token=hunter2",
    "https://host/x?X-Goog-Credential=hunter2%2Fx;api_key=hunter2#part",
    "zip://a.csv::https://me:hunter2@host/x.zip?access_token=hunter2",
    "sftp://me:hun/te@r?hunter2@host/x",
    '{"endpoint":"x","secret_key":"hunter2"}',
    "AWS_SECRET_ACCESS_KEY=hunter2",
    "me:hunter2@bucket",
]
PLAIN = [
    "s3://bucket/a@b:c",
    "file:///a:b@c",
    "https://host:8080/x@y?page=3&size=2#top",
    "sftp://me@host/x",
    "keys: sig=3, token 7 of pass=2; see https://host/tokens",
    "memory://store",
    "python:3.11@sha256:0123",
    "layer 3: x@y, blocks.0:attn",
]


@pytest.mark.parametrize("url", URLS)
def test_secrets_are_hidden_and_the_rest_stays(url):
    shown = hide_secrets(f"{url} cannot be read: '{url}'")
    assert SECRET not in shown
    assert "***" in shown
    assert shown.startswith(url.split("hun")[0])
    assert shown.split("'")[0].endswith(" cannot be read: ")
    assert hide_secrets(shown) == shown


@pytest.mark.parametrize("text", PLAIN)
def test_other_texts_stay_as_they_are(text):
    assert hide_secrets(text) == text
    assert str(MlorqError(text)) == text


@pytest.mark.parametrize("kind", [MlorqError, *KINDS.values()])
def test_every_error_of_the_library_hides_them(kind):
    error = kind(f"checkpoint {URLS[0]} is missing")
    assert str(error) == "checkpoint sftp://me:***@host/x is missing"
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (kind, str(error))


def test_a_secret_that_is_cut_is_hidden_first():
    text = f"{'x' * 280} https://me:{SECRET * 5}@host"
    assert SECRET[:3] not in one_line(ValueError(text))


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize("kind", ["foreign", "cause", "context", "deep"])
def test_no_traceback_shows_them(kind, url):
    @no_secrets()
    def fails() -> None:
        place = url.strip()
        if kind == "foreign":
            raise RuntimeError(f"no {place}")
        try:
            try:
                raise OSError(f"no {place}")
            except OSError as error:
                if kind == "deep":
                    raise ValueError("harmless") from error
                raise
        except (OSError, ValueError) as error:
            if kind == "context":
                raise DataError("no data")  # noqa: B904
            raise DataError("no data") from error

    with pytest.raises(MlorqError) as caught:
        fails()
    assert SECRET not in "".join(traceback.format_exception(caught.value))
    if kind == "foreign":
        assert str(caught.value).startswith("RuntimeError: no ")
    if kind == "deep":
        assert isinstance(caught.value.__cause__, ValueError)


def test_other_exceptions_keep_their_type():
    with pytest.raises(KeyError), no_secrets():
        raise KeyError("x")


DATA = {"source": "custom", "factory": "a:b"}


@pytest.mark.parametrize("url", URLS)
def test_configurations_with_secrets_are_refused(url):
    values = {"model": {"family": "custom", "factory": "a:b"}, "data": {"calibration": DATA, "evaluation": DATA}}
    timm = {"family": "timm", "name": "resnet18", "checkpoint": url}
    images = {"source": "image_folder", "root": url}
    for key, changes in {
        "store": {"store": url},
        "model.checkpoint": {"model": timm},
        "data.calibration.root": {"data": {"calibration": images, "evaluation": DATA}},
    }.items():
        with pytest.raises(ConfigError, match=f"^{key}: .* holds a secret") as caught:
            RunConfig.from_mapping(values | changes)
        assert SECRET not in str(caught.value)


def test_places_that_cannot_be_read_are_named_without_them(tmp_path):
    for place in (f"memory://a:{SECRET}@b/m", f"memory://b/m?token={SECRET}", f"nosuch://a:{SECRET}@b"):
        with pytest.raises(MlorqError) as caught:
            mlorq.load(place)
        assert SECRET not in "".join(traceback.format_exception(caught.value))
        model = model_section()(family="timm", name=zoo.VIT, arguments=zoo.VIT_ARGUMENTS, checkpoint=place)
        with pytest.raises(MlorqError) as caught:
            load_model(model, str(tmp_path))
        assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_configurations_have_no_secret_by_name_or_in_their_folder():
    values = {
        "model": {"family": "timm", "name": "vit_tiny_patch16_224", "checkpoint": "x.safetensors"},
        "data": {role: {"source": "image_folder", "root": "x"} for role in ("calibration", "evaluation")},
    }
    for key in ("token", "secret_key"):
        wrong = values | {"model": values["model"] | {"arguments": {key: SECRET}}}
        with pytest.raises(ConfigError, match=f"model.arguments.{key}: its value holds a secret") as error:
            RunConfig.from_mapping(wrong)
        assert SECRET not in str(error.value)
    with pytest.raises(ConfigError, match=r"folder: .* holds a secret") as error:
        RunConfig.from_mapping(values, f"https://me:{SECRET}@host/runs")
    assert SECRET not in str(error.value)
    assert folder_of_url(f"https://host/runs/a.yaml?sig={SECRET}/{SECRET}") == "https://host/runs"
