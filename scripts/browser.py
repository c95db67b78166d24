"""A page of a headless Chromium, by the DevTools protocol: for screenshots, and for tests of pages."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from websockets.sync.client import ClientConnection, connect

from mlorq.evaluation.report import small_picture

SIZE = (1440, 900)
LARGEST = 300_000  # bytes of a picture
SECONDS = 120  # for one answer, and for the start
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
            answer = json.loads(self._connection.recv(timeout=SECONDS))
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return dict(answer["result"])

    def evaluate(self, expression: str) -> Any:
        """Value of a JavaScript expression."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def open(self, url: str, *texts: str, height: int = SIZE[1]) -> None:
        """Open a page and wait until it shows these texts, since the page is rendered by JavaScript."""
        self.resize(SIZE[0], height)
        self.call("Page.navigate", url=url)
        for text in texts:
            self.wait_for(f"document.body?.innerText.includes({json.dumps(text)})", text)
        time.sleep(2)  # charts and graphs are drawn after texts

    def resize(self, width: int, height: int = SIZE[1], *, mobile: bool = False, media: str = "") -> None:
        """Show pages in a window of this size.

        Args:
            width, height: in pixels.
            mobile: as phones do.
            media: "print": with the styles of printed pages.
        """
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Emulation.setEmulatedMedia", media=media)

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
        """Save a screenshot of the window as a PNG with few colours."""
        shown = base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
        path.write_bytes(small_picture(shown, width=SIZE[0], colours=128))
        if path.stat().st_size > LARGEST:
            raise RuntimeError(f"{path} has {path.stat().st_size} bytes, more than {LARGEST}")
        print(f"{path}: {path.stat().st_size:,} bytes")


def find_browser() -> str | None:
    """Path of an installed Chromium; None if there is none."""
    return next((found for name in CHROMIUM if (found := shutil.which(name))), None)


@contextlib.contextmanager
def browser() -> Iterator[Page]:
    """A page of a temporary Chromium."""
    program = find_browser()
    if program is None:
        raise SystemExit(f"no Chromium found; install one of: {', '.join(CHROMIUM)}")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [program, *OPTIONS, f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            port = Path(profile) / "DevToolsActivePort"
            deadline = time.monotonic() + SECONDS
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
