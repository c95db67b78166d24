"""The documentation site: ``make docs`` builds it into ``build/site``.

Sphinx with MyST, because the pages are CommonMark with links between files, as repositories show them: the source
folder is the repository, so that ``../benchmarks/README.md`` means the same on the site. Links to other files
(configurations, notebooks) become downloads. Warnings are errors, among them links and anchors without a target.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from sphinx.application import Sphinx

import mlorq

project = "mlorq"
author = "The mlorq developers"
project_copyright = author
version = release = mlorq.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = [
    "docs/**.md",
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "NOTICE.md",
    "SECURITY.md",
    "benchmarks/*.md",
    "docker/README.md",
    "examples/README.md",
    "examples/service/README.md",
]
html_theme = "furo"
html_title = f"mlorq {version}"
html_show_sphinx = False
html_copy_source = False

myst_heading_anchors = 3  # with the names that repositories give them
suppress_warnings = ["myst.header"]  # pages whose first heading is followed by one two levels down

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "separated"
python_maximum_signature_line_length = 100
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False


def lead_to_the_first_page(app: Sphinx, error: Exception | None) -> None:
    """Write ``index.html`` at the root of the site, whose first page is in ``docs/``."""
    if error is None and app.builder.name == "html":
        page = f"{root_doc}.html"
        text = f'<!doctype html><meta http-equiv="refresh" content="0; url={page}"><a href="{page}">mlorq</a>\n'
        (Path(app.outdir) / "index.html").write_text(text)


def setup(app: Sphinx) -> None:
    app.connect("build-finished", lead_to_the_first_page)
