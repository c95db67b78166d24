"""What all tests share: one thread a process, quiet Prefect, and every device that is there."""

from __future__ import annotations

import functools
import gc
import os
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

# Before prefect or torch are imported anywhere.
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("PREFECT_LOGGING_LEVEL", "WARNING")

import pytest
import torch

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(autouse=True)
def _threads() -> None:
    torch.set_num_threads(1)  # small tensors: more threads only wait for each other


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Leave what is imported with the tests out of garbage collections.

    They are a million objects. To look at all of them takes half a second, and each load of a checkpoint does so.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """``--dist loadfile``, but files whose tests need a Prefect server go to one process.

    A server takes seconds to start and works in the background as long as it runs.
    """
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    @functools.cache
    def has_server(file: str) -> bool:
        return "prefect_server" in (config.rootpath / file).read_text()

    class OneServer(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "prefect_server" if has_server(file) else file

    return OneServer(config, log)


_looked_at: set[str] = set()


@pytest.fixture(autouse=True)
def _only_its_own_modules() -> Iterator[None]:
    """Forget modules in folders of other tests: a search has no index if the file of an imported module has changed."""

    def forget() -> None:
        # Only names that came since the last look, for there are thousands; their dictionary, for a lazy module of
        # transformers answers an attribute that it lacks only after a search through all that it could import.
        for name in sys.modules.keys() - _looked_at:
            file = getattr(sys.modules[name], "__dict__", {}).get("__file__")
            if isinstance(file, str) and f"{os.sep}pytest-of-" in file:
                del sys.modules[name]
            else:
                _looked_at.add(name)

    forget()
    yield
    forget()


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Each device of this machine in turn."""
    return str(request.param)


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A seed of the test's own, the same in every run."""
    return sum(ord(letter) for letter in request.node.name)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real weights and data beside the repository; tests that need it are skipped elsewhere."""
    folder = Path(os.environ.get("MLORQ_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real weights and data at {folder} (MLORQ_SHARED_DATA)")
    return folder


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[str]:
    """One Prefect server for the whole test session, on a database of its own."""
    from prefect.settings import PREFECT_API_URL
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=300):
        yield str(PREFECT_API_URL.value())
