"""The quantizer is registered in transformers in every order of imports, and ``import mlorq`` stays light."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.long import few

FIND = "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as table; print(table['mlorq'].__name__)"


def printed(code: str) -> str:
    """What a fresh process prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize(
    "imports",
    few(
        [
            "import mlorq, transformers",
            "import transformers, mlorq",
            "from transformers import AutoModel; import mlorq",
            "import mlorq; from transformers import AutoModel",
            "import transformers.quantizers.auto, mlorq",
            "import mlorq.huggingface.quantizer",  # its own import of transformers triggers the registration
            "import mlorq, importlib; importlib.reload(mlorq); import transformers; importlib.reload(mlorq)",
        ],
        "import mlorq; from transformers import AutoModel",  # the other order: the last test
    ),
)
def test_the_quantizer_is_registered_in_every_order_of_imports(imports):
    assert printed(f"{imports}; {FIND}") == "MlorqQuantizer"


def test_importing_mlorq_imports_neither_torch_nor_transformers():
    code = "import sys, mlorq; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    assert printed(code) == "[]"


def test_the_registration_leaves_no_finder_behind():
    code = "import sys; before = len(sys.meta_path); import mlorq, transformers; transformers.AutoModel; {}; {}"
    code = code.format("from transformers.quantizers import auto; print(len(sys.meta_path) - before)", FIND)
    assert printed(f"import transformers; {code}").split() == ["0", "MlorqQuantizer"]
