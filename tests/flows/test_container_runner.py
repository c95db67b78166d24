"""Steps in containers: what a container is given, what comes back, and that none is left behind.

What needs no engine runs always. The rest is marked ``long`` besides ``docker``: the image is built in minutes.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

pytest.importorskip("docker")

from prefect.settings import Settings
from prefect.settings.legacy import _get_valid_setting_names

from flows.permissions import check_place
from flows.run import open_session
from flows.runners import InProcessRunner, Runner, make_runner
from flows.runners import container_setup as setup
from flows.runners.container import LABELS, ContainerRunner, cache_folder, remove_left_overs
from mlorq.config.budget import parse_budgets
from mlorq.config.run import RunConfig
from mlorq.errors import ConfigError, ModelError, StoreError, TransientError
from steps import pipeline
from steps.base import Outcome, StepSpec
from steps.pipeline import run_pipeline
from tests.engine import BASE, docker_engine, mlorq_image  # noqa: F401
from tests.flows.test_cli import write_project
from tests.s3 import SECRET as S3_SECRET
from tests.s3 import s3_server
from tests.watch import Watch

ROOT = Path(__file__).parents[2]
SECRET = "wJalrXUtnFEMI-example-secret"


def project(folder: Path, **changes: Any) -> RunConfig:
    folder.mkdir(exist_ok=True)
    return RunConfig.from_yaml(write_project(folder, **changes))


def binds(config: RunConfig, cache: str | None = None, **environment: str) -> dict[str, tuple[str, bool]]:
    """Mounts as ``{inside: (outside, whether it is read-only)}``."""
    return {bind.target: (bind.source, bind.read_only) for bind in setup.binds_of(config, cache, environment)}


def minilm(folder: Path, **model: Any) -> RunConfig:
    """A configuration with paths of many kinds."""
    texts = {"source": "table", "path": "texts.csv", "text": [0]}
    values = {
        "model": {"family": "transformers", "task": "sentence-similarity", **model},
        "data": {"calibration": texts, "evaluation": {**texts, "label": 1}},
    }
    return RunConfig.from_mapping(values, str(folder))


# -- mounts -----------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder of the test's own, without anybody's credentials."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    return home


def test_folders_that_exports_name_are_mounted(tmp_path: Path) -> None:
    for name in ("run", "words"):
        (tmp_path / name).mkdir()
    (tmp_path / "run" / "texts.csv").touch()
    config = minilm(tmp_path / "run", name="sentence-transformers/all-MiniLM-L6-v2")
    words = str(tmp_path / "words")
    assert words not in binds(config)
    values = config.model_dump(exclude={"folder"}) | {"export": [{"to": "onnx", "tokenizer": "../words"}]}
    assert binds(RunConfig.from_mapping(values, config.folder))[words] == (words, True)


def test_folders_of_metrics_are_mounted(tmp_path: Path) -> None:
    pytest.importorskip("evaluate", reason="needs the extra metrics")
    for name in ("run", "near"):
        (tmp_path / name).mkdir()
    (tmp_path / "run" / "texts.csv").touch()
    config = minilm(tmp_path / "run", name="sentence-transformers/all-MiniLM-L6-v2")
    values = config.model_dump(exclude={"folder"})
    values["data"]["evaluation"]["metric"] = "evaluate:../near"
    near = str(tmp_path / "near")
    assert near not in binds(config)
    assert binds(RunConfig.from_mapping(values, config.folder))[near] == (near, True)


def test_configuration_is_read_and_store_is_written_at_their_own_paths(tmp_path: Path) -> None:
    config = project(tmp_path / "run")
    assert binds(config) == {
        str(tmp_path / "run"): (str(tmp_path / "run"), True),
        str(tmp_path / "run" / "store"): (str(tmp_path / "run" / "store"), False),
    }
    assert (tmp_path / "run" / "store").is_dir()  # else the engine would refuse it, or make it as root


def test_a_store_that_is_the_configurations_folder_can_be_written(tmp_path: Path) -> None:
    assert binds(project(tmp_path, store="file://.")) == {str(tmp_path): (str(tmp_path), False)}


def test_a_store_whose_folder_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot create the folder"):
        binds(project(tmp_path / "run", store=f"file://{tmp_path}/file/store"))


def test_paths_outside_are_mounted_once_and_links_to_where_they_lead(tmp_path: Path) -> None:
    for name in ("run", "data", "models/minilm"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "data" / "texts.csv").write_text("a,1")
    (tmp_path / "run" / "texts.csv").symlink_to(tmp_path / "data" / "texts.csv")
    (tmp_path / "link").symlink_to(tmp_path / "models")
    found = binds(minilm(tmp_path / "run", name=str(tmp_path / "link" / "minilm")))
    assert found == {
        str(tmp_path / "run"): (str(tmp_path / "run"), True),
        str(tmp_path / "run" / ".mlorq"): (str(tmp_path / "run" / ".mlorq"), False),
        str(tmp_path / "link" / "minilm"): (str(tmp_path / "models" / "minilm"), True),
        str(tmp_path / "data" / "texts.csv"): (str(tmp_path / "data" / "texts.csv"), True),
    }


def test_a_store_behind_a_link_is_mounted_where_the_link_leads(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "large").mkdir()
    (tmp_path / "run" / "store").symlink_to(tmp_path / "large")
    found = binds(project(tmp_path / "run"))
    assert found[str(tmp_path / "large")] == (str(tmp_path / "large"), False)
    assert str(tmp_path / "run" / "store") not in found


def test_what_is_not_there_is_left_to_the_step(tmp_path: Path) -> None:
    model = {"family": "timm", "name": "vit_tiny_patch16_224", "checkpoint": "/nowhere/model.safetensors"}
    images = {"source": "image_folder", "root": "/nowhere/images", "labels": "s3://bucket/labels.tsv"}
    values = {"model": model, "data": {"calibration": images, "evaluation": images}}
    assert [*binds(RunConfig.from_mapping(values, str(tmp_path)))] == [str(tmp_path), str(tmp_path / ".mlorq")]


def test_lists_globs_and_glue_from_the_hub_are_mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup.constants, "HF_HOME", str(tmp_path / "hub"))
    for folder in ("run", "shards", "lists"):
        (tmp_path / folder).mkdir()
    (tmp_path / "lists" / "rows.txt").write_text("1\n")
    model = {"family": "timm", "name": "vit_tiny_patch16_224", "checkpoint": "model.safetensors"}
    images = {"source": "image_parquet", "path": "../shards/*.parquet", "list": "../lists/rows.txt"}
    values = {"model": model, "data": {"calibration": images, "evaluation": images}}
    found = binds(RunConfig.from_mapping(values, str(tmp_path / "run")))
    assert str(tmp_path / "shards") in found
    assert str(tmp_path / "lists" / "rows.txt") in found
    assert str(tmp_path / "hub") not in found
    model = {"family": "transformers", "name": "torch/nn", "task": "text-classification"}
    glue = {"source": "glue", "task": "rte"}
    values = {"model": model, "data": {"calibration": glue, "evaluation": glue}}
    assert str(tmp_path / "hub") in binds(RunConfig.from_mapping(values, str(tmp_path / "run")))


def test_a_package_needs_no_mount_and_a_model_of_the_hub_the_hubs_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup.constants, "HF_HOME", str(tmp_path / "hub"))
    packaged = minilm(tmp_path / "run", name="torch/nn")  # any folder of any package
    assert str(tmp_path / "hub") not in binds(packaged)
    fetched = minilm(tmp_path / "run", name="somebody/some-model")
    assert binds(fetched)[str(tmp_path / "hub")] == (str(tmp_path / "hub"), False)
    assert setup.environment_of(fetched, "cpu", {})["HF_HOME"] == str(tmp_path / "hub")


def test_a_remote_store_has_its_cache_and_credential_files(tmp_path: Path, home: Path) -> None:
    (home / ".aws").mkdir()
    (home / ".config" / "fsspec").mkdir(parents=True)
    bundle = tmp_path / "ca.crt"
    bundle.write_text("")
    local, remote = project(tmp_path / "run"), project(tmp_path / "run", store="s3://bucket/store")
    found = binds(remote, str(tmp_path / "cache"), AWS_CA_BUNDLE=str(bundle))
    assert found == {
        str(tmp_path / "run"): (str(tmp_path / "run"), True),
        str(tmp_path / "cache"): (str(tmp_path / "cache"), False),
        str(bundle): (str(bundle), True),
        "/tmp/.aws": (str(home / ".aws"), True),
        setup.FSSPEC_FOLDER: (str(home / ".config" / "fsspec"), True),
    }
    assert "/tmp/.aws" not in binds(local)
    assert setup.environment_of(remote, "cpu", {})["FSSPEC_CONFIG_DIR"] == setup.FSSPEC_FOLDER
    assert cache_folder(local) is None
    assert cache_folder(project(tmp_path / "run", store="s3://bucket/store", engine={"cache": None})) is None
    named = project(tmp_path / "run", store="s3://bucket/store", engine={"cache": "./copies"})
    assert cache_folder(named) == str(tmp_path / "run" / "copies")
    assert str(cache_folder(remote)).startswith(f"{home}/.cache/mlorq/")


def test_the_users_own_volumes_have_the_last_word(tmp_path: Path) -> None:
    volumes = ["/data:/data:ro", "/scratch:/scratch", f"/other:{tmp_path}:rw"]
    found = binds(project(tmp_path, engine={"docker": {"volumes": volumes}}))
    assert found["/data"] == ("/data", True)
    assert found["/scratch"] == ("/scratch", False)
    assert found[str(tmp_path)] == ("/other", False)


def test_the_root_is_not_mounted(tmp_path: Path) -> None:
    config = project(tmp_path).model_copy(update={"folder": "/"})
    with pytest.raises(ConfigError, match="as the root of a container"):
        binds(config)


# -- environment ------------------------------------------------------------------------------------------------------


def test_variables_of_object_stores_and_named_ones_are_handed_on(tmp_path: Path) -> None:
    config = project(tmp_path, engine={"threads": 3, "docker": {"environment": ["MY_SETTING", "NOT_SET"]}})
    outside = {
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "FSSPEC_S3_ENDPOINT_URL": "http://localhost:9000",
        "GOOGLE_CLOUD_PROJECT": "p",
        "AZURE_STORAGE_ACCOUNT_NAME": "a",
        "https_proxy": "http://me:password@proxy",
        "MY_SETTING": "hello there",
        "OMP_NUM_THREADS": "7",
        "OPENBLAS_CORETYPE": "Haswell",
        "PATH": "/bin",
        "PYTHONPATH": "/somewhere",
        "SSH_AUTH_SOCK": "/x",
    }
    inside = setup.environment_of(config, "cpu", outside)
    assert inside == {
        **{name: outside[name] for name in list(outside)[:6]},
        "OPENBLAS_CORETYPE": "Haswell",  # the same numbers inside and outside
        "OMP_NUM_THREADS": "3",
        "HOME": "/tmp",
        "USER": "mlorq",
        "LOGNAME": "mlorq",
        "CUDA_VISIBLE_DEVICES": "",
        "NVIDIA_VISIBLE_DEVICES": "void",
    }
    secrets = setup.secrets_of(config, outside)
    assert set(secrets) == {SECRET, "http://me:password@proxy", "hello there"}
    assert setup.hide(f"key {SECRET}, {SECRET}; at http://localhost:9000", secrets) == (
        "key ***, ***; at http://localhost:9000"
    )


def test_a_secret_of_several_lines_is_in_no_line(tmp_path: Path) -> None:
    key = "-----BEGIN-----\nabcdefgh\nij\n"
    assert setup.secrets_of(project(tmp_path), {"AWS_PRIVATE_KEY": key}) == ["-----BEGIN-----", "abcdefgh"]


@pytest.mark.parametrize(
    ("visible", "device", "gpu"),
    [(None, "cuda:1", "1"), ("2,5", "cuda:1", "5"), ("GPU-ab,MIG-cd", "cuda:0", "GPU-ab"), ("3", "cuda", "3")],
)
def test_a_gpu_is_named_as_the_engine_knows_it(
    visible: str | None, device: str, gpu: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert setup.gpu_of(device) == gpu
    assert "CUDA_VISIBLE_DEVICES" not in setup.environment_of(minilm(Path("/x"), name="torch/nn"), device, {})


# -- before any work --------------------------------------------------------------------------------------------------


def test_without_an_engine_there_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = project(tmp_path, engine={"steps": "docker"})
    for host in (f"unix://{tmp_path}/none.sock", "tcp://127.0.0.1:9"):
        monkeypatch.setenv("DOCKER_HOST", host)
        with pytest.raises(ConfigError, match="no Docker engine answers") as caught:
            make_runner(config, "cpu", lambda: open_session(config).worker)
        assert host in str(caught.value)
        assert "\n" not in str(caught.value)
        assert "Traceback" not in str(caught.value)
    assert "No such file or directory" in str(_refused(config, f"unix://{tmp_path}/none.sock", monkeypatch))


def _refused(config: RunConfig, host: str, monkeypatch: pytest.MonkeyPatch) -> ConfigError:
    monkeypatch.setenv("DOCKER_HOST", host)
    with pytest.raises(ConfigError) as caught:
        ContainerRunner(config, "cpu")
    return caught.value


def test_a_memory_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="lives in one process"):
        ContainerRunner(project(tmp_path, store="memory://x"), "cpu")


@pytest.mark.docker
@pytest.mark.long  # an engine may have to be installed
def test_an_image_that_is_not_there_is_not_pulled(docker_engine: Any, tmp_path: Path) -> None:  # noqa: F811
    config = project(tmp_path, engine={"docker": {"image": "mlorq:never-built"}})
    with pytest.raises(ConfigError, match=re.escape("docker build -f docker/Dockerfile -t mlorq:never-built .")):
        ContainerRunner(config, "cpu")


# -- files of docker/ -------------------------------------------------------------------------------------------------


def compose_command() -> list[str] | None:
    """Docker's compose, as a plugin or as the older program of its own."""
    plugin = ["docker", "compose"]
    if shutil.which("docker") and subprocess.run([*plugin, "version"], capture_output=True).returncode == 0:
        return plugin
    return ["docker-compose"] if shutil.which("docker-compose") else None


def test_the_compose_file_is_valid() -> None:
    command = compose_command()
    if command is None:
        pytest.skip("neither docker compose nor docker-compose is installed (Debian: apt-get install docker-compose)")
    file = ["-f", str(ROOT / "docker" / "compose.yaml")]
    values = {
        "POSTGRES_PASSWORD": "a",
        "PREFECT_PASSWORD": "d",
        "S3_ACCESS_KEY": "b",
        "S3_SECRET_KEY": "c",
        "PATH": os.environ["PATH"],
    }
    done = subprocess.run([*command, *file, "config"], capture_output=True, text=True, env=values)
    assert done.returncode == 0, done.stderr
    assert {"postgres", "prefect", "s3", "worker"} <= set(yaml.safe_load(done.stdout)["services"])
    done = subprocess.run(
        [*command, *file, "config", "-q"], capture_output=True, text=True, env={"PATH": values["PATH"]}
    )
    assert done.returncode != 0
    assert "set it in docker/.env" in done.stderr


def test_compose_services_are_pinned_watched_and_documented() -> None:
    text = (ROOT / "docker" / "compose.yaml").read_text()
    services = yaml.safe_load(text)["services"]
    for name, service in services.items():
        image = service["image"]
        assert image.startswith("${MLORQ_") or re.search(r":[\w.-]*\d[\w.-]*\}?$", image), f"{name}: {image}"
        once = service["restart"] in ("no", "on-failure")  # it ends by itself
        assert once or name == "services" or "healthcheck" in service, name
        waited = service.get("depends_on", {})
        assert set(waited) <= set(services)
    documented = set(re.findall(r"(?m)^([A-Z0-9_]+)=", (ROOT / "docker" / "env.example").read_text()))
    used = set(re.findall(r"\$\{([A-Z0-9_]+)", text))
    for name in (
        "POSTGRES_PASSWORD",
        "PREFECT_PASSWORD",
        "S3_ACCESS_KEY",
        "S3_SECRET_KEY",
    ):  # no default that somebody would keep
        assert set(re.findall(rf"\${{{name}(.)", text)) == {":"}
        assert f"${{{name}:-" not in text
    assert used == documented - {"COMPOSE_PROJECT_NAME"}


def test_compose_runs_a_server_that_several_can_share() -> None:
    services = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"]
    shared = services["prefect"]["environment"]
    assert services["services"]["environment"] == services["migrate"]["environment"] == shared
    assert "--no-services" in services["prefect"]["command"]
    assert services["services"]["command"] == ["prefect", "server", "services", "start"]
    # Every variable is a setting of the installed Prefect, and every module of messages exists.
    known = _get_valid_setting_names(Settings)
    for name, value in shared.items():
        assert name in known or name == "DO_NOT_TRACK" or name.startswith("PREFECT_REDIS_MESSAGING_"), name
        if str(value).startswith("prefect_redis."):
            assert importlib.util.find_spec(value) is not None, value
    # The same password for the server and for its clients, and nothing open to other machines.
    password = shared["PREFECT_SERVER_API_AUTH_STRING"]
    for name in ("worker", "worker-gpu", "deploy"):
        assert services[name]["environment"]["PREFECT_API_AUTH_STRING"] == password
        assert services[name]["environment"]["PREFECT_API_URL"] == "http://prefect:4200/api"
    for service in services.values():
        assert all(str(port).startswith("127.0.0.1:") for port in service.get("ports", ()))


def test_compose_deploys_what_its_pool_runs() -> None:
    services = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"]
    (names,) = re.findall(r"for name in ([a-z ]+);", services["deploy"]["command"][-1])
    deployments = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    assert set(names.split()) == {item["name"] for item in deployments if item["work_pool"]["name"] == "mlorq"}
    # Configurations are read-only there, so their default store is elsewhere, and permitted.
    worker = services["worker"]
    assert all(volume.endswith(":ro") for volume in worker["volumes"] if not volume.startswith("cache:"))
    place = worker["environment"]["MLORQ_STORE"]
    config = RunConfig.from_yaml(ROOT / "examples" / "minilm.yaml")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLORQ_STORE", place)
        moved = RunConfig.from_yaml(ROOT / "examples" / "minilm.yaml")
    assert config.store == "file://./.mlorq"
    assert moved == config.model_copy(update={"store": place})
    check_place("store", f"{place}/x", {"MLORQ_ROOTS": "/projects", "MLORQ_STORE": place})


def test_the_context_of_the_image_is_what_the_dockerfile_needs() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert lines[1] == "*"
    kept = {line[1:] for line in lines if line.startswith("!")}
    assert kept == {"pyproject.toml", "constraints.txt", "README.md", "LICENSE", "NOTICE.md", "mlorq", "steps", "flows"}


# -- in containers ----------------------------------------------------------------------------------------------------


def in_containers(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.docker(pytest.mark.long(test))


@pytest.fixture
def settings(docker_engine: Any, mlorq_image: str) -> Iterator[dict[str, Any]]:  # noqa: F811
    """The engine section of a run in containers; none of ours is left after the test."""
    yield {"devices": "cpu", "threads": 1, "steps": "docker", "docker": {"image": mlorq_image, "network": "none"}}
    assert ours(docker_engine) == []


def left_by(client: Any, pid: int) -> list[dict[str, Any]]:
    """The containers that a process has started."""
    named = client.api.containers(all=True, filters={"label": LABELS[2]})
    return [box for box in named if box["Labels"][LABELS[2]].startswith(f"{pid}@")]


def ours(client: Any) -> list[dict[str, Any]]:
    """The containers that this process has started."""
    return left_by(client, os.getpid())


def files(store: Path) -> dict[str, bytes]:
    """Every file of a store but manifests and pages of runs, which hold times, and indices of searches (paths)."""
    found = {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}
    return {
        name: data
        for name, data in found.items()
        if not name.endswith("manifest.json") and not name.startswith(("search/", "report/"))
    }


class Recorder:
    """An executor without Prefect: runs what the pipeline asks for, one step after another."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.watch = Watch()
        self.specs: list[StepSpec] = []
        self.reused = 0

    def phase(self, name: str, total: int, budget: str = "") -> None:
        pass

    def run(self, spec: StepSpec) -> Outcome:
        outcome = self.runner.run(spec, self.watch)
        assert outcome.ref == spec.ref
        self.specs.append(spec)
        self.reused += outcome.reused
        return outcome

    def map(self, specs: Sequence[StepSpec]) -> list[Outcome]:
        return [self.run(spec) for spec in specs]


def in_a_container_do(folder: Path, code: str) -> None:
    """Have ``build`` of a project's model do something first, where it is called in a container."""
    with (folder / "tiny_project.py").open("a") as file:
        file.write(f"""
import os, sys, time
_build = build

def build():
    if os.path.exists("/run/mlorq/step.json"):
        print("we are inside", file=sys.stderr, flush=True)
        {code}
    return _build()
""")


@pytest.fixture
def running(tmp_path: Path, settings: dict[str, Any]) -> tuple[ContainerRunner, StepSpec]:
    """A runner, and a step of it that sleeps."""
    config = project(tmp_path / "run", engine=settings)
    in_a_container_do(tmp_path / "run", "time.sleep(600)")
    return ContainerRunner(config, "cpu"), pipeline.layers.spec(open_session(config))


@in_containers
def test_a_run_in_containers_makes_the_same_artifacts(tmp_path: Path, settings: dict[str, Any]) -> None:
    changes = {"search": {"points": 2, "include": ["blocks.1.*"]}, "rounding": {"iterations": 5}}
    ours, theirs = project(tmp_path / "a", **changes), project(tmp_path / "b", **changes, engine=settings)
    inside = Recorder(InProcessRunner(open_session(ours).worker))
    run_pipeline(open_session(ours), inside, parse_budgets("4bit"))
    runner = make_runner(theirs, "cpu", lambda: open_session(theirs).worker)
    assert isinstance(runner, ContainerRunner)
    assert runner.place == f"cpu in a container of {settings['docker']['image']}"
    containers = Recorder(runner)
    run_pipeline(open_session(theirs), containers, parse_budgets("4bit"))
    assert [spec.key for spec in containers.specs] == [spec.key for spec in inside.specs]
    assert containers.reused == 0
    made = files(tmp_path / "b" / "store")
    assert made
    assert made == files(tmp_path / "a" / "store")
    assert "a library that prints" in containers.watch.lines  # and not among the events
    assert containers.watch.done[-1][0] == containers.watch.done[-1][1]
    runner.close()
    assert runner.run(containers.specs[0], Watch()).reused  # found by the container, and the runner goes on


@in_containers
def test_a_steps_error_comes_back_as_what_it_was(tmp_path: Path, settings: dict[str, Any]) -> None:
    config = project(tmp_path, engine=settings)
    layers = pipeline.layers.spec(open_session(config))
    broken = project(tmp_path, engine=settings, search={"include": ["nothing"]})
    with pytest.raises(ConfigError, match=r"search\.include: pattern 'nothing' matches no linear layer"):
        ContainerRunner(broken, "cpu").run(pipeline.layers.spec(open_session(broken)), Watch())
    runner = ContainerRunner(config, "cpu")
    with pytest.raises(ConfigError, match="but version 999 was requested"):
        runner.run(StepSpec("layers", 999, layers.params, layers.inputs), Watch())
    with pytest.raises(RuntimeError, match="ValidationError"):  # a defect, with the traceback
        runner.run(StepSpec("capture", pipeline.capture.STEP.version, {}, {}), Watch())


@in_containers
def test_an_image_without_mlorq_says_so(tmp_path: Path, settings: dict[str, Any]) -> None:
    docker = settings["docker"] | {"image": BASE}
    config = project(tmp_path, engine=settings | {"docker": docker})
    with pytest.raises(ConfigError, match=r"check that engine.docker.image .* has this version.*No module named"):
        ContainerRunner(config, "cpu").run(pipeline.layers.spec(open_session(config)), Watch())


@in_containers
def test_without_gpus_in_the_engine_there_is_one_clear_line(tmp_path: Path, settings: dict[str, Any]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ConfigError, match=r"engine.devices: cuda:0 cannot be used in containers of .*: ") as caught:
        ContainerRunner(project(tmp_path, engine=settings), "cuda:0")
    assert "\n" not in str(caught.value)


@in_containers
def test_a_killed_container_is_a_passing_fault(
    running: tuple[ContainerRunner, StepSpec],
    docker_engine: Any,  # noqa: F811
) -> None:
    runner, spec = running

    def kill(line: str) -> None:
        if line == "we are inside":
            (box,) = ours(docker_engine)
            docker_engine.api.kill(box["Id"])

    with pytest.raises(TransientError, match=r"was killed \(status 137\)(.|\n)*we are inside"):
        runner.run(spec, Watch(on_log=kill))


@in_containers
def test_a_container_that_needs_too_much_memory(tmp_path: Path, settings: dict[str, Any]) -> None:
    docker = settings["docker"] | {"memory": "48m"}
    config = project(tmp_path, engine=settings | {"docker": docker})
    with pytest.raises(TransientError, match=r"more than engine.docker.memory \(48m\)"):
        ContainerRunner(config, "cpu").run(pipeline.layers.spec(open_session(config)), Watch())


@in_containers
@pytest.mark.parametrize("how", ["check", "log"])
def test_an_interrupted_run_leaves_no_container(
    running: tuple[ContainerRunner, StepSpec],
    how: str,
    docker_engine: Any,  # noqa: F811
) -> None:
    runner, spec = running
    seen: list[list[dict[str, Any]]] = []

    def stop(line: str) -> None:
        if line == "we are inside":
            seen.append(ours(docker_engine))
            if how == "log":
                raise KeyboardInterrupt
            watch.stop = KeyboardInterrupt()

    watch = Watch(on_log=stop)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        runner.run(spec, watch)
    assert time.monotonic() - started < 120
    (boxes,) = seen
    assert [box["State"] for box in boxes] == ["running"]
    assert boxes[0]["Labels"]["mlorq.step"] == "layers"
    assert ours(docker_engine) == []


FLOW = """
import sys
from flows.run import open_session
from flows.runners.container import ContainerRunner
from mlorq.config.run import RunConfig
from steps import pipeline
from tests.flows.test_container_runner import Watch

config = RunConfig.from_yaml(sys.argv[1])
runner = ContainerRunner(config, "cpu")
runner.run(pipeline.layers.spec(open_session(config)), Watch(on_log=lambda line: print(line, flush=True)))
"""


@in_containers
def test_a_killed_flow_ends_its_container_and_the_next_flow_removes_it(
    tmp_path: Path,
    settings: dict[str, Any],
    docker_engine: Any,  # noqa: F811
) -> None:
    project(tmp_path / "run", engine=settings)
    in_a_container_do(tmp_path / "run", "time.sleep(600)")
    flow = subprocess.Popen(
        [sys.executable, "-c", FLOW, str(tmp_path / "run" / "run.yaml")], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert flow.stdout is not None
    with flow.stdout:
        assert any(line.strip() == "we are inside" for line in flow.stdout)
        (box,) = left_by(docker_engine, flow.pid)
        assert box["State"] == "running"
        remove_left_overs(docker_engine)
        assert len(left_by(docker_engine, flow.pid)) == 1  # of a flow that lives
        flow.kill()
        flow.wait()
    deadline = time.monotonic() + 60
    while left_by(docker_engine, flow.pid)[0]["State"] == "running" and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left_by(docker_engine, flow.pid)[0]["State"] == "exited"  # by itself
    ContainerRunner(project(tmp_path / "next", engine=settings), "cpu")
    assert left_by(docker_engine, flow.pid) == []


@in_containers
def test_credentials_arrive_and_are_in_no_line(
    tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = project(tmp_path, engine=settings)
    in_a_container_do(
        tmp_path,
        f"""secret = os.environ["AWS_SECRET_ACCESS_KEY"]
        open({str(tmp_path / "store" / "seen")!r}, "w").write(secret)
        print("the key is", secret, file=sys.stderr)
        raise ValueError("what is " + secret)""",
    )
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    watch = Watch()
    with pytest.raises(ModelError, match=r"what is \*\*\*") as caught:
        ContainerRunner(config, "cpu").run(pipeline.layers.spec(open_session(config)), watch)
    assert (tmp_path / "store" / "seen").read_text() == SECRET
    assert "the key is ***" in watch.lines
    assert SECRET not in "".join(watch.lines) + str(caught.value)


@in_containers
def test_steps_in_containers_work_on_an_object_store(tmp_path: Path, settings: dict[str, Any]) -> None:
    pytest.importorskip("moto")
    changes = {"search": {"points": 2, "include": ["blocks.1.*"]}, "rounding": {"method": "nearest"}}
    local = project(tmp_path / "a", **changes)
    inside = Recorder(InProcessRunner(open_session(local).worker))
    run_pipeline(open_session(local), inside, parse_budgets("4bit"))
    with s3_server() as server:
        engine = settings | {"docker": settings["docker"] | {"network": "host"}, "cache": str(tmp_path / "cache")}
        remote = project(tmp_path / "b", **changes, engine=engine, store=server.new_bucket())
        session = open_session(remote)
        containers = Recorder(make_runner(remote, "cpu", lambda: session.worker))
        run_pipeline(session, containers, parse_budgets("4bit"))
        assert [spec.key for spec in containers.specs] == [spec.key for spec in inside.specs]
        assert containers.reused == 0
        for spec in inside.specs:
            names = open_session(local).store.manifest(spec.ref)["files"]
            assert names
            for name in names:
                assert session.store.read_bytes(spec.ref, name) == open_session(local).store.read_bytes(spec.ref, name)
        assert any(path.is_file() for path in (tmp_path / "cache").rglob("*"))  # filled by the containers
        assert S3_SECRET not in "".join(containers.watch.lines)


@in_containers
def test_what_a_step_may_do(tmp_path: Path, settings: dict[str, Any]) -> None:
    """As another user: it reads its description, writes to the store alone, and gains no rights."""
    config = project(
        tmp_path / "run", engine=settings | {"docker": settings["docker"] | {"user": "1234:5678"}}, store="file://../s"
    )
    (tmp_path / "s").mkdir(mode=0o777)
    (tmp_path / "s").chmod(0o777)
    in_a_container_do(
        tmp_path / "run",
        f"""print("ids", os.getuid(), os.getgid(), file=sys.stderr)
        for place in ({str(tmp_path / "run")!r}, "/", "/run/mlorq", "/tmp", {str(tmp_path / "s")!r}):
            print(place, os.access(place, os.W_OK), file=sys.stderr)
        status = open("/proc/self/status").read()
        print(*[line for line in status.splitlines() if line.startswith(("NoNewPrivs", "CapEff"))], file=sys.stderr)""",
    )
    watch = Watch()
    ContainerRunner(config, "cpu").run(pipeline.layers.spec(open_session(config)), watch)
    assert "ids 1234 5678" in watch.lines
    for place, may in [("/", False), ("/run/mlorq", False), ("/tmp", True), (tmp_path / "s", True)]:
        assert f"{place} {may}" in watch.lines
    assert f"{tmp_path / 'run'} False" in watch.lines
    assert any(re.fullmatch(r"CapEff:\s+0+ NoNewPrivs:\s+1", line) for line in watch.lines)
