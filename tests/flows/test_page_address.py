"""Links of Prefect's pages to the files of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.pipeline import STORE_PAGES, page_address
from flows.render import location_markdown
from mlorq.artifacts.store import ArtifactRef, Store


def test_a_report_is_a_link_where_a_browser_reaches_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, ref = Store(str(tmp_path)), ArtifactRef("summary", "a" * 32)
    monkeypatch.delenv(STORE_PAGES, raising=False)
    here = page_address(store, ref, "report.html")
    assert location_markdown(here) == f"`file://{tmp_path}/summary/{ref.key}/report.html`"
    monkeypatch.setenv(STORE_PAGES, "http://127.0.0.1:8900/")
    address = f"http://127.0.0.1:8900/summary/{ref.key}/report.html"
    assert location_markdown(page_address(store, ref, "report.html")) == f"[{address}]({address})"
