"""Steps in containers, one container per step, on the Docker engine of this machine.

A container gets only what its step needs: the folders that the configuration names, the store, one device, and the
environment variables with the credentials of object stores. It runs ``python -m steps`` as the calling user, and is
removed when the step ends, successfully or not.

No container keeps running after its flow. A flow removes its containers, also when it is interrupted. If the flow is
killed, the engine closes the connection to the container, which is also its standard input, and the process inside
ends. The stopped container is removed by the next flow on this machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator
from typing import Any

from flows.runners.base import POLL_SECONDS, Watch
from flows.runners.child import LAST_LINES
from flows.runners.container_setup import (
    HOME,
    binds_of,
    environment_of,
    folder_of,
    gpu_of,
    hide,
    secrets_of,
)
from mlorq.config.run import RunConfig
from mlorq.errors import ConfigError, TransientError
from mlorq.extras import install_command
from mlorq.scratch import scratch_folder
from steps.base import Outcome, StepSpec
from steps.protocol import Description, outcome_of, reject_memory_store
from steps.session import open_store

try:
    import docker
    from docker.utils.socket import STDOUT, SocketError, frames_iter
    from requests.exceptions import RequestException
except ImportError:
    raise ConfigError(f"engine.steps: docker needs the package docker: {install_command('docker')}") from None

BUILD = "docker build -f docker/Dockerfile -t {} ."
DESCRIPTION_FOLDER = "/run/mlorq"  # in the container
KILLED = 137  # 128 + SIGKILL
END_SECONDS = 10.0  # limit for a process to end after it has closed its output

LABELS = ("mlorq.host", "mlorq.boot", "mlorq.process")  # the process that started a container

# Runs ``steps``, and exits at once if standard input is closed, which means that the flow has ended.
LAUNCHER = """
import os, runpy, sys, threading
def watch():
    while os.read(0, 64): pass
    os._exit(os.EX_TEMPFAIL)
threading.Thread(target=watch, daemon=True).start()
runpy.run_module("steps", run_name="__main__", alter_sys=True)
"""
PROBE = (
    "import sys, torch; sys.exit(None if torch.cuda.is_available() else 'torch finds no CUDA device in the container')"
)


class ContainerRunner:
    """Runs steps in containers of ``engine.docker.image``.

    Args:
        config: of the run.
        device: ``cpu``, ``cuda:0`` …, numbered as in this process.

    Raises:
        ConfigError: no Docker engine answers, the image does not exist, or containers have no access to the GPU.
        StoreError: the store is in memory, or its folder cannot be created.
    """

    def __init__(self, config: RunConfig, device: str) -> None:
        reject_memory_store(config)
        self.config = config
        self.device = device
        cache = cache_folder(config)
        engine = config.engine.model_copy(update={"cache": cache})
        # For the container, which has another working directory and home folder: absolute paths.
        self._config_inside = config.model_copy(update={"folder": folder_of(config), "engine": engine})
        self._secrets = secrets_of(config, os.environ)
        self._client = _connect()
        self._options = self._make_options(cache)
        self._check_image()
        remove_left_overs(self._client)
        if device != "cpu":
            self._check_gpu()

    @property
    def place(self) -> str:
        """The device, and the image."""
        return f"{self.device} in a container of {self.config.engine.docker.image}"

    def run(self, spec: StepSpec, watch: Watch) -> Outcome:
        """Run a step in its own container."""
        # Chosen before the container exists, so that it can be removed if its creation is interrupted.
        name = f"mlorq-{spec.step}-{uuid.uuid4().hex[:12]}"
        with scratch_folder() as folder, _faults(spec.label, self._secrets):
            try:
                self._create(name, spec, folder)
                return outcome_of(self._follow(name, spec.label, watch), spec.label)
            finally:
                self._remove(name)

    def close(self) -> None:
        """Close the connections to the engine; the next step opens them again."""
        self._client.close()

    # -- one container ----------------------------------------------------------------------------------------

    def _create(self, name: str, spec: StepSpec, folder: str) -> None:
        """Create the container of a step without starting it; ``folder`` is for its description."""
        path = os.path.join(folder, "step.json")
        with open(path, "wb") as file:
            file.write(Description(spec, self._config_inside, "cpu" if self.device == "cpu" else "cuda:0").to_bytes())
        if self.config.engine.docker.user is not None:  # another user than that of this process
            os.chmod(folder, 0o755)
            os.chmod(path, 0o644)
        described = docker.types.Mount(DESCRIPTION_FOLDER, folder, type="bind", read_only=True)
        uri = f"{DESCRIPTION_FOLDER}/step.json"
        self._client.containers.create(
            command=["python", "-c", LAUNCHER, spec.step, "--spec", uri, "--events"],
            name=name,
            stdin_open=True,
            labels={**_owner(), "mlorq.step": spec.label, "mlorq.key": spec.key},
            **self._options | {"mounts": [*self._options["mounts"], described]},
        )

    def _follow(self, name: str, label: str, watch: Watch) -> dict[str, Any]:
        """Start the container and handle its output; returns its last event."""
        connection = self._client.api.attach_socket(name, {"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1})
        lines: queue.SimpleQueue[tuple[bool, str] | None] = queue.SimpleQueue()
        threading.Thread(target=_pass_on, args=(connection, lines), daemon=True).start()
        last: dict[str, Any] | None = None
        last_lines: deque[str] = deque(maxlen=LAST_LINES)
        try:
            self._client.api.start(name)
            checked = time.monotonic()
            while (line := _next(lines)) is not None:
                out, text = line
                event = _event(text) if out else None
                if event is not None and event["event"] == "progress":
                    watch.progress(event["done"], event["total"])
                elif event is not None:
                    last = event
                elif text:
                    last_lines.append(hide(text, self._secrets))
                    watch.log(last_lines[-1])
                if time.monotonic() - checked >= POLL_SECONDS:
                    watch.check()
                    checked = time.monotonic()
        finally:
            _disconnect(connection)
        if last is None:
            raise self._exit_error(name, label, last_lines)
        if last["event"] == "error":
            last["message"] = hide(last["message"], self._secrets)
        return last

    def _exit_error(self, name: str, label: str, last_lines: deque[str]) -> Exception:
        """The error of a container that ended without a last event."""
        settings = self.config.engine.docker
        lines = "".join(f"\n  {line}" for line in last_lines)
        deadline = time.monotonic() + END_SECONDS
        while (state := self._client.api.inspect_container(name)["State"])["Running"]:
            if time.monotonic() > deadline:
                return TransientError(f"{label}: the connection to its container was lost{lines}")
            time.sleep(0.1)
        status = state["ExitCode"]
        if state["OOMKilled"]:
            most = "the machine's memory" if settings.memory is None else f"engine.docker.memory ({settings.memory})"
            return TransientError(f"{label}: its container needed more than {most} and was killed{lines}")
        if status == KILLED:
            return TransientError(f"{label}: its container was killed (status {status}){lines}")
        if status > 128 or status == os.EX_TEMPFAIL:
            return TransientError(f"{label}: its container ended with status {status}{lines}")
        return ConfigError(
            f"{label}: its container ended with status {status} without a result: check that engine.docker.image "
            f"{settings.image!r} has this version of mlorq, or build it: {BUILD.format(settings.image)}{lines}"
        )

    def _remove(self, name: str) -> None:
        """Kill and remove a container, if it exists. If this fails, the next flow removes it."""
        with contextlib.suppress(docker.errors.DockerException, RequestException):
            self._client.api.remove_container(name, force=True, v=True)

    # -- checks before the run ---------------------------------------------------------------------------------

    def _make_options(self, cache: str | None) -> dict[str, Any]:
        """The common options of all containers of the run, as keyword arguments of ``docker.containers.create``."""
        settings = self.config.engine.docker
        binds = binds_of(self.config, cache, os.environ)
        options: dict[str, Any] = {
            "image": settings.image,
            "environment": environment_of(self.config, self.device, os.environ),
            "mounts": [docker.types.Mount(b.target, b.source, type="bind", read_only=b.read_only) for b in binds],
            "working_dir": HOME,
            "read_only": True,
            "cap_drop": ["ALL"],
            "security_opt": ["no-new-privileges"],
        }
        if HOME not in {bind.target for bind in binds}:
            options["tmpfs"] = {HOME: "exec"}  # exec: libraries load the code that they compile from there
        if settings.user is not None:
            options["user"] = settings.user
        elif _is_rootless(self._client):
            options["user"] = "0:0"  # outside the container this is the calling user
        else:
            options["user"] = f"{os.getuid()}:{os.getgid()}"
            options["group_add"] = [str(group) for group in os.getgroups()]
        if options["user"].partition(":")[0] in ("0", "root"):
            options["cap_add"] = ["DAC_OVERRIDE"]  # root may access all users' files, as on the host
        if settings.memory is not None:
            options["mem_limit"] = options["memswap_limit"] = settings.memory
        if settings.network in ("host", "none"):
            options["network_mode"] = settings.network
        elif settings.network is not None:
            options["network"] = settings.network
        if self.device != "cpu":
            options["device_requests"] = [
                docker.types.DeviceRequest(device_ids=[gpu_of(self.device)], capabilities=[["gpu"]])
            ]
        return options

    def _check_image(self) -> None:
        image = self.config.engine.docker.image
        try:
            self._client.images.get(image)
        except docker.errors.ImageNotFound:
            raise ConfigError(
                f"engine.docker.image: there is no image {image!r} here, and images are not pulled automatically: run "
                f"{BUILD.format(image)}, or docker pull {image}"
            ) from None
        except docker.errors.APIError as error:
            raise ConfigError(f"engine.docker.image: {image!r}: {_one_line(error)}") from None

    def _check_gpu(self) -> None:
        """Start a container with the device: the engine's own information does not show whether that works."""
        where = f"engine.devices: {self.device} cannot be used in containers of {self.config.engine.docker.image}"
        name = f"mlorq-probe-{uuid.uuid4().hex[:12]}"
        api = self._client.api
        try:
            self._client.containers.create(command=["python", "-c", PROBE], name=name, labels=_owner(), **self._options)
            api.start(name)
            status = api.wait(name, timeout=600)["StatusCode"]
            if status != 0:
                said = api.logs(name, stdout=False).decode(errors="replace").strip().splitlines()
                raise ConfigError(f"{where}: {hide(said[-1], self._secrets) if said else f'status {status}'}")
        except (docker.errors.DockerException, RequestException) as error:
            raise ConfigError(f"{where}: {hide(_one_line(error), self._secrets)}") from None
        finally:
            self._remove(name)


def cache_folder(config: RunConfig) -> str | None:
    """The folder on this machine that caches a remote store; None if there is none."""
    cache = open_store(config).cache
    return None if cache is None else os.path.abspath(cache.folder)


def remove_left_overs(client: docker.DockerClient) -> None:
    """Remove the containers of flows on this machine that have ended."""
    host, boot, _ = _owner().values()
    with contextlib.suppress(docker.errors.DockerException, RequestException):  # the run does not depend on it
        for container in client.api.containers(all=True, filters={"label": f"{LABELS[0]}={host}"}):
            its_boot, process = (container["Labels"].get(label, "") for label in LABELS[1:])
            if its_boot == boot:
                pid, _, started = process.partition("@")
                gone = _started(pid) != started
            else:  # before a reboot, or in another PID namespace: the flow may still be running
                gone = container["State"] in ("exited", "dead")
            if gone:
                with contextlib.suppress(docker.errors.APIError):  # another flow may have removed it
                    client.api.remove_container(container["Id"], force=True, v=True)


def _owner() -> dict[str, str]:
    """Labels that identify the process that started a container: host, boot and PID namespace, process."""
    boot = "/proc/sys/kernel/random/boot_id"
    with contextlib.suppress(OSError), open(boot) as file:
        boot = f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    pid = str(os.getpid())
    return dict(zip(LABELS, (socket.gethostname(), boot, f"{pid}@{_started(pid)}"), strict=True))


def _started(pid: str) -> str:
    """Start time of a process, in ticks since boot, because PIDs are reused; empty if there is no such process."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[19]
    return ""


# -- the engine -------------------------------------------------------------------------------------------------------


def _connect() -> docker.DockerClient:
    """A client of the engine that ``DOCKER_HOST`` names, or else of this machine's.

    Raises:
        ConfigError: the engine does not answer.
    """
    try:
        client = docker.from_env()
        client.ping()
    except (docker.errors.DockerException, RequestException) as error:
        where = os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"
        said = f"engine.steps: docker: no Docker engine answers at {where}: {_one_line(error)}"
        raise ConfigError(f"{said}; start it, or set DOCKER_HOST") from None
    return client


def _is_rootless(client: docker.DockerClient) -> bool:
    return any("rootless" in option for option in client.info().get("SecurityOptions") or ())


@contextlib.contextmanager
def _faults(label: str, secrets: list[str]) -> Iterator[None]:
    """Convert errors of the engine: ConfigError if the user can fix them, else TransientError."""
    try:
        yield
    except (docker.errors.DockerException, RequestException, SocketError) as error:
        said = hide(_one_line(error), secrets)
        refused = isinstance(error, docker.errors.APIError) and error.is_client_error()
        if refused and "bind source path does not exist" in said:
            raise ConfigError(f"engine.docker: the engine has no access to the files of this machine: {said}") from None
        if refused:
            raise ConfigError(f"engine.docker: {label}: the engine rejects its container: {said}") from None
        raise TransientError(f"{label}: the Docker engine failed: {said}") from None


def _one_line(error: BaseException) -> str:
    """The cause of an error in one line, without the wrappers of libraries."""
    explanation = getattr(error, "explanation", None)
    cause: BaseException | None = error
    while cause is not None and not explanation:
        explanation = cause.strerror if isinstance(cause, OSError) else None
        cause = cause.__cause__ or cause.__context__
    return " ".join(str(explanation or error).split())


def _pass_on(connection: Any, lines: queue.SimpleQueue[tuple[bool, str] | None]) -> None:
    """Put every line of a container into ``lines`` as (whether it is from standard output, text); at the end None."""
    begun = {True: b"", False: b""}
    with contextlib.suppress(OSError, ValueError, SocketError):  # closed on either side
        for stream, data in frames_iter(connection, tty=False):
            out = stream == STDOUT
            *whole, begun[out] = (begun[out] + data).split(b"\n")
            for line in whole:
                lines.put((out, line.decode(errors="replace").rstrip()))
    for out, rest in begun.items():
        lines.put((out, rest.decode(errors="replace").rstrip()))
    lines.put(None)
    connection.close()


def _next(lines: queue.SimpleQueue[tuple[bool, str] | None]) -> tuple[bool, str] | None:
    """The next line, or an empty one after ``POLL_SECONDS``; None at the end."""
    try:
        return lines.get(timeout=POLL_SECONDS)
    except queue.Empty:
        return False, ""


def _disconnect(connection: Any) -> None:
    """Close the connection to a container, which also ends the thread that reads its lines."""
    with contextlib.suppress(OSError, AttributeError):
        getattr(connection, "_sock", connection).shutdown(socket.SHUT_RDWR)


def _event(line: str) -> dict[str, Any] | None:
    """The event in a line; None for other text, such as the output of an image's entry point."""
    with contextlib.suppress(ValueError):
        value = json.loads(line)
        if isinstance(value, dict) and "event" in value:
            return value
    return None
