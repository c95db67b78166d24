"""`prefect.yaml` and the run form: what Prefect shows, checks and starts; at the end all of it on a server (long)."""

from __future__ import annotations

import importlib
import json
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import fsspec
import prefect.server.api.collections_data
import pytest
import yaml
from prefect import Flow
from prefect.cli.deploy._models import PrefectYamlModel
from prefect.cli.deploy._triggers import _initialize_deployment_triggers
from prefect.server.events.schemas.events import ReceivedEvent
from prefect.server.utilities.user_templates import render_user_template_sync
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools.validation import validate
from prefect.utilities.templating import apply_values

from flows.events import COMPARE_REQUESTED, REBUDGET_REQUESTED, SEARCH_FINISHED, requested
from flows.run_form import BY_PRESET, RunForm, read_config
from mlorq.config.run import PRESETS, RunConfig
from mlorq.errors import ConfigError
from scripts.prefect_stack import Stack
from tests.flows.test_cli import LAYERS, write_project

ROOT = Path(__file__).parents[2]
FILE = yaml.safe_load((ROOT / "prefect.yaml").read_text())
DEPLOYMENTS: dict[str, dict[str, Any]] = {item["name"]: item for item in FILE["deployments"]}
POOLS = {"mlorq": "process", "mlorq-docker": "docker", "mlorq-kubernetes": "kubernetes"}
STEPS = 1 + 1 + 6 + 6 + 1 + 1 + 6 + 1 + 1 + 1 + 1
SEARCH = 1 + 1 + 6 + 6

each = pytest.mark.parametrize("name", DEPLOYMENTS)


def flow_of(deployment: dict[str, Any]) -> Flow[..., Any]:
    module, _, name = deployment["entrypoint"].rpartition(".")
    found = getattr(importlib.import_module(module), name)
    assert isinstance(found, Flow)
    return found


def schema_of(deployment: dict[str, Any]) -> dict[str, Any]:
    """What the server checks parameters by."""
    return parameter_schema(flow_of(deployment)).model_dump_for_openapi()


def refused(parameters: dict[str, Any], deployment: str = "compress") -> str:
    """Why the server refuses parameters."""
    with pytest.raises(Exception, match="Validation failed") as caught:
        validate(parameters, schema_of(DEPLOYMENTS[deployment]), raise_on_error=True, ignore_required=False)
    return str(caught.value)


# -- prefect.yaml -------------------------------------------------------------------------------------------------


def test_what_there_is() -> None:
    assert set(DEPLOYMENTS) == {
        "compress", "rebudget", "nightly", "sweep", "compare", "retention",
        "compress-docker", "rebudget-docker", "compress-kubernetes",
    }  # fmt: skip
    assert len(PrefectYamlModel.model_validate(FILE).deployments) == len(DEPLOYMENTS)
    assert {item["work_pool"]["name"] for item in DEPLOYMENTS.values()} == set(POOLS)
    (schedule,) = DEPLOYMENTS["nightly"]["schedules"]
    assert schedule["cron"].split()[2:] == ["*", "*", "*"]
    # It removes runs: the owner switches it on.
    assert [schedule["active"] for schedule in DEPLOYMENTS["retention"]["schedules"]] == [False]
    assert not any("schedules" in item for name, item in DEPLOYMENTS.items() if name not in ("nightly", "retention"))


def test_nothing_of_one_machine_is_in_it() -> None:
    text = (ROOT / "prefect.yaml").read_text()
    assert not re.search(r"/(root|work|tmp/(?!prefect)|Users|home/(?!mlorq))", text)
    assert not re.search(r"(?i)secret|password|_key\b", text)


@each
def test_a_deployment_is_complete(name: str) -> None:
    deployment = DEPLOYMENTS[name]
    assert deployment["description"]
    assert "mlorq" in deployment["tags"]
    assert deployment["concurrency_limit"]["limit"] == 1
    flow = flow_of(deployment)
    assert name.partition("-")[0] in (flow.name, "nightly")
    assert not flow.should_validate_parameters  # mistakes are for mlorq to name
    assert flow.retries == 0


@pytest.mark.parametrize("name", [name for name in DEPLOYMENTS if name != "retention"])
def test_its_parameters_fit_the_form_and_make_a_run(name: str) -> None:
    parameters = DEPLOYMENTS[name]["parameters"]
    assert validate(parameters, schema_of(DEPLOYMENTS[name]), raise_on_error=True, ignore_required=False) == []
    config = read_config(parameters["config"])
    demo = RunConfig.from_yaml(ROOT / "examples" / "demo.yaml")
    assert config.model_copy(update={"data": demo.data, "store": demo.store, "folder": demo.folder}) == demo
    for ours, theirs in (
        (config.data.calibration, demo.data.calibration),
        (config.data.evaluation, demo.data.evaluation),
    ):
        assert ours.model_copy(update={"path": theirs.path}) == theirs
        assert ours.path is not None
        assert ours.path.endswith(str(theirs.path))
        assert "://" in ours.path or (ROOT / ours.path).exists()


@each
def test_its_job_variables_are_of_its_pool(name: str) -> None:
    """By the templates that a server has of every kind of pool, without the workers' packages."""
    pool = DEPLOYMENTS[name]["work_pool"]
    check_variables(pool.get("job_variables", {}), template_of(POOLS[pool["name"]])["variables"])


@pytest.mark.parametrize(
    ("kind", "worker"),
    [("docker", "prefect_docker.worker:DockerWorker"), ("kubernetes", "prefect_kubernetes.worker:KubernetesWorker")],
)
def test_its_job_variables_are_of_the_installed_worker(kind: str, worker: str) -> None:
    module, _, name = worker.partition(":")
    pytest.importorskip(module.partition(".")[0])
    template = getattr(importlib.import_module(module), name).get_default_base_job_template()
    for deployment in DEPLOYMENTS.values():
        pool = deployment["work_pool"]
        if POOLS[pool["name"]] == kind:
            check_variables(pool["job_variables"], template["variables"])


def template_of(kind: str) -> dict[str, Any]:
    """Base job template of a kind of pool, as a server that reaches no internet has it."""
    folder = Path(prefect.server.api.collections_data.__path__[0])
    known = json.loads((folder / "views" / "aggregate-worker-metadata.json").read_text())
    workers = {name: worker for package in known.values() for name, worker in package.items()}
    return dict(workers[kind]["default_base_job_configuration"])


def check_variables(values: dict[str, Any], schema: dict[str, Any]) -> None:
    assert set(values) <= set(schema["properties"])
    assert validate(values, schema, raise_on_error=True, ignore_required=True) == []


def test_the_documentation_names_every_pool_and_deployment() -> None:
    text = (ROOT / "docs" / "DEPLOY.md").read_text()
    for name, kind in POOLS.items():
        assert f"prefect work-pool create {name} --type {kind}" in text
    for name, deployment in DEPLOYMENTS.items():
        assert f"`{flow_of(deployment).name}/{name}`" in text
    for picture in re.findall(r"\]\((images/[^)]+)\)", text):
        assert (ROOT / "docs" / picture).stat().st_size < 300_000


def test_the_documented_template_for_a_cluster(tmp_path: Path) -> None:
    """docs/KUBERNETES.md: what it adds to the template takes GPUs and a Secret; without GPUs it asks for none."""
    text = (ROOT / "docs" / "KUBERNETES.md").read_text()
    (script,) = re.findall(r"```python\n(# add_gpus.py\n.*?)```", text, re.DOTALL)
    path = tmp_path / "template.json"
    path.write_text(json.dumps(template_of("kubernetes")))
    subprocess.run([sys.executable, "-c", script, str(path)], check=True)
    template = json.loads(path.read_text())
    variables = DEPLOYMENTS["compress-kubernetes"]["work_pool"]["job_variables"] | {"store_secret": "mlorq-store"}
    for more, limits in (({"gpus": "1"}, {"memory": "8Gi", "nvidia.com/gpu": "1"}), ({}, {"memory": "8Gi"})):
        check_variables(variables | more, template["variables"])
        manifest = apply_values(template["job_configuration"]["job_manifest"], variables | more)
        (container,) = manifest["spec"]["template"]["spec"]["containers"]
        assert container["resources"]["limits"] == limits
        assert container["envFrom"] == [{"secretRef": {"name": "mlorq-store", "optional": True}}]
    assert template["variables"]["properties"]["store_secret"]["default"] == "mlorq-store"


def test_containers_keep_the_store_and_not_the_workers_home() -> None:
    for name in ("compress-docker", "rebudget-docker"):
        variables = DEPLOYMENTS[name]["work_pool"]["job_variables"]
        (step,) = DEPLOYMENTS[name]["pull"]
        (works_in,) = (value["directory"] for value in step.values())
        store = read_config(DEPLOYMENTS[name]["parameters"]["config"], works_in).resolve("file://./.mlorq")
        kept = [volume.split(":")[1] for volume in variables["volumes"] if not volume.endswith(":ro")]
        assert any(store.startswith(f"file://{folder}/") for folder in kept)
        # The default store of a configuration beside the examples, which are read-only.
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MLORQ_STORE", variables["env"]["MLORQ_STORE"])
            named = read_config(str(ROOT / "examples" / "demo.yaml"))
        assert any(named.resolve(named.store).startswith(f"file://{folder}/") for folder in kept)
        assert variables["env"]["PREFECT_HOME"].startswith("/tmp/")


def test_triggers() -> None:
    names: dict[str, list[Any]] = {}
    for name, deployment in DEPLOYMENTS.items():
        for trigger in _initialize_deployment_triggers(name, deepcopy(deployment.get("triggers", []))):
            names.setdefault(name, []).append((set(trigger.expect), trigger.match_related.model_dump()))
            assert set(trigger.parameters) <= set(flow_of(deployment).parameters.properties)
    pool = {"prefect.resource.role": "work-pool"}
    assert names == {
        "rebudget": [
            ({SEARCH_FINISHED}, pool | {"prefect.resource.name": "mlorq"}),
            ({REBUDGET_REQUESTED}, {}),
        ],
        "compare": [({COMPARE_REQUESTED}, {})],
        "rebudget-docker": [({SEARCH_FINISHED}, pool | {"prefect.resource.name": "mlorq-docker"})],
    }


@pytest.mark.parametrize(
    ("name", "payload", "said"),
    [
        ("rebudget", {"cfg": "run.yaml"}, "unknown key 'cfg'; did you mean 'config'"),
        ("rebudget", {"x": 1}, "unknown key 'x'; known: config, folder, budgets$"),
        ("rebudget", {"configg": "run.yaml"}, "did you mean 'config'"),
        ("rebudget", {}, "key 'config' is missing"),
        ("rebudget", {"config": 7}, r"config: expected a configuration, .* \(given: 7\)"),
        ("rebudget", {"config": "run.yaml", "budgets": "3bit"}, "budgets: expected a list"),
        ("rebudget", {"config": "run.yaml", "methods": ["gptq"]}, "unknown key 'methods'"),
        ("compare", {"config": "run.yaml", "activations": True}, "activations: expected a bit-width"),
        ("compare", {"config": "<'run'>.yaml", "methods": ["gptq"], "folder": "/a"}, None),
        ("rebudget", {"config": {"budget": "3bit"}, "budgets": ["4bit"]}, None),
    ],
)
def test_payloads_of_requests(name: str, payload: dict[str, Any], said: str | None) -> None:
    """What Prefect makes of a trigger's template passes the schema whatever the payload is, and the run checks it."""
    trigger = DEPLOYMENTS[name]["triggers"][-1]
    event = ReceivedEvent.model_validate(
        {
            "occurred": "2030-01-01T00:00:00Z",
            "event": trigger["expect"][0],
            "resource": {"prefect.resource.id": "software"},
            "payload": payload,
            "id": uuid.uuid4(),
        }
    )
    config = render_user_template_sync(trigger["parameters"]["config"]["template"], {"event": event})
    sent = DEPLOYMENTS[name]["parameters"] | {"config": config}
    assert validate(sent, schema_of(DEPLOYMENTS[name]), raise_on_error=True, ignore_required=False) == []
    given = dict.fromkeys(flow_of(DEPLOYMENTS[name]).parameters.properties) | sent
    if said is None:
        assert requested(given) == {**dict.fromkeys(given), **payload}
        return
    with pytest.raises(ConfigError, match=f"^event payload: .*{said}"):
        requested(given)


# -- the form -----------------------------------------------------------------------------------------------------


def sections(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, section in schema["definitions"].items():
        for key, field in section["properties"].items():
            yield f"{name}.{key}", field


def test_form_has_every_key_with_what_it_means() -> None:
    schema = schema_of(DEPLOYMENTS["compress"])
    fields = dict(sections(schema))
    for key, field in fields.items():
        assert field.get("description") or "$ref" in field, key
    assert fields["ModelForm.family"]["enum"] == ["timm", "transformers", "detection", "custom"]
    meaning = "(None means best: 200; integer: 200; quick: 500; paper: 20000)"
    assert fields["RoundingForm.iterations"]["description"].endswith(meaning)
    form = schema["definitions"]["ConfigurationForm"]
    assert set(form["properties"]) == set(RunConfig.model_fields) - {"folder"}
    assert form["required"] == ["model", "data"]
    for section in BY_PRESET:
        assert form["properties"][section]["default"] is None
    for key in ("folder", "budgets"):
        assert schema["properties"][key]["description"]


def test_what_the_form_sends_leaves_the_rest_to_the_preset() -> None:
    demo = DEPLOYMENTS["compress"]["parameters"]["config"]
    sent = RunForm.model_validate(demo | {"preset": "paper", "search": {"samples": 16}, "rounding": None})
    config = read_config(sent.model_dump(mode="json"))
    assert config.search.samples == 16
    assert config.search.hessian_probes == PRESETS["paper"]["search"]["hessian_probes"]
    assert config.rounding.iterations == PRESETS["paper"]["rounding"]["iterations"]
    assert read_config(sent) == config


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"budgte": "3bit"}, "'budgte' was unexpected"),
        ({"search": {"smaples": 3}}, "config"),
        ({"search": {"bits": "many"}}, "bits"),
        ({"preset": "rapid"}, "'rapid' is not one of"),
        ({"model": {"family": "tensorflow"}}, "'tensorflow' is not one of"),
        ({"seed": -1}, "minimum"),
        ({"data": None}, "data"),
    ],
    ids=str,
)
def test_nonsense_is_refused_by_the_schema(change: dict[str, Any], said: str) -> None:
    assert said in refused({"config": DEPLOYMENTS["compress"]["parameters"]["config"] | change})


def test_configurations_of_a_flow(tmp_path: Path) -> None:
    path = write_project(tmp_path)
    config = RunConfig.from_yaml(path)
    assert read_config(yaml.safe_load(path.read_text()), str(tmp_path)) == config
    assert read_config(str(path)) == config
    assert read_config("run.yaml", str(tmp_path)) == config
    assert read_config(f"file://{path}") == config
    with fsspec.open("memory://projects/run.yaml", "wb") as file:
        file.write(path.read_bytes())
    for given, folder in (("memory://projects/run.yaml", str(tmp_path)), ("run.yaml", "memory://projects")):
        found = read_config(given, folder)
        assert found == config.model_copy(update={"folder": "memory://projects"})
        assert found.resolve("data/texts.csv") == "memory://projects/data/texts.csv"
    for wrong, said in (
        ({"budgte": "3bit"}, "did you mean 'budget'"),
        ("none.yaml", "does not exist"),
        ("memory://none.yaml", "does not exist"),
        ("nothing://none.yaml", "cannot be read"),
        (7, "must be a mapping"),
    ):
        given = yaml.safe_load(path.read_text()) | wrong if isinstance(wrong, dict) else wrong
        with pytest.raises(ConfigError, match=said):
            read_config(given, str(tmp_path))


# -- on a server --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with Stack(tmp_path_factory.mktemp("stack")) as stack:
        stack.start_server()
        for name, kind in POOLS.items():
            stack.create_pool(name, kind)
        stack.deploy()
        worker = stack.start_worker("mlorq")
        yield stack
        stack.kill(worker, signal.SIGTERM)


def further_runs(stack: Stack, flow: str, count: int, seconds: float = 120) -> list[dict[str, Any]]:
    """Runs of a flow, once there are so many, all of them over."""
    deadline = time.monotonic() + seconds
    while len(runs := stack.flow_runs(any_=[flow])) < count:
        assert time.monotonic() < deadline, runs
        time.sleep(0.5)
    return [stack.wait(run["id"]) for run in runs]


def settled(stack: Stack, run: str, expected: dict[str, int], seconds: float = 60) -> None:
    """Until the task runs of a run are in these states: the last of them reach the server a little after the run."""
    deadline = time.monotonic() + seconds
    while (states := stack.task_states(run, sum(expected.values()))) != expected:
        assert time.monotonic() < deadline, states
        time.sleep(0.5)


def logged(stack: Stack, run: str, pattern: str, seconds: float = 60) -> None:
    """Until the log of a run has a line: its last lines, too, come a little later."""
    deadline = time.monotonic() + seconds
    while not re.search(pattern, stack.run_log(run)):
        assert time.monotonic() < deadline, stack.run_log(run)
        time.sleep(0.5)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_deployments_on_a_server(stack: Stack, tmp_path: Path) -> None:
    config = yaml.safe_load(write_project(tmp_path, rounding={"method": "nearest"}).read_text())
    parameters = {"config": config, "folder": str(tmp_path)}
    deployed = {item["name"]: item for item in stack.call("POST", "/deployments/filter", {})}
    assert set(deployed) == set(DEPLOYMENTS)
    assert [item["active"] for item in deployed["nightly"]["schedules"]] == [True]

    with pytest.raises(RuntimeError, match=r"409.*'budgte' was unexpected"):
        stack.run("compress/compress", {"config": config | {"budgte": "3bit"}})

    first = stack.run("compress/compress", parameters)
    run = stack.wait(first)
    assert run["name"] == "tiny_project 4bit"
    settled(stack, first, {"Completed": STEPS})
    artifacts = stack.artifacts(first)
    kinds = {key: item["type"] for key, item in artifacts.items()}
    assert kinds.items() >= {
        "candidates": "progress", "sensitivity": "progress", "round-4bit": "progress", "allocation": "table",
        "budgets": "table", "pareto": "markdown", "result": "markdown",
    }.items()  # fmt: skip
    progress = {key: float(item["data"]) for key, item in artifacts.items() if item["type"] == "progress"}
    assert progress == dict.fromkeys(("capture", "candidates", "sensitivity", "round-4bit"), 100.0)
    assert f"`file://{tmp_path}/store/summary/" in artifacts["result"]["data"]
    for layer in LAYERS:
        logged(stack, first, rf"sensitivity {re.escape(layer)}: \d+\.\d+ s on cpu")

    # The finished search has started the further budgets of `rebudget`, which searches nothing and tells nothing.
    (run,) = further_runs(stack, "rebudget", 1)
    assert run["name"] == "tiny_project 4bit 2.5bit"
    assert run["created_by"]["type"] == "AUTOMATION"
    settled(stack, run["id"], {"Cached": STEPS, "Completed": STEPS - SEARCH - 1})
    assert stack.artifacts(run["id"])["size-accuracy"]["type"] == "markdown"

    second = stack.run("compress/compress", parameters)
    stack.wait(second)
    settled(stack, second, {"Cached": STEPS})

    stack.emit(REBUDGET_REQUESTED, "somebody", {**parameters, "budgets": ["3.5bit"]})
    _, asked = further_runs(stack, "rebudget", 2)
    assert asked["name"] == "tiny_project 3.5bit"

    # A wrong payload is a failed run that names what is wrong.
    stack.emit(REBUDGET_REQUESTED, "somebody", {"cfg": "run.yaml"})
    deadline = time.monotonic() + 120
    while not (refusals := [run for run in stack.flow_runs(any_=["rebudget"]) if run["state_type"] == "FAILED"]):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert refusals[0]["name"] == "refused: event payload: unknown key 'cfg'; did you mean 'config'?"

    swept = stack.run("sweep/sweep", parameters | {"budgets": ["3bit", "5bit"]})
    assert stack.wait(swept)["name"] == "tiny_project 3bit 5bit"
    assert stack.artifacts(swept)["size-accuracy"]["type"] == "markdown"

    # Methods side by side: a run each, inside that of the comparison.
    stack.emit(COMPARE_REQUESTED, "somebody", {**parameters, "budgets": ["5bit"], "methods": ["nearest", "erq"]})
    (compared,) = further_runs(stack, "compare", 1)
    assert compared["name"] == "compare tiny_project 5bit"
    assert stack.artifacts(compared["id"])["compare"]["type"] == "table"

    # What the form lets through is refused by the run, in one line.
    wrong = stack.run("rebudget/rebudget", parameters | {"budgets": ["0.1bit"]})
    failed = stack.wait(wrong, state="FAILED")
    assert "the smallest possible is" in failed["state"]["message"]
    assert failed["name"].startswith("tiny_project 0.1bit: budget 0.1bit leaves ")
    logged(stack, wrong, "the smallest possible is")
    assert "Traceback" not in stack.run_log(wrong)
    # Nobody else has started a run.
    assert len(stack.flow_runs(any_=["rebudget"])) == 4
    runs = stack.flow_runs(any_=["compress"])
    assert [run["id"] for run in runs if run["state_type"] != "SCHEDULED"] == [first, second]  # beside nights to come
    nights = [run for run in runs if run["state_type"] == "SCHEDULED"]
    assert {run["deployment_id"] for run in nights} == {deployed["nightly"]["id"]}
    assert nights[0]["expected_start_time"].partition("T")[2].startswith("03:00:00")


SLOW = """

def evaluate(model):
    import os, time
    from pathlib import Path

    Path(__file__).with_name("running").write_text(str(os.getpid()))
    time.sleep(3600)
"""


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["inprocess", "subprocess"])
def test_a_cancelled_run_becomes_cancelled_and_its_step_ends(stack: Stack, tmp_path: Path, kind: str) -> None:
    path = write_project(tmp_path, engine={"devices": "cpu", "threads": 1, "steps": kind})
    with (tmp_path / "tiny_project.py").open("a") as module:
        module.write(SLOW)
    config = yaml.safe_load(path.read_text())
    run = stack.run("compress/compress", {"config": config, "folder": str(tmp_path)})
    deadline, running = time.monotonic() + 300, tmp_path / "running"
    while not (running.exists() and running.read_text()):
        assert time.monotonic() < deadline, stack.run_log(run)
        time.sleep(0.5)
    process = int(running.read_text())
    assert Path(f"/proc/{process}").exists()
    stack.call("POST", f"/flow_runs/{run}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})
    assert stack.wait(run, state="CANCELLED")["state_name"] == "Cancelled"
    assert not Path(f"/proc/{process}").exists(), "the step's process has ended"


def test_deployed_flows_are_imported_without_torch() -> None:
    """Prefect imports a flow before a cancelled run is Cancelled, among other times."""
    code = "import flows.compress, flows.rebudget, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "False"
