"""Compress a trained transformer to a memory budget: a bit-width, or a rank and two bit-widths, per layer.

    >>> import mlorq                                                             # doctest: +SKIP
    >>> result = mlorq.compress(model, batches, budget="3bit")                   # doctest: +SKIP
    >>> result.save("out/")                                                      # doctest: +SKIP
    >>> model = mlorq.load("out/")                                               # doctest: +SKIP

The method is MLoRQ (arXiv 2507.09616). ``README.md`` shows how to run it as a Prefect pipeline.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlorq.huggingface.registration import register_when_imported
from mlorq.lazy import lazy_exports

__version__ = "0.1.0"
__all__ = ["CompressionResult", "__version__", "compress", "export", "load"]

if TYPE_CHECKING:
    from mlorq.export_targets import export
    from mlorq.runtimes import load
    from steps.api import CompressionResult, compress

_HOMES = {
    "compress": "steps.api",
    "CompressionResult": "steps.api",
    "export": "mlorq.export_targets",
    "load": "mlorq.runtimes",
}

# `import mlorq` stays fast, and the command line answers before torch is imported.
__getattr__ = lazy_exports(__name__, _HOMES)

# `AutoModel.from_pretrained` then loads folders of the export target transformers.
register_when_imported()
