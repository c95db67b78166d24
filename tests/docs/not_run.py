"""What the documentation shows and no test of the pages runs as it stands: the reason, and who checks it instead.

A command is looked up by its page and text, then by its program. ``test_snippets.py`` checks what can be checked
without running it: targets of ``make``, arguments of ``mlorq``, deployments and parameters, files that are named.
"""

from __future__ import annotations

# Programs that no test of the pages starts.
PROGRAMS = {
    "make": "installs an environment, or runs the whole test suite; CI runs `make test`",
    "uv": "installs packages",
    "pip": "installs packages",
    ".venv/bin/mlorq": "the environment that was installed; tests/flows/test_doctor.py runs the command",
    "source": "a shell's own",
    "export": "a shell's own",
    "eval": "a shell's own; tests/flows/test_command_line.py runs the completion",
    "ln": "a link to the user's data; a scenario has the data instead",
    "prefect": "needs a server and workers; tests/flows/test_deployments.py and tests/flows/test_flows.py",
    "docker": "needs a Docker engine; tests with the mark `docker` build and run the images",
    "kubectl": "needs a cluster",
    "curl": "needs a running service; tests/e2e/test_service.py sends these requests",
    "uvicorn": "a service that does not end; tests/e2e/test_service.py starts it",
    "service/bin/uvicorn": "a service that does not end; tests/e2e/test_service.py starts it",
}

# Single commands, by page and beginning.
COMMANDS = {
    ("docker/README.md", "mlorq compress"): "needs the S3 server of compose.yaml; tests/artifacts/test_object_store.py",
    ("docs/COMMAND_LINE.md", "mlorq sweep run.yaml --m"): "metrics of several tasks; tests/flows/test_sweep.py",
    ("docs/COMMAND_LINE.md", "mlorq completion"): "writes into the home folder; tests/flows/test_command_line.py",
    ("docs/COMMAND_LINE.md", "mlorq notify"): "needs a server with a block; tests/flows/test_notify.py",
    ("docs/DEPLOY.md", "mlorq notify"): "needs a server with a block; tests/flows/test_notify.py",
    ("docs/KUBERNETES.md", "python add_gpus.py"): "needs a server's template; tests/flows/test_deployments.py",
    ("examples/README.md", "mlorq compress"): "needs ImageNet and the hub; as docs/tutorials/VIT.md, on made images",
    ("examples/service/README.md", "python -m venv"): "installs packages",
    ("examples/service/README.md", "mlorq"): "the commands of docs/tutorials/ENCODER.md and docs/tutorials/VIT.md",
    ("examples/service/README.md", "python examples"): "needs a real model; tests/e2e/test_service_metric.py",
}

# Blocks of Python, by page and number.
PYTHON: dict[tuple[str, int], str] = {}

# Pages whose blocks of Python (and of a terminal) other tests run as they stand.
ELSEWHERE = {
    "docs/DEVICES.md": "tests/e2e/test_devices_page.py",
    "docs/KUBERNETES.md": "tests/flows/test_deployments.py",
    "docs/MODELS.md": "tests/models/test_text_tasks.py",
}


def command_reason(page: str, command: str) -> str | None:
    """Why a command is not run; None if it is."""
    for (named, start), reason in COMMANDS.items():
        if named == page and command.startswith(start):
            return reason
    words = command.split()
    program = next(word for word in words if "=" not in word or word.startswith("-"))
    return PROGRAMS.get(program)
