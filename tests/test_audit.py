"""The audit of dependencies: which licences pass, what a report of advisories says, and the whole of it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("audit", ROOT / "scripts/audit.py")
assert SPEC is not None
assert SPEC.loader is not None
audit: Any = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(audit)


@pytest.mark.parametrize(
    ("licence", "passes"),
    [
        ("MIT", True),
        ("Apache Software License", True),
        ("The MIT License (MIT)", True),
        ("3-Clause BSD License", True),
        ("MPL-2.0 AND (Apache-2.0 OR MIT)", True),
        ("Apache-2.0 AND Apache-2.0 WITH LLVM-exception AND BSD-3-Clause", True),
        ("Apache Software License; GNU General Public License v3 or later (GPLv3+)", True),  # either of them
        ("GPL-3.0-only", False),
        ("GNU Affero General Public License v3", False),
        ("MIT AND GPL-2.0-only", False),
        ("GNU Lesser General Public License v3 (LGPLv3)", True),
        ("Business Source License 1.1", False),
        ("UNKNOWN", False),
        ("", False),
    ],
)
def test_licences(licence: str, passes: bool) -> None:
    assert audit.allowed(licence) == passes
    package = {"Name": "some", "Version": "1.0", "License": licence}
    assert audit.refused_licences([package]) == ([] if passes else [f"some 1.0: {licence or 'unknown'}"])


def test_licences_that_metadata_does_not_state() -> None:
    package = {"Name": "nvidia-cublas-cu12", "Version": "12.8", "License": "Other/Proprietary License"}
    assert not audit.refused_licences([package])
    assert "| nvidia-cublas-cu12 | 12.8 | NVIDIA's proprietary licence" in audit.licence_table([package])


def test_advisories_count_what_was_looked_up() -> None:
    vulnerable = {"name": "b", "version": "2", "vulns": [{"id": "PYSEC-1"}, {"id": "CVE-2"}]}
    rows = [{"name": "a", "version": "1", "vulns": []}, vulnerable, {"name": "c", "skip_reason": "not found"}]
    assert audit.advisories({"dependencies": rows}) == (2, ["b 2: PYSEC-1, CVE-2"])
    assert audit.advisories({"dependencies": rows[2:]}) == (0, [])


@pytest.mark.long
def test_the_packages_of_this_environment(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts/audit.py"), "--python", sys.executable, "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    bill = json.loads((tmp_path / "sbom.cdx.json").read_text())
    names = {one["name"].lower() for one in bill["components"]}
    assert {"torch", "prefect", "transformers", "timm"} <= names
    assert "| torch |" in (tmp_path / "licences.md").read_text()
    assert ", 0 with one that is not allowed" in done.stdout
    if "SKIPPED" in done.stdout:
        pytest.skip("licences and bill of materials pass; " + done.stdout.splitlines()[0])
