"""Screenshots of Prefect's pages for docs/DEPLOY.md: the demo, deployed to a temporary server and worker.

    .venv/bin/python scripts/screenshots.py [--output docs/images]

The script deploys ``prefect.yaml``, runs ``compress``, waits for the ``rebudget`` that the finished search starts, runs
``compress`` again, which reuses everything, and opens the pages in a headless Chromium. It takes about ten minutes on
two cores.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from websockets.sync.client import ClientConnection, connect

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mlorq.evaluation.report import small_picture
from scripts.prefect_stack import REPOSITORY, Stack

POOLS = {"mlorq": "process", "mlorq-docker": "docker", "mlorq-kubernetes": "kubernetes"}
SIZE = (1440, 900)
LARGEST = 300_000  # bytes of a picture
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
# No updates, no accounts, and no sandbox, which root cannot use. A run's graph needs WebGL, here in software.
OPTIONS = [
    "--headless",
    "--no-sandbox",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
]


class Page:
    """A page of a browser, by the DevTools protocol.

    Args:
        connection: to the page's target.
    """

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self._ids = itertools.count(1)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send one command of the protocol; returns its result."""
        number = next(self._ids)
        self._connection.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:  # skips events
            answer = json.loads(self._connection.recv(timeout=60))
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return dict(answer["result"])

    def evaluate(self, expression: str) -> Any:
        """Value of a JavaScript expression."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def open(self, url: str, *texts: str, height: int = SIZE[1]) -> None:
        """Open a page and wait until it shows these texts, since the page is rendered by JavaScript."""
        size = {"width": SIZE[0], "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Page.navigate", url=url)
        for text in texts:
            self.wait_for(f"document.body?.innerText.includes({json.dumps(text)})", text)
        time.sleep(2)  # charts and graphs are drawn after texts

    def wait_for(self, condition: str, what: str, seconds: float = 60) -> None:
        """Wait until a JavaScript condition holds."""
        deadline = time.monotonic() + seconds
        while not self.evaluate(condition):
            if time.monotonic() > deadline:
                shown = self.evaluate("document.body?.innerText") or ""
                raise RuntimeError(f"{what!r} does not show on {self.evaluate('location.href')}:\n{shown[:2000]}")
            time.sleep(0.2)

    def click(self, text: str) -> None:
        """Click on the smallest element with a text."""
        find = (
            f"[...document.querySelectorAll('button, a, [role=tab], li')]"
            f".filter(e => e.innerText?.trim() === {json.dumps(text)} && e.offsetParent)"
        )
        self.wait_for(f"{find}.length", text)
        self.evaluate(f"{find}.at(-1).click()")
        time.sleep(1)

    def picture(self, path: Path) -> None:
        """Save a screenshot of the page as a PNG with few colours."""
        shown = base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
        path.write_bytes(small_picture(shown, width=SIZE[0], colours=128))
        if path.stat().st_size > LARGEST:
            raise RuntimeError(f"{path} has {path.stat().st_size} bytes, more than {LARGEST}")
        print(f"{path}: {path.stat().st_size:,} bytes")


@contextlib.contextmanager
def browser() -> Iterator[Page]:
    """A page of a temporary Chromium."""
    program = next((found for name in CHROMIUM if (found := shutil.which(name))), None)
    if program is None:
        raise SystemExit(f"no Chromium found; install one of: {', '.join(CHROMIUM)}")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [program, *OPTIONS, f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            port = Path(profile) / "DevToolsActivePort"
            deadline = time.monotonic() + 60
            while not (port.exists() and port.read_text().count("\n")):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{program} does not start")
                time.sleep(0.1)
            address = f"http://127.0.0.1:{port.read_text().split()[0]}"
            target = httpx.put(f"{address}/json/new?about:blank", trust_env=False).json()
            with connect(target["webSocketDebuggerUrl"], max_size=None, proxy=None) as connection:
                yield Page(connection)
        finally:
            process.terminate()
            process.wait(timeout=30)


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
