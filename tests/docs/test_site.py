"""The documentation site: it builds without a warning, and no page is missing or linked in vain."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.docs.pages import PAGES, ROOT

pytest.importorskip("furo", reason="needs the extra docs")


class Page(HTMLParser):
    """The links and the anchors of a page of the site."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.links += [values[key] or "" for key in ("href", "src") if key in values]
        self.anchors |= {values["id"] or ""} if "id" in values else set()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as ``make docs`` builds it."""
    folder = tmp_path_factory.mktemp("site")
    (line,) = re.findall(r"^\t\$\(BIN\)/python (-m sphinx .*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    options = line.replace("build/doctrees", str(folder / "doctrees")).replace("build/site", str(folder / "site"))
    assert "-W" in options.split(), "warnings are errors"
    done = subprocess.run([sys.executable, *options.split()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return folder / "site"


def test_every_page_is_on_the_site_and_every_link_has_a_target(site: Path) -> None:
    found = {page: Page(page.read_text()) for page in site.rglob("*.html")}
    pages = {str(page.relative_to(site).with_suffix(".md")) for page in found}
    written = {str(path.relative_to(ROOT)) for path in PAGES}
    assert written <= pages, "include_patterns of docs/conf.py, and a toctree of docs/index.md"

    assert found[site / "index.html"].links == ["docs/index.html"]
    # A second look, by other means: Sphinx itself does not check what is inside raw HTML or its own theme.
    for page, content in found.items():
        for link in content.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            assert target.is_file(), f"{page.name}: {link}"
            if parts.fragment and target in found:
                assert unquote(parts.fragment) in found[target].anchors, f"{page.name}: {link}"


def test_the_reference_has_the_docstrings(site: Path) -> None:
    text = re.sub(r"<[^>]+>", "", (site / "docs" / "API.html").read_text())
    for name in ("mlorq.compress(", "mlorq.load(", "mlorq.export(", "class mlorq.forms.base.Form"):
        assert name in " ".join(text.split()), name
    assert "Compress a trained module to a memory budget" in text
    assert "the message names the smallest possible one" in " ".join(text.split())


def test_a_broken_link_ends_the_build(tmp_path: Path) -> None:
    """The check that the other tests rely on, on a page of its own."""
    (tmp_path / "index.md").write_text("# A page\n\n[there](#a-page), [nowhere](missing.md), [no such part](#part)\n")
    (tmp_path / "conf.py").write_text(
        'extensions = ["myst_parser"]\nmyst_heading_anchors = 3\ninclude_patterns = ["*.md"]\n'
    )
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", str(tmp_path), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "'missing.md'" in done.stderr
    assert "'part'" in done.stderr
    assert "a-page" not in done.stderr
