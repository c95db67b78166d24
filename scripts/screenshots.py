"""Screenshots of Prefect's pages for docs/DEPLOY.md: the demo, deployed to a temporary server and worker.

    .venv/bin/python scripts/screenshots.py [--output docs/images]

The script deploys ``prefect.yaml``, runs ``compress``, waits for the ``rebudget`` that the finished search starts, runs
``compress`` again, which reuses everything, and opens the pages in a headless Chromium. It takes about ten minutes on
two cores.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.browser import Page, browser
from scripts.prefect_stack import REPOSITORY, Stack

POOLS = {"mlorq": "process", "mlorq-docker": "docker", "mlorq-kubernetes": "kubernetes"}


def take(page: Page, stack: Stack, runs: dict[str, str], output: Path) -> None:
    """Take all screenshots.

    Args:
        page: of a browser.
        stack: the server.
        runs: ids of the flow runs ``first``, ``second`` (that reused everything) and ``rebudget``.
        output: folder to write to.
    """
    base = stack.url.removesuffix("/api")

    def run_page(name: str, height: int) -> None:
        run = stack.flow_run(runs[name])
        page.open(f"{base}/runs/flow-run/{run['id']}", run["name"], "Completed", height=height)
        time.sleep(8)  # until the layout of the graph is stable

    run_page("first", 1350)
    page.picture(output / "ui-run.png")
    run_page("second", 1000)
    page.click("Task Runs")
    page.wait_for("document.body.innerText.includes('Cached')", "Cached")
    page.picture(output / "ui-cached.png")
    page.open(f"{base}/artifacts", "size-accuracy", "pareto")
    page.picture(output / "ui-artifacts.png")
    for name, run, key in (("ui-artifact", "first", "pareto"), ("ui-curve", "rebudget", "size-accuracy")):
        artifact = stack.artifacts(runs[run])[key]
        page.open(f"{base}/artifacts/artifact/{artifact['id']}", str(artifact["description"]), height=800)
        page.wait_for("[...document.images].some(image => image.complete && image.naturalWidth > 500)", "a picture")
        page.picture(output / f"{name}.png")
    deployment = stack.call("GET", "/deployments/name/compress/compress")
    page.open(f"{base}/deployments/deployment/{deployment['id']}/run", "Family", "Run Name", height=1350)
    page.picture(output / "ui-form.png")


def story(stack: Stack, folder: Path) -> dict[str, str]:
    """Deploy, and run the flows that the screenshots show; returns the runs' ids."""
    stack.start_server()
    for name, kind in POOLS.items():
        stack.create_pool(name, kind)
    stack.deploy()
    stack.start_worker("mlorq")
    deployed = stack.call("GET", "/deployments/name/compress/compress")
    parameters = {"config": deployed["parameters"]["config"] | {"store": f"file://{folder}/store"}}
    first = stack.run("compress/compress", parameters)
    stack.wait(first, 1800)
    rebudget = stack.flow_runs(any_=["rebudget"])[0]["id"]  # which the finished search has started
    stack.wait(rebudget, 1800)
    second = stack.run("compress/compress", parameters)
    stack.wait(second, 600)
    stack.task_states(second, sum(stack.task_states(first).values()))
    return {"first": first, "second": second, "rebudget": rebudget}


def main() -> None:
    """Deploy, run the flows, and take the screenshots."""
    parser = argparse.ArgumentParser(description="Screenshots of Prefect's pages for the documentation.")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "docs" / "images", metavar="DIR")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name, Stack(Path(name), ui=True) as stack:
        runs = story(stack, Path(name))
        with browser() as page:
            take(page, stack, runs, arguments.output)


if __name__ == "__main__":
    main()
