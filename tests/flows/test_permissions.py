"""What runs of deployments may name: code, containers and locations, by the environment of the worker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from flows import permissions
from flows.compress import compress_flow
from flows.permissions import check_permitted, check_text, is_below_roots, is_limited
from flows.run_form import explicit_values, read_config
from mlorq.config.run import RunConfig
from mlorq.errors import ConfigError, ModelError
from tests.flows.test_cli import write_project

HARMLESS: dict[str, Any] = {
    "model": {"family": "transformers", "name": "somebody/encoder", "task": "sentence-similarity"},
    "data": {
        "calibration": {"source": "table", "path": "data/a.csv", "text": [0]},
        "evaluation": {"source": "table", "path": "data/b.csv", "text": [0, 1], "label": 2},
    },
}
DOCKER = {"steps": "docker", "docker": {}}
DASK = {"runner": "dask", "dask": {}}


def changed(values: Any, key: str, value: Any) -> Any:
    """Values with one of them replaced, by its dotted key."""
    name, _, rest = key.partition(".")
    return {**values, name: changed(values.get(name, {}), rest, value) if rest else value}


def config_of(folder: Path, key: str = "seed", value: Any = 0) -> RunConfig:
    base = HARMLESS
    if key.endswith("factory") and key.startswith("model"):
        base = {**HARMLESS, "model": {"family": "custom"}}
    elif key.startswith("data.") and key.endswith(("factory", "batches")):
        base = changed(HARMLESS, "data.evaluation", {"source": "custom", "factory": "fine:evaluate"})
    elif key.startswith("model.checkpoint"):
        base = {**HARMLESS, "model": {"family": "timm", "name": "vit_tiny_patch16_224"}}
    return RunConfig.from_mapping(changed(base, key, value), str(folder))


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "root" / "data").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    return tmp_path / "root"


# -- code and containers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "variable", "allowing"),
    [
        ("model.factory", "os:system", "MLORQ_ALLOWED_FACTORIES", "other:*, os:sys*"),
        ("data.evaluation.factory", "os:system", "MLORQ_ALLOWED_FACTORIES", "os:*"),
        ("data.evaluation.batches", "os:abort", "MLORQ_ALLOWED_FACTORIES", "fine:*,os:abort"),
        ("engine.docker.image", "evil/image:1", "MLORQ_ALLOWED_IMAGES", "evil/*"),
        ("engine.docker.volumes", ["/:/host"], "MLORQ_ALLOWED_VOLUMES", "/:/host"),
        ("engine.docker.user", "0:0", "MLORQ_ALLOWED_USERS", "0:0"),
        ("engine.docker.network", "host", "MLORQ_ALLOWED_NETWORKS", "host"),
        ("engine.docker.environment", ["PREFECT_API_KEY"], "MLORQ_ALLOWED_VARIABLES", "PREFECT_*"),
        ("engine.dask.cluster", "subprocess.Popen", "MLORQ_ALLOWED_CLUSTERS", "subprocess.*"),
        ("engine.dask.address", "tcp://elsewhere:1", "MLORQ_ALLOWED_CLUSTERS", "tcp://elsewhere:*"),
        ("engine.dask.arguments", {"preload": "evil.py"}, permissions.ARGUMENTS, "engine.dask.arguments.preload"),
        ("engine.ray.address", "ray://elsewhere:1", "MLORQ_ALLOWED_CLUSTERS", "ray://elsewhere:*"),
        ("engine.ray.arguments", {"runtime_env": {}}, permissions.ARGUMENTS, "engine.ray.arguments.runtime_env"),
        ("model.arguments", {"trust_remote_code": True}, permissions.ARGUMENTS, "model.arguments.trust_*"),
        ("model.arguments", {"weights_only": False}, permissions.ARGUMENTS, "model.arguments.weights_only"),
        ("model.arguments", {"attn_implementation": "some/kernels"}, permissions.ARGUMENTS, "model.arguments.*"),
    ],
)
def test_code_and_containers_need_permission(project: Path, key: str, value: Any, variable: str, allowing: str) -> None:
    config = config_of(project, key, value)
    environment = {permissions.ROOTS: str(project)}
    if key == "data.evaluation.batches":
        environment["MLORQ_ALLOWED_FACTORIES"] = "fine:*"
    with pytest.raises(ConfigError, match=rf"^{key}.*{variable}") as error:
        check_permitted(config, environment)
    assert "\n" not in str(error.value)
    check_permitted(config, environment | {variable: allowing} | ({"MLORQ_ALLOWED_FACTORIES": allowing + ",fine:*"}
        if variable == "MLORQ_ALLOWED_FACTORIES" else {}))  # fmt: skip


def test_harmless_values_need_no_permission(project: Path) -> None:
    environment = {permissions.ROOTS: str(project)}
    for config in (
        config_of(project),
        config_of(project, "engine", DOCKER),
        config_of(project, "engine", {**DASK, "dask": {"arguments": {"n_workers": 2, "memory_limit": "4GB"}}}),
        config_of(project, "model.arguments", {"hidden_dropout_prob": 0.0, "revision": "main"}),
    ):
        check_permitted(config, environment)


def test_metrics_of_scripts_need_permission() -> None:
    check_text("data.evaluation.metric", "spearman", {})
    check_text("data.evaluation.metric", "torchmetrics:F1Score", {})
    for metric in ("evaluate:f1", "evaluate:./mine"):
        with pytest.raises(ConfigError, match="MLORQ_ALLOWED_METRICS"):
            check_text("data.evaluation.metric", metric, {"MLORQ_ALLOWED_METRICS": "f1"})
    check_text("data.evaluation.metric", "evaluate:f1", {"MLORQ_ALLOWED_METRICS": "evaluate:f1"})


def test_volumes_are_compared_by_their_real_folders(project: Path) -> None:
    (project / "link").symlink_to(project.parent / "outside")
    allowed = {"MLORQ_ALLOWED_VOLUMES": f"{project}/*:/data:ro"}
    check_text("engine.docker.volumes.0", f"{project}/data:/data:ro", allowed)
    for host in ("link", "../outside", "data/../../outside"):
        with pytest.raises(ConfigError, match="MLORQ_ALLOWED_VOLUMES"):
            check_text("engine.docker.volumes.0", f"{project}/{host}:/data:ro", allowed)


# -- locations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("store", "file:///{outside}/store"),
        ("store", "s3://other/store"),
        ("engine.cache", "{outside}/cache"),
        ("model.name", "{outside}"),
        ("model.name", "../outside"),
        ("model.name", "link"),
        ("model.checkpoint", "../outside/model.safetensors"),
        ("data.calibration.path", "../outside/a.csv"),
        ("data.calibration.path", "link/*.parquet"),
        ("data.calibration.path", "http://169.254.169.254/latest"),
        ("data.evaluation.list", "{outside}/list.txt"),
        ("model.arguments", {"subfolder": "../../x"}),
        ("export", [{"to": "transformers", "source": "../outside"}]),
    ],
)
def test_locations_outside_the_roots_are_refused(project: Path, key: str, value: Any) -> None:
    outside = project.parent / "outside"
    (project / "link").symlink_to(outside)
    value = value.replace("{outside}", str(outside)) if isinstance(value, str) else value
    config = config_of(project, key, value)
    variables = {permissions.ARGUMENTS: "*"}
    with pytest.raises(ConfigError, match=rf"^{key}.*MLORQ_ROOTS") as error:
        check_permitted(config, {permissions.ROOTS: f"s3://mine, {project}", **variables})
    assert "\n" not in str(error.value)
    everywhere = {permissions.ROOTS: "*", **variables}
    check_permitted(config, everywhere)


@pytest.mark.parametrize(
    ("location", "inside"),
    [
        ("s3://mine/a", True),
        ("s3://mine/a/b//c", True),
        ("s3://mine/ab", False),
        ("s3://mine/a/../b", False),
        ("https://host/data/x.csv?version=1", True),
        ("https://host/data/%2e%2e/x.csv", False),
        ("https://host@evil/data/x.csv", False),
        ("http://host/data/x.csv", False),
        ("zip://x.csv::s3://mine/a/b.zip", True),
        ("zip://x.csv::s3://other/b.zip", False),
        ("reference://x::s3://mine/a/b.json", False),
        ("s3://mine/a::file:///etc/passwd", False),
        ("s3://other/a::s3://mine/a", False),
        ("/etc/passwd\0", False),
        ("memory://x", False),
    ],
)
def test_urls_below_roots(location: str, inside: bool) -> None:
    assert is_below_roots(location, {permissions.ROOTS: "s3://mine/a/,https://host/data"}) is inside


def test_the_working_directory_is_the_root_by_default(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    assert is_below_roots(str(project / "data"), {})
    assert is_below_roots(f"file://{project}", {})
    for location in (project.parent, f"{project}-2", project / ".." / "outside", "s3://bucket", "/"):
        assert not is_below_roots(str(location), {})


def test_names_in_packages_stay_inside_them() -> None:
    from mlorq.models.transformers import TransformersSettings, locate

    with pytest.raises(ModelError, match=r"folder .*/yaml does not exist"):  # no package of this machine
        locate(TransformersSettings(name="yaml/../yaml", task="fill-mask"))


# -- flows ------------------------------------------------------------------------------------------------------


@pytest.fixture
def limited(monkeypatch: pytest.MonkeyPatch, project: Path) -> Path:
    """As in the process that a worker starts, in the folder ``project``."""
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", "11111111-1111-1111-1111-111111111111")
    monkeypatch.chdir(project)
    return project


def test_runs_of_users_are_not_limited(project: Path) -> None:
    assert not is_limited()
    write_project(project)
    assert read_config("run.yaml", str(project)).model.own.factory == "tiny_project:build"


def test_parameters_are_checked_before_a_file_is_read(limited: Path) -> None:
    path = limited.parent / "outside" / "run.yaml"
    path.write_text("not: [yaml")
    for config, folder, key in ((str(path), "", "config"), ("run.yaml", str(path.parent), "folder")):
        for read in (read_config, explicit_values):
            with pytest.raises(ConfigError, match=rf"^{key}: .*MLORQ_ROOTS"):
                read(config, folder)
    write_project(limited)
    with pytest.raises(ConfigError, match=r"run\.yaml: model\.factory: 'tiny_project:build' is not allowed"):
        read_config("run.yaml")


def test_a_run_of_a_deployment(project: Path, prefect_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters of a flow run of a deployment: refused in its state, before their code is imported."""
    from prefect.client.orchestration import get_client
    from prefect.flow_engine import run_flow

    config = yaml.safe_load(write_project(project).read_text())
    marker = project / "imported"
    module = project / "tiny_project.py"
    module.write_text(f"open({str(marker)!r}, 'w').close()\n{module.read_text()}")
    monkeypatch.chdir(project)

    def run(parameters: dict[str, Any]) -> Any:
        with get_client(sync_client=True) as client:
            deployment = client.create_deployment(client.create_flow(compress_flow), "refusing")
            created = client.create_flow_run_from_deployment(deployment, parameters=parameters)
        state = run_flow(compress_flow, flow_run=created, parameters=parameters, return_type="state")
        with get_client(sync_client=True) as client:
            recorded = client.read_flow_run(created.id).state
        assert recorded is not None
        assert recorded.type == state.type
        return recorded

    state = run({"config": config, "folder": str(project)})
    assert state.type == "FAILED"
    assert "model.factory: 'tiny_project:build' is not allowed" in state.message
    assert "MLORQ_ALLOWED_FACTORIES" in state.message
    assert "\n" not in state.message
    assert not marker.exists()
    assert not (project / "store").exists()

    monkeypatch.setenv("MLORQ_ALLOWED_FACTORIES", "tiny_project:*")
    state = run({"config": config | {"budget": "0.1bit"}, "folder": str(project)})
    assert "the smallest possible is" in state.message  # it got as far as the model
    assert marker.exists()
