"""Stores that are blocks of Prefect: their URLs, their credentials, and what is said of wrong ones."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any

import fsspec
import pytest

from flows.blocks import PLACES
from flows.permissions import is_below_roots
from mlorq.artifacts import locations
from mlorq.artifacts.store import Store
from mlorq.config.run import RunConfig
from mlorq.errors import ConfigError
from tests.flows.test_cli import fails, prints_json, write_project
from tests.s3 import changed_environment, s3_server

BUCKET = {"bucket_name": "box", "bucket_folder": "runs/"}
# Values as the server gives them, of the classes that the module names.
BLOCKS: list[tuple[str, dict[str, Any], str, dict[str, Any]]] = [
    ("remote-file-system", {"basepath": "s3://box/runs/"}, "s3://box/runs", {}),
    ("remote-file-system", {"basepath": "gs://box", "settings": {"token": "t"}}, "gs://box", {"token": "t"}),
    ("local-file-system", {"basepath": "/data/store"}, "file:///data/store", {}),
    (
        "s3-bucket",
        BUCKET
        | {
            "credentials": {
                "aws_access_key_id": "k",
                "aws_secret_access_key": "s",
                "aws_session_token": None,
                "region_name": "eu-west-1",
                "aws_client_parameters": {"use_ssl": True, "verify": True, "endpoint_url": "http://here:9"},
            }
        },
        "s3://box/runs",
        {"key": "k", "secret": "s", "client_kwargs": {"endpoint_url": "http://here:9", "region_name": "eu-west-1"}},
    ),
    (
        "s3-bucket",
        {
            "bucket_name": "box",
            "credentials": {
                "minio_root_user": "k",
                "minio_root_password": "s",
                "aws_client_parameters": {"use_ssl": False, "verify": False, "endpoint_url": "http://here:9"},
            },
        },
        "s3://box",
        {
            "key": "k",
            "secret": "s",
            "use_ssl": False,
            "client_kwargs": {"endpoint_url": "http://here:9", "verify": False},
        },
    ),
    (
        "gcs-bucket",
        {"bucket": "box", "bucket_folder": "a", "gcp_credentials": {"service_account_info": {"p": 1}, "project": "me"}},
        "gs://box/a",
        {"token": {"p": 1}, "project": "me"},
    ),
    (
        "azure-blob-storage-container",
        {"container_name": "box", "credentials": {"account_url": "https://me.blob.core.windows.net/"}},
        "az://box",
        {"account_name": "me"},
    ),
]


@pytest.mark.parametrize(("kind", "values", "url", "options"), BLOCKS)
def test_url_and_options_of_a_block(kind: str, values: dict[str, Any], url: str, options: dict[str, Any]) -> None:
    found, given = PLACES[kind](values)
    assert found == url
    assert {key: value for key, value in given.items() if value not in (None, "", {})} == options


def test_a_block_is_a_store_with_its_credentials(
    prefect_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from prefect.filesystems import RemoteFileSystem

    name = f"store-{uuid.uuid4().hex[:8]}"
    with s3_server() as server:
        url, environment = server.new_bucket(), server.environment
        settings = {
            "key": environment["FSSPEC_S3_KEY"],
            "secret": environment["FSSPEC_S3_SECRET"],
            "client_kwargs": {"endpoint_url": environment["FSSPEC_S3_ENDPOINT_URL"]},
        }
        RemoteFileSystem(basepath=url, settings=settings).save(name)
        with changed_environment({**dict.fromkeys(environment), "FSSPEC_S3": None, "AWS_EC2_METADATA_DISABLED": "1"}):
            block = f"block:remote-file-system/{name}"
            config = RunConfig.from_yaml(write_project(tmp_path, store=block))
            assert config.store == url
            assert str(settings["secret"]) in os.environ["FSSPEC_S3"]  # for child processes
            assert str(settings["secret"]) not in config.to_yaml()
            Store(url).write("step", "0" * 32, {"a": b"1"})
            fsspec.get_filesystem_class("s3").clear_instance_cache()
            (row,) = prints_json(capsys, "store", "ls", "--store", block)["steps"]
            assert row["step"] == "step"
            monkeypatch.setenv("MLORQ_STORE", block)
            assert RunConfig.from_yaml(write_project(tmp_path, store="file://./.mlorq")).store == url
            assert is_below_roots(url, os.environ)  # the owner of the worker has named it


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ("block:remote-file-system/nowhere", "there is no block remote-file-system/nowhere"),
        ("block:secret/nowhere", "no type of a store; there are remote-file-system"),
        ("block:", "no type of a store"),
    ],
)
def test_a_wrong_block_is_named(
    prefect_server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], block: str, said: str
) -> None:
    assert said in fails(capsys, "runs", "--store", block)
    assert said in fails(capsys, "compress", write_project(tmp_path, store=block))


def test_a_url_with_a_secret_is_refused(prefect_server: str) -> None:
    from prefect.filesystems import RemoteFileSystem

    name = f"store-{uuid.uuid4().hex[:8]}"
    RemoteFileSystem(basepath="s3://me:secret@box/x").save(name)
    with pytest.raises(ConfigError, match="has a secret in its URL") as error:
        locations.url_of_store(f"block:remote-file-system/{name}")
    assert "me:secret" not in str(error.value)


def test_without_prefect_a_url_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locations, "LOOKUPS", {})
    with pytest.raises(ConfigError, match="give a URL here"):
        RunConfig.from_mapping({"store": "block:s3-bucket/mine"})
