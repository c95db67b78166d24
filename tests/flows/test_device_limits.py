"""Slots of devices: runs on one Prefect server do not use a device at once."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client

from flows import device_limits
from flows.compress import compress_flow
from flows.device_limits import DeviceSlot, name_of_limit
from tests.flows.test_cli import write_project

LOG = logging.getLogger(__name__)


@pytest.fixture
def device(prefect_server: str) -> Iterator[str]:
    device_limits._exists.cache_clear()
    yield f"cuda:{uuid.uuid4().int % 10**6}"
    device_limits._exists.cache_clear()


@contextmanager
def device_slot(device: str, check: Callable[[], None] = lambda: None) -> Iterator[None]:
    with closing(DeviceSlot(device, 1, LOG)) as slot, slot.held(check):
        yield


def active_slots(device: str) -> int:
    with get_client(sync_client=True) as client:
        return client.read_global_concurrency_limit_by_name(name_of_limit(device)).active_slots


def test_one_step_at_a_time(device: str) -> None:
    inside, most = 0, 0
    lock = threading.Lock()

    def step() -> None:
        nonlocal inside, most
        with device_slot(device):
            with lock:
                inside += 1
                most = max(most, inside)
            time.sleep(0.2)
            with lock:
                inside -= 1

    threads = [threading.Thread(target=step) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    assert most == 1
    assert active_slots(device) == 0


def test_a_waiting_step_ends_with_its_run(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_limits, "LOOK_SECONDS", 0.1)

    def interrupted() -> None:
        raise KeyboardInterrupt

    with (
        device_slot(device),
        pytest.raises(KeyboardInterrupt),
        device_slot(device, interrupted),
    ):
        pytest.fail("it has a slot")
    assert active_slots(device) == 0


def test_a_waiting_run_says_so(device: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(device_limits, "LOOK_SECONDS", 0.1)
    others = DeviceSlot(device, 1, LOG)
    with others.held(lambda: None):
        pass
    threading.Timer(1.0, others.close).start()
    with device_slot(device):
        pass
    assert caplog.text.count(f"waiting for {device}, which other runs use") == 1


def test_a_request_without_an_answer_is_repeated(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.concurrency import sync

    real, lost = sync.concurrency, threading.Event()
    monkeypatch.setattr(device_limits, "LOOK_SECONDS", 0.1)
    monkeypatch.setattr(device_limits, "ANSWER_SECONDS", 0.1)

    @contextmanager
    def late(*arguments: Any, **named: Any) -> Iterator[None]:
        lost.wait(60)
        with real(*arguments, **named):
            yield

    def repeats() -> None:
        monkeypatch.setattr(device_limits, "ANSWER_SECONDS", 60.0)
        monkeypatch.setattr(sync, "concurrency", real)

    monkeypatch.setattr(sync, "concurrency", late)
    with device_slot(device, repeats):
        assert active_slots(device) == 1
    lost.set()
    for thread in threading.enumerate():
        if thread.name.startswith("mlorq-slot"):
            thread.join(60)
    assert active_slots(device) == 0


def test_an_error_of_the_step_gives_the_slot_back(device: str) -> None:
    with pytest.raises(TimeoutError, match="of the step"), device_slot(device):
        raise TimeoutError("of the step")
    assert active_slots(device) == 0


def test_a_slot_is_kept_from_step_to_step(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(DeviceSlot(device, 1, LOG)) as slot:
        for _ in range(2):
            with slot.held(lambda: None):
                pass
            assert active_slots(device) == 1
        monkeypatch.setattr(device_limits, "KEEP_SECONDS", 0.0)
        with slot.held(lambda: None):
            pass
        assert active_slots(device) == 0


def test_without_an_answer_the_step_runs_all_the_same(
    device: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}), device_slot(device):
        pass
    assert "is not applied" in caplog.text


def test_cards_have_the_names_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert name_of_limit("cuda:1").endswith(" cuda:5")
    assert name_of_limit("cuda").endswith(" cuda:2")
    assert name_of_limit("cpu").endswith(" cpu")


def test_a_run_takes_slots(prefect_server: str, tmp_path: Path) -> None:
    device_limits._exists.cache_clear()
    config = write_project(tmp_path, engine={"devices": "cpu", "threads": 1, "device_slots": 1})
    assert compress_flow(str(config))["steps"]["computed"] > 0
    with get_client(sync_client=True) as client:
        limit = client.read_global_concurrency_limit_by_name(name_of_limit("cpu"))
        client.delete_global_concurrency_limit_by_name(name_of_limit("cpu"))
    assert (limit.limit, limit.active_slots) == (1, 0)
    device_limits._exists.cache_clear()
