"""``mlorq notify``: the automations that it creates, and the messages that they send (long)."""

from __future__ import annotations

import json
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.notify_command import ON, set_up
from mlorq.errors import ConfigError
from scripts.prefect_stack import Stack
from tests.flows.test_cli import fails, write_project

KIND = "custom-webhook"


def webhook(url: str) -> str:
    """Save a block that posts subject and body as JSON; gives its name."""
    name = f"hook-{uuid.uuid4().hex[:8]}"
    message = {"subject": "{{subject}}", "body": "{{body}}"}
    CustomWebhookNotificationBlock(name=name, url=url, method="POST", json_data=message, timeout=20).save(name)
    return name


def names(block: str) -> list[str]:
    with get_client(sync_client=True) as client:
        found = [client.read_automations_by_name(f"mlorq: {what} runs to {KIND}/{block}") for what in ON]
    return [one.name for ones in found for one in ones]


def test_automations_come_and_go(prefect_server: str) -> None:
    block = webhook("http://127.0.0.1:9")
    assert [line.rpartition(": ")[2] for line in set_up(KIND, block, list(ON))] == ["created"] * 3
    assert len(names(block)) == 3
    assert [line.rpartition(": ")[2] for line in set_up(KIND, block, ["failed"])] == ["removed", "removed", "changed"]
    assert names(block) == [f"mlorq: failed runs to {KIND}/{block}"]
    assert [line.rpartition(": ")[2] for line in set_up(KIND, block, list(ON), remove=True)] == ["removed"]
    assert set_up(KIND, block, list(ON), remove=True) == ["there was nothing to remove"]


def test_wrong_input_is_named(prefect_server: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no block custom-webhook/nowhere" in fails(capsys, "notify", f"{KIND}/nowhere")
    assert "expected TYPE/NAME" in fails(capsys, "notify", "nowhere")
    assert "--on: expected some of finished, missed, failed" in fails(capsys, "notify", f"{KIND}/a", "--on", "always")
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        assert "does not answer" in fails(capsys, "notify", f"{KIND}/a")
    with (
        temporary_settings(restore_defaults={PREFECT_API_URL}),
        pytest.raises(ConfigError, match="needs a running Prefect server"),
    ):
        set_up(KIND, "a", list(ON))


@contextmanager
def receiver() -> Iterator[tuple[str, list[dict[str, str]]]]:
    """A server on loopback that keeps the JSON that is posted to it."""
    received: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *values: object) -> None:
            """Nothing."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", received
    finally:
        server.shutdown()


@pytest.mark.long
@pytest.mark.timeout(600)
def test_messages_of_runs(tmp_path: Path) -> None:
    with Stack(tmp_path / "stack") as stack, receiver() as (url, received):
        stack.start_server()
        stack.create_pool("mlorq", "process")
        stack.deploy("compress")
        with temporary_settings({PREFECT_API_URL: stack.url}):
            set_up(KIND, webhook(url), list(ON))
        worker = stack.start_worker("mlorq")

        def message_of(**changes: object) -> dict[str, str]:
            config = yaml.safe_load(write_project(tmp_path, rounding={"method": "nearest"}, **changes).read_text())
            run = stack.run("compress/compress", {"config": config, "folder": str(tmp_path)})
            before, deadline = len(received), time.monotonic() + 240
            while len(received) == before:
                assert time.monotonic() < deadline, stack.run_log(run)
                time.sleep(0.2)
            return received[-1]

        found = message_of(goal={"max_metric": 1e9})
        assert found["subject"] == "mlorq: tiny_project finished"
        assert "goal kept: mean" in found["body"]
        found = message_of(goal={"max_metric": 1e-9})
        assert found["subject"] == "mlorq: tiny_project missed its goal"
        found = message_of(budget="1KB")
        assert found["subject"].startswith("mlorq: tiny_project 1KB: budget")
        stack.kill(worker, signal.SIGTERM)
    assert len(received) == 3
