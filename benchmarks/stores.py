"""One run on a folder and on an S3 server on loopback: what moves, and what a second run moves.

    .venv/bin/python benchmarks/stores.py

The run is a small model's, without Prefect. "Another machine" is one with an empty cache.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mlorq.artifacts.store import Store
from mlorq.config.run import RunConfig
from steps.base import Outcome
from steps.inprocess import InProcess
from steps.pipeline import result_json, run_pipeline
from steps.session import Session, open_store
from tests.flows.test_cli import write_project
from tests.s3 import s3_server


def run(path: Path) -> tuple[set[tuple[str, str]], list[Outcome], Store, float]:
    """Keys of all artifacts, outcomes, the store that was used and seconds."""
    config = RunConfig.from_yaml(path)
    session = Session(config, open_store(config))
    outcomes: list[Outcome] = []
    started = time.perf_counter()
    (result,) = run_pipeline(session, InProcess(session, record=outcomes.append), config.budgets)
    result_json(session, result)
    seconds = time.perf_counter() - started
    return {(outcome.ref.step, outcome.ref.key) for outcome in outcomes}, outcomes, session.store, seconds


def main() -> None:
    """Print one row a run, as Markdown."""
    rows = []
    with tempfile.TemporaryDirectory() as temporary, s3_server() as server:
        base = Path(temporary)
        url = server.new_bucket()

        def project(name: str, store: str, cache: str | None) -> Path:
            (base / name).mkdir(exist_ok=True)
            return write_project(base / name, store=store, engine={"devices": "cpu", "threads": 1, "cache": cache})

        local = project("local", "file://./store", None)
        run(project("warm", "file://./store", None))
        reference, *_ = run(local)
        here, there = str(base / "here"), str(base / "there")
        for label, path in (
            ("`file://`, again", local),
            ("`s3://`, first run", project("a", url, here)),
            ("`s3://`, second run", project("a", url, here)),
            ("`s3://`, second run, another machine", project("b", url, there)),
            ("`s3://`, third run there", project("b", url, there)),
        ):
            keys, outcomes, store, seconds = run(path)
            computed = sum(not outcome.reused for outcome in outcomes)
            files, manifests = store.traffic.files, store.traffic.manifests
            rows.append(
                f"| {label} | {computed} of {len(outcomes)} | {'yes' if keys == reference else 'NO'} "
                f"| {files.written_bytes:,} | {files.read_bytes:,} | {manifests.written_bytes:,} "
                f"| {manifests.read_bytes:,} | {store.traffic.cached_bytes:,} | {seconds:.2f} |"
            )
    print("| run | steps computed | same keys | files up, B | files down, B | manifests up, B | manifests down, B "
          "| from the cache, B | s |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
