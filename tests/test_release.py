"""What is released: one version, and a source distribution and a wheel that install and run where there is nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import mlorq

ROOT = Path(__file__).parents[1]
# A run of the whole pipeline that needs nothing but the package.
MODEL = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.GELU(), nn.Linear(32, 10)).eval()
"""
CONFIG = """
model: {family: custom, factory: "net:build"}
data:
  calibration: {source: synthetic, samples: 64, shape: [3, 4, 4]}
  evaluation: {source: custom, factory: "net:confidence"}
budget: 4bit
preset: fast
"""
METRIC = """
def confidence(module):
    inputs = torch.randn(16, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    return {"confidence": float(module(inputs).softmax(1).amax(1).mean())}
"""


def test_there_is_one_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["dynamic"] == ["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == mlorq.__version__
    assert f"\n## {mlorq.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()
    assert re.fullmatch(r"\d+\.\d+\.\d+", mlorq.__version__)


def test_the_workflow_publishes_what_was_tested() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/release.yaml").read_text())
    steps = [step.get("run", step.get("uses")) for step in workflow["jobs"]["build"]["steps"]]
    assert steps.index("bash .ci/run") < steps.index("python -m build --sdist")
    assert workflow["jobs"]["publish"]["needs"] == "build"
    assert workflow[True] == {"push": {"tags": ["v*"]}}  # YAML 1.1 reads the key `on` as a truth value


def run(command: list[str], folder: Path) -> str:
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "MLORQ_", "PREFECT"))
    }
    environment |= {"HOME": str(folder), "PREFECT_HOME": str(folder / "prefect"), "DO_NOT_TRACK": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a source distribution of the tracked files, and of the wheel that is made from it."""
    folder = tmp_path_factory.mktemp("release")
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if files.returncode:
        pytest.skip("the sources are not a git checkout")
    source = folder / "source"
    for name in files.stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    tools = folder / "tools"
    run([sys.executable, "-m", "venv", str(tools)], folder)
    run([str(tools / "bin/python"), "-m", "pip", "install", "-q", "build"], folder)
    build = [str(tools / "bin/python"), "-m", "build", "--outdir", str(folder / "dist"), str(source)]
    run(build, folder)  # the wheel is built from the source distribution
    return folder / "dist"


@pytest.mark.long
def test_distributions_hold_the_package_alone(built: Path) -> None:
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    assert wheel.name.startswith(f"mlorq-{mlorq.__version__}-cp311-abi3-")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"mlorq", "steps", "flows", f"mlorq-{mlorq.__version__}.dist-info"}
    tracked = [path for top in ("mlorq", "steps", "flows") for path in (ROOT / top).rglob("*") if path.is_file()]
    wanted = {
        str(path.relative_to(ROOT))
        for path in tracked
        if "__pycache__" not in path.parts and path.suffix in {".py", ".typed", ".yaml", ".html", ".npy"}
    }
    assert wanted <= set(names)
    for loops in ("_viterbi", "_columns"):
        assert any(name.startswith(f"mlorq/fitting/{loops}.") and name.endswith(".so") for name in names)
    with tarfile.open(sdist) as archive:
        inside = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "NOTICE.md"} <= inside
    assert {f"mlorq/fitting/{name}" for name in ("_viterbi.c", "_viterbi_path.h", "_columns.c")} <= inside


@pytest.mark.long
@pytest.mark.timeout(3600)  # a gigabyte of packages
def test_the_wheel_runs_in_an_empty_environment(built: Path, tmp_path: Path) -> None:
    run([sys.executable, "-m", "venv", str(tmp_path / "empty")], tmp_path)
    python, command = str(tmp_path / "empty/bin/python"), str(tmp_path / "empty/bin/mlorq")
    (wheel,) = built.glob("*.whl")
    install = [python, "-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt"), str(wheel)]
    # timm needs torchvision, whose CPU build is not in every index: scripts/setup.sh deals with that.
    run(install, tmp_path)
    (tmp_path / "net.py").write_text(MODEL + METRIC)
    (tmp_path / "run.yaml").write_text(CONFIG)
    assert run([command, "--version"], tmp_path).strip() == f"mlorq {mlorq.__version__}"
    assert "preset" in run([command, "init"], tmp_path)
    assert "vit" in run([command, "models"], tmp_path)
    out = run([command, "compress", "run.yaml", "--output", "out", "--json"], tmp_path)
    assert '"bytes"' in out
    code = "import mlorq, torch, net; print(mlorq.load('out', model=net.build())(torch.zeros(1, 3, 4, 4)).shape)"
    assert "[1, 10]" in run([python, "-c", code], tmp_path)
