"""Versions of the installed packages against the bounds of ``pyproject.toml``, and the extras."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable

from packaging.requirements import Requirement

from flows.doctor.row import Row
from mlorq.extras import install_command

PURPOSES = {
    "audio": "recordings in FLAC, Ogg and MP3 (WAV needs nothing)",
    "compressed-tensors": "loading folders of the export target of that name",
    "dask": "engine.runner: dask",
    "ray": "engine.runner: ray",
    "demo": "make demo and the configurations with all-MiniLM-L6-v2",
    "detection": "box and mask AP",
    "docker": "engine.steps: docker",
    "hub": "GLUE from the hub",
    "kubernetes": "workers in a Kubernetes cluster",
    "metrics": "metrics of evaluate and torchmetrics by name",
    "mlflow": "tracking.mlflow",
    "onnx": "export to ONNX, runtime onnxruntime",
    "openvino": "export to OpenVINO, runtime openvino",
    "s3": "stores and data in S3",
    "server": "a Prefect server with background services of their own",
}


def package_rows() -> list[Row]:
    """One row for all required packages, or one for each that is wrong; then a row for each extra."""
    required, extras = _requirements()
    wrong = [row for name, one in required.items() if (row := _row(name, [one])).state != "ok"]
    rows = wrong or [Row("packages", "ok", f"{len(required)} packages at versions that are supported")]
    for extra, purpose in PURPOSES.items():
        row = _row(f"extra {extra}", extras.get(extra, []))
        advice = install_command(extra) if row.state != "ok" else ""
        rows.append(Row(row.name, row.state, f"{row.detail} (for {purpose})", advice))
    return rows


def _requirements() -> tuple[dict[str, Requirement], dict[str, list[Requirement]]]:
    """The requirements of mlorq by name, and those of its extras by extra, as they were installed."""
    required: dict[str, Requirement] = {}
    extras: dict[str, list[Requirement]] = {}
    for text in importlib.metadata.requires("mlorq") or []:
        one = Requirement(text)
        if one.marker is None or one.marker.evaluate({"extra": ""}):
            required[f"package {one.name}"] = one
            continue
        for extra in PURPOSES:
            if one.marker.evaluate({"extra": extra}):
                extras.setdefault(extra, []).append(one)
    return required, extras


def _row(name: str, requirements: Iterable[Requirement]) -> Row:
    """Missing if a package is missing, else a problem if one has a version out of its bounds."""
    missing, wrong, found = [], [], []
    for one in requirements:
        try:
            version = importlib.metadata.version(one.name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(one.name)
            continue
        found.append(f"{one.name} {version}")
        if not one.specifier.contains(version, prereleases=True):
            wrong.append(f"{one.name} {version}, not {one.specifier}")
    named = ", ".join(str(one) for one in requirements)
    if missing:
        return Row(name, "missing", f"{', '.join(missing)} not installed", f"pip install '{named}'")
    if wrong:
        return Row(name, "problem", "; ".join(wrong), f"pip install '{named}'")
    return Row(name, "ok", ", ".join(found))
