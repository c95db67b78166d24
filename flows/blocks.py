"""Stores that are blocks of Prefect: ``store: block:TYPE/NAME`` takes the URL and the credentials of a block.

The configuration then has the URL alone. The credentials reach the drivers of fsspec as a user's own do, by variables
of the environment (``FSSPEC_S3``), which child processes, containers and Dask's workers get as well.

Fields of the block types: ``prefect.filesystems``; prefect-aws 0.7, prefect-gcp 0.6 and prefect-azure 0.4, which need
not be installed here: the server has the values.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import Any

from mlorq.errors import ConfigError, hide_secrets

Place = tuple[str, dict[str, Any]]  # URL, and options of its driver


def url_of_block(name: str) -> str:
    """The URL of a block; the options of its driver are set in the environment.

    Args:
        name: ``TYPE/NAME``: the type's slug and the block's name, as in ``prefect block ls``.

    Raises:
        ConfigError: there is no such block, it is of a type that is no store, or the server does not answer.
    """
    kind, _, own = name.partition("/")
    if kind not in PLACES:
        raise ConfigError(f"store: block:{name}: no type of a store; there are {', '.join(PLACES)}, as block:TYPE/NAME")
    try:
        url, options = PLACES[kind](_values(kind, own))
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"store: block:{name} is not a complete block of its type ({type(error).__name__})") from None
    if hide_secrets(url) != url:
        raise ConfigError(f"store: block:{name} has a secret in its URL: put it into the block's settings")
    options = {key: value for key, value in options.items() if value not in (None, {}, "")}
    if options:
        import fsspec.config

        os.environ[f"FSSPEC_{url.partition('://')[0].upper()}"] = json.dumps(options)
        fsspec.config.set_conf_env(fsspec.config.conf)
    return url


def _values(kind: str, name: str) -> dict[str, Any]:
    """The values of a block, those of the blocks in it included.

    Without a configured server, the local database has them.
    """
    from flows.server import PrefectSession

    if _in_a_run():
        return _read(kind, name)
    with PrefectSession() as session:
        session.ready()
        return _read(kind, name)


def _in_a_run() -> bool:
    from prefect.context import FlowRunContext

    return FlowRunContext.get() is not None or "PREFECT__FLOW_RUN_ID" in os.environ


def _read(kind: str, name: str) -> dict[str, Any]:
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    try:
        with get_client(sync_client=True) as client:
            return dict(client.read_block_document_by_name(name, kind, include_secrets=True).data)
    except ObjectNotFound:
        raise ConfigError(f"store: there is no block {kind}/{name}: `prefect block ls` lists them") from None
    except httpx.HTTPError as error:
        raise ConfigError(f"store: block:{kind}/{name} cannot be read: {type(error).__name__}: {error}") from None


# -- one function per block type ----------------------------------------------------------------------------------


def _remote(block: Mapping[str, Any]) -> Place:
    return str(block["basepath"]).rstrip("/"), dict(block.get("settings") or {})


def _local(block: Mapping[str, Any]) -> Place:
    path = os.path.expanduser(block["basepath"])
    if not os.path.isabs(path):
        raise ValueError("basepath")
    return f"file://{path}", {}


def _s3(block: Mapping[str, Any]) -> Place:
    given = block.get("credentials") or {}
    client = given.get("aws_client_parameters") or {}
    for_client = {
        "endpoint_url": client.get("endpoint_url"),
        "verify": client.get("verify_cert_path") or (False if client.get("verify") is False else None),
        "region_name": given.get("region_name"),
    }
    options = {
        "key": given.get("aws_access_key_id") or given.get("minio_root_user"),
        "secret": given.get("aws_secret_access_key") or given.get("minio_root_password"),
        "token": given.get("aws_session_token"),
        "profile": given.get("profile_name"),
        "use_ssl": False if client.get("use_ssl") is False else None,
        "client_kwargs": {key: value for key, value in for_client.items() if value is not None},
    }
    return _joined("s3", block["bucket_name"], block.get("bucket_folder")), options


def _gcs(block: Mapping[str, Any]) -> Place:
    given = block.get("gcp_credentials") or {}
    token = given.get("service_account_info") or given.get("service_account_file")
    return _joined("gs", block["bucket"], block.get("bucket_folder")), {"token": token, "project": given.get("project")}


def _azure(block: Mapping[str, Any]) -> Place:
    given = block.get("credentials") or {}
    account = str(given.get("account_url") or "").partition("://")[2].partition(".")[0]
    options = {"connection_string": given.get("connection_string"), "account_name": account}
    options |= {key: given.get(key) for key in ("client_id", "tenant_id", "client_secret")}
    return _joined("az", block["container_name"], block.get("base_folder")), options


def _joined(scheme: str, bucket: str, folder: str | None) -> str:
    return f"{scheme}://" + "/".join(part.strip("/") for part in (bucket, folder or "") if part.strip("/"))


PLACES: dict[str, Callable[[Mapping[str, Any]], Place]] = {
    "remote-file-system": _remote,
    "local-file-system": _local,
    "s3-bucket": _s3,
    "gcs-bucket": _gcs,
    "azure-blob-storage-container": _azure,
}
