"""Known vulnerabilities, licences and a bill of materials of the packages in .venv/.

    make audit        or: python scripts/audit.py [--python .venv/bin/python] [--out build/audit]

Writes ``advisories.json`` (pip-audit), ``licences.md`` (pip-licenses) and ``sbom.cdx.json`` (CycloneDX). Status 1 if a
package has a known vulnerability or a licence that is not among ``ALLOWED``. Where the service of advisories cannot be
reached, that part is skipped, and a line says so.

The three tools run in an environment of their own, below the output folder: the one that is audited stays as it is.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("pip-audit==2.10.1", "pip-licenses==5.5.5", "cyclonedx-bom==7.5.0")
# Permissive licences and weak copyleft, which leave a program that uses a package alone; names as packages write them.
ALLOWED = re.compile(
    r"(the )?(new |modified )?"
    r"(apache|mit|bsd|[0-9]-clause bsd|freebsd|isc|0bsd|zlib|cc0|unlicense|bsl|boost|hpnd|cnri|artistic|llvm|dfsg|"
    r"psf|python software foundation|mpl|mozilla|lgpl|gnu (lesser|library) general)",
    re.IGNORECASE,
)
# A package whose metadata says too little: what its licence file says.
KNOWN = {"nvidia": "NVIDIA's proprietary licence, of libraries that CUDA builds of torch need"}


def allowed(licence: str) -> bool:
    """Whether a licence, or one of several among which a user may choose, leaves a program that uses the package alone.

    Args:
        licence: an SPDX expression, or names separated by semicolons, among which packages let users choose.
    """
    choices = re.split(r";|\bOR\b", licence.strip().splitlines()[0] if licence.strip() else "")
    return any(_all_allowed(choice) for choice in choices)


def _all_allowed(choice: str) -> bool:
    parts = [part.strip(" ()") for part in re.split(r"\bAND\b|\bWITH\b", choice)]
    return all(ALLOWED.match(part) for part in parts)


def known(package: Mapping[str, Any]) -> str:
    """The licence of a package, from its metadata or from ``KNOWN``."""
    licence = str(package["License"]).strip()
    stated = [text for start, text in KNOWN.items() if package["Name"].lower().startswith(start)]
    return stated[0] if stated else licence.splitlines()[0] if licence else ""


def refused_licences(packages: Sequence[Mapping[str, Any]]) -> list[str]:
    """``name version: licence`` of the packages with another licence than those allowed."""
    return [
        f"{one['Name']} {one['Version']}: {known(one) or 'unknown'}"
        for one in packages
        if not allowed(str(one["License"])) and known(one) not in KNOWN.values()
    ]


def advisories(report: Mapping[str, Any]) -> tuple[int, list[str]]:
    """Number of packages that were looked up, and ``name version: advisories`` of those with any.

    Args:
        report: pip-audit's JSON.
    """
    looked_up = [one for one in report["dependencies"] if "skip_reason" not in one]
    found = [
        f"{one['name']} {one['version']}: {', '.join(each['id'] for each in one['vulns'])}"
        for one in looked_up
        if one["vulns"]
    ]
    return len(looked_up), found


def licence_table(packages: Sequence[Mapping[str, Any]]) -> str:
    """The packages with versions and licences, as Markdown."""
    rows = [f"| {one['Name']} | {one['Version']} | {known(one)} |" for one in packages]
    return "\n".join(["| package | version | licence |", "|---|---|---|", *rows, ""])


def main() -> int:
    """Run the three tools and print what they find."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--python", default=str(ROOT / ".venv/bin/python"), help="interpreter of the environment")
    parser.add_argument("--out", type=Path, default=ROOT / "build/audit", help="folder of the reports")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    bin_ = _tools(arguments.out / "tools")
    bad = 0

    places = _output([arguments.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip()
    # Status 1 says that there are advisories: the report says which.
    audit = [str(bin_ / "pip-audit"), "--path", places, "--format", "json", "--progress-spinner", "off"]
    done = subprocess.run(audit, capture_output=True, text=True)
    (arguments.out / "advisories.json").write_text(done.stdout)
    count, vulnerable = advisories(json.loads(done.stdout)) if done.stdout.strip() else (0, [])
    if not count:
        print("advisories: SKIPPED: the service of advisories (PyPI's JSON interface) cannot be reached from here")
    else:
        print(f"advisories: {count} packages looked up, {len(vulnerable)} with known vulnerabilities")
    bad += _print(vulnerable)

    found = json.loads(_output([str(bin_ / "pip-licenses"), "--python", arguments.python, "--format", "json"]))
    packages = sorted(found, key=lambda one: one["Name"].lower())
    (arguments.out / "licences.md").write_text(licence_table(packages))
    refused = refused_licences(packages)
    print(f"licences: {len(packages)} packages, {len(refused)} with one that is not allowed")
    bad += _print(refused)

    bill = arguments.out / "sbom.cdx.json"
    make = [str(bin_ / "cyclonedx-py"), "environment", arguments.python, "--pyproject", str(ROOT / "pyproject.toml")]
    _output([*make, "--output-format", "JSON", "--output-file", str(bill)])
    print(f"bill of materials: {len(json.loads(bill.read_text())['components'])} components, {bill}")
    return 1 if bad else 0


def _tools(folder: Path) -> Path:
    """The folder of the tools' commands; they are installed if they are not there in these versions."""
    stamp = folder / "versions"
    if not stamp.exists() or stamp.read_text() != "\n".join(TOOLS):
        venv.create(folder, clear=True, with_pip=True)
        _output([str(folder / "bin/python"), "-m", "pip", "install", "-q", *TOOLS])
        stamp.write_text("\n".join(TOOLS))
    return folder / "bin"


def _output(command: Sequence[str]) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"audit: {' '.join(command[:3])} … ended with status {done.returncode}")
    return done.stdout


def _print(lines: Sequence[str]) -> int:
    for line in lines:
        print(f"  {line}")
    return len(lines)


if __name__ == "__main__":
    sys.exit(main())
