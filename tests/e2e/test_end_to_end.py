"""``scripts/end_to_end.py`` where a Docker engine is there or can be started."""

from __future__ import annotations

import subprocess
import sys

import pytest

from scripts.prefect_stack import REPOSITORY
from tests.engine import docker_engine, mlorq_image  # noqa: F401

pytestmark = [pytest.mark.long, pytest.mark.docker, pytest.mark.timeout(1800)]


def test_the_whole_product(mlorq_image: str) -> None:  # noqa: F811
    command = [sys.executable, "scripts/end_to_end.py", "--image", mlorq_image]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert "ok: the store is unchanged" in done.stdout
