"""A timm model inside transformers' wrapper for image classification."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from mlorq.errors import CheckpointError, one_line
from mlorq.models import FAMILIES

OWN_ARGUMENTS = ("num_classes",)  # the wrapper passes these itself
OWN_ENTRIES = ("kind", "resize")  # of the preprocessing, which timm does not have


def wrap(module: nn.Module, architecture: Mapping[str, Any], checkpoint: str) -> nn.Module:
    """The wrapped model; its logits are those of the model.

    ``config.json`` then has the preprocessing of images, from which transformers makes the image processor. Classes
    have numbers for names, because a timm model has none.

    Args:
        module: the timm model.
        architecture: its architecture in the checkpoint.
        checkpoint: location of the checkpoint, for messages.

    Raises:
        CheckpointError: the model has no classifier, or the wrapper does not build it.
    """
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    classes = getattr(module, "num_classes", 0)
    if not classes:
        raise CheckpointError(
            f"checkpoint {checkpoint}: the timm model {architecture['name']!r} has no classifier, which transformers' "
            "wrapper requires"
        )
    arguments = {name: value for name, value in architecture["arguments"].items() if name not in OWN_ARGUMENTS}
    preprocessing = FAMILIES[architecture["family"]].preprocess(architecture) or {}
    described = {
        "architecture": architecture["name"],
        "model_args": arguments or None,
        "pretrained_cfg": {name: value for name, value in preprocessing.items() if name not in OWN_ENTRIES},
    }
    try:
        config = TimmWrapperConfig.from_dict(described, num_labels=classes)
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            wrapper: nn.Module = TimmWrapperForImageClassification(config)
    except (ImportError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"checkpoint {checkpoint}: transformers' wrapper does not build the timm model {architecture['name']!r}: "
            f"{one_line(error)}"
        ) from error
    wrapper.timm_model = module
    return wrapper.eval()
