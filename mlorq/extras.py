"""How to install an extra of mlorq, for messages."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # of a clone; of an installed package, the folder of all packages


def install_command(extra: str) -> str:
    """The command that installs an extra of mlorq where it runs.

    From a clone, ``pip install 'mlorq[…]'`` would look for another copy in the package index: there it is the script
    that made the clone's environment or, in any other environment, an editable install.

    Args:
        extra: its name in ``pyproject.toml``.
    """
    script = ROOT / "scripts" / "setup.sh"
    if not (script.exists() and (ROOT / "pyproject.toml").exists()):
        return f"pip install 'mlorq[{extra}]'"
    if Path(sys.prefix).resolve() == ROOT / ".venv":
        return f"bash {_shown(script)} {extra}"
    return f"pip install -c {_shown(ROOT / 'constraints.txt')} -e '{_shown(ROOT)}[{extra}]'"


def _shown(path: Path) -> str:
    """A path as a command in the working directory names it: relative below the clone's root."""
    return os.path.relpath(path) if Path.cwd() == ROOT else str(path)
