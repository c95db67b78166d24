"""Whether the rows of a layer's inputs belong to samples: in batches of several, or only in batches of one sample.

Statistics are means over samples. Rows of a table of positions belong to none. Tokens that a router sends to an expert,
or tokens without padding, are those of all samples in a batch: whose they are shows only if samples run one at a time.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from mlorq.models.arrange import CLOSE
from mlorq.models.base import FloatModel
from mlorq.models.batches import Batch, Listed, batch_samples, take_samples
from mlorq.models.observe import Observed, observe


class Rows(NamedTuple):
    """What the rows of the layers' inputs allow.

    Attributes:
        fixed: reasons for layers whose rows belong to no sample, by name.
        alone: names of the layers whose rows belong to samples in batches of one sample only.
    """

    fixed: dict[str, str]
    alone: set[str]


def rows_of_samples(model: FloatModel, batch: Batch, layers: Mapping[str, nn.Module], seen: Observed) -> Rows:
    """Find the layers whose inputs do not have the same number of rows for every sample.

    One more forward pass; if there are such layers and the last sample changes their rows, one for each sample as well.

    Args:
        model: the float model.
        batch: the observed batch, on the model's device.
        layers: layers by name; those that the pass did not reach are left out.
        seen: what the pass on the batch showed.
    """
    samples = batch_samples(batch)
    fewer = None if samples == 1 or isinstance(batch, Listed) else _seen_without_one(model, batch, layers, seen)
    uneven: dict[str, str] = {}
    for name, child in layers.items():
        rows = seen.calls[id(child)].rows if seen.reached(child) else []
        # Rows that belong to samples become fewer with these.
        others = [count * (samples - 1) // samples for count in rows]
        if fewer is not None:
            others = fewer.calls[id(child)].rows if fewer.reached(child) else []
        if [count * (samples - 1) for count in rows] != [count * samples for count in others]:
            uneven[name] = (
                f"its inputs have {rows[0] if rows else 0} rows for {samples} samples, not the same number for each; "
                "batches of one sample each have no such limit"
            )
    changing = [
        name for name in uneven if fewer is None or _vectors(seen, layers[name]) != _vectors(fewer, layers[name])
    ]
    alone = _added_up(model, batch, {name: layers[name] for name in uneven}, seen) if changing else set()
    return Rows({name: reason for name, reason in uneven.items() if name not in alone}, alone)


def _vectors(seen: Observed, layer: nn.Module) -> int:
    return seen.calls[id(layer)].positions if id(layer) in seen.calls else 0


def _seen_without_one(
    model: FloatModel, batch: Batch, layers: Mapping[str, nn.Module], seen: Observed
) -> Observed | None:
    """What a pass on all samples but the last shows; None if the model does not take these."""
    samples = batch_samples(batch)
    fewer = _observed(model, take_samples(batch, slice(0, samples - 1)), layers)
    return fewer if fewer is not None and fewer.rows * samples == seen.rows * (samples - 1) else None


def _added_up(model: FloatModel, batch: Batch, layers: Mapping[str, nn.Module], seen: Observed) -> set[str]:
    """The layers that multiply, with one sample at a time, as many vectors as with the batch.

    None, if a sample alone has other outputs than in the batch.
    """
    samples = batch_samples(batch)
    count = seen.rows // samples
    sums = dict.fromkeys(layers, 0)
    for index in range(samples):
        one = _observed(model, take_samples(batch, slice(index, index + 1)), layers)
        expected = seen.outputs[index * count : (index + 1) * count]
        if one is None or one.outputs.shape != expected.shape:
            return set()
        if not (one.outputs - expected).norm() <= CLOSE * expected.norm():
            return set()
        for name, layer in layers.items():
            sums[name] += _vectors(one, layer)
    return {name for name, layer in layers.items() if sums[name] == _vectors(seen, layer)}


def _observed(
    model: FloatModel, batch: Batch, layers: Mapping[str, nn.Module], blocks: Sequence[str] = ()
) -> Observed | None:
    """What a pass shows; None if the model does not take the batch."""
    try:
        return observe(model, batch, list(layers.values()), blocks)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a model may insist on the size of its batches
        return None


def seen_later(
    model: FloatModel, batches: Iterable[Batch], layers: Mapping[str, nn.Module], blocks: Sequence[str], seen: Observed
) -> tuple[Observed, set[str]]:
    """Look for layers that the first batch did not reach, while it reached others of their kind: experts.

    Layers are of one kind if their names differ in numbers only. Passes end as soon as all of them are found.

    Args:
        model: the float model.
        batches: further batches, on the model's device.
        layers: all layers by name.
        blocks: names of the model's blocks.
        seen: what the pass on the first batch showed.

    Returns:
        What all these passes showed, and the names of the layers that the first did not reach.
    """
    reached = {_kind(name) for name, child in layers.items() if seen.reached(child)}
    missing = {name for name, child in layers.items() if not seen.reached(child) and _kind(name) in reached}
    later: set[str] = set()
    for batch in batches if missing else ():
        other = _observed(model, batch, layers, blocks)
        seen = seen if other is None else seen.joined(other)
        found = {name for name in missing if seen.reached(layers[name])}
        later, missing = later | found, missing - found
        if not missing:
            break
    return seen, later


def choosing_tokens(
    layers: Mapping[str, nn.Module], alone: Collection[str], stacks: Collection[str], seen: Observed
) -> set[str]:
    """Names of the layers whose inputs may be some of the tokens only.

    Those of one kind with a layer in ``alone``: a batch can have a token of each sample for one of the experts. And the
    matrices of a stack, if they multiply different numbers of vectors: batches of one sample show nothing else.

    Args:
        layers: all layers by name.
        alone: names of layers whose rows belong to samples in batches of one sample only.
        stacks: names of parameters with a layer for each of their matrices.
        seen: what a pass on the first batch showed.
    """
    counts: dict[str, set[int]] = {}
    for name, child in layers.items():
        counts.setdefault(name.rpartition(".")[0], set()).add(_vectors(seen, child))
    kinds = {_kind(name) for name in alone}
    uneven = {stack for stack in stacks if len(counts.get(stack, ())) > 1}
    return {name for name in layers if _kind(name) in kinds or name.rpartition(".")[0] in uneven}


def _kind(name: str) -> str:
    return re.sub(r"\d+", "#", name)
