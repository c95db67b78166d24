"""The command that installs an extra is one that works where mlorq runs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mlorq import extras
from mlorq.extras import install_command

CLONE = Path(__file__).resolve().parents[1]


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path.resolve() / "clone"
    (root / "scripts").mkdir(parents=True)
    for name in ("scripts/setup.sh", "pyproject.toml", "constraints.txt"):
        (root / name).touch()
    monkeypatch.setattr(extras, "ROOT", root)
    monkeypatch.chdir(root)
    return root


def test_in_the_environment_of_a_clone_its_script_installs(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "prefix", str(clone / ".venv"))
    assert install_command("onnx") == "bash scripts/setup.sh onnx"
    monkeypatch.chdir(clone.parent)
    assert install_command("onnx") == f"bash {clone}/scripts/setup.sh onnx"


def test_in_another_environment_a_clone_is_installed_in_place(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "prefix", "/elsewhere")
    assert install_command("onnx") == "pip install -c constraints.txt -e '.[onnx]'"
    assert install_command("onnx") in (CLONE / "docs" / "START.md").read_text(), "as the page says"
    monkeypatch.chdir(clone.parent)
    assert install_command("onnx") == f"pip install -c {clone}/constraints.txt -e '{clone}[onnx]'"


def test_an_installed_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "ROOT", tmp_path)
    assert install_command("onnx") == "pip install 'mlorq[onnx]'"


def test_the_root_of_this_checkout_is_found() -> None:
    assert extras.ROOT == CLONE
    assert "mlorq[" not in install_command("onnx")
