"""Statistics of some layers at a time, whose sums fit into the memory: the numbers are those of all layers at once.

A pass over the calibration data adds to the sums of one group of layers. The probes of the label-free Hessian are the
same in every pass, but the rule that ends probing looks at all layers: ``Stops`` carries it from group to group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from mlorq.calibration.covariance import FOLDS
from mlorq.memory import block_width
from mlorq.models.layer_list import Layer

FLOAT32, FLOAT64 = 4, 8
COPIES = 4  # of a file's tensors while it is made: means, two copies in safetensors, its bytes

Estimated = TypeVar("Estimated")


def inputs_bytes(layer: Layer) -> tuple[int, int]:
    """Bytes of the sums of a layer's input products, and those taken for a moment besides."""
    entries = layer.in_features * block_width(layer.in_features)
    return FLOAT64 * FOLDS * entries, COPIES * FLOAT32 * FOLDS * entries


def hessian_bytes(layer: Layer, gradients: bool) -> tuple[int, int]:
    """Bytes of the sums of a layer's Hessian (of a batch, and of all), and those taken for a moment besides.

    Args:
        layer: the layer.
        gradients: whether the products of its output gradients are summed as well.
    """
    products = layer.out_features**2 if gradients else 0
    held = 2 * FLOAT32 * layer.params + FLOAT64 * FOLDS * products
    return held, COPIES * FLOAT32 * (layer.params + FOLDS * products)


def groups_within(layers: Sequence[Layer], sizes: Callable[[Layer], tuple[int, int]], bound: int) -> list[list[Layer]]:
    """Layers in as few groups of successive ones as keep within a bound; a layer that does not is a group by itself.

    Args:
        layers: in execution order.
        sizes: bytes that a layer holds, and bytes that it takes for a moment besides.
        bound: bytes.
    """
    groups: list[list[Layer]] = []
    held = largest = 0
    for layer in layers:
        own, moment = sizes(layer)
        if not groups or held + own + max(largest, moment) > bound:
            groups.append([])
            held = largest = 0
        groups[-1].append(layer)
        held, largest = held + own, max(largest, moment)
    return groups


class Stops:
    """The passes after which probing of each batch stops, if the Hessians of some layers at a time are computed.

    All layers have to have converged, and the first group cannot know of the others: its call goes on, and notes after
    which passes its own layers had. If they never had, which is the rule, nothing stops early; else the other groups
    are asked before any result counts.
    """

    def __init__(self) -> None:
        self._agreed: dict[int, set[int]] | None = None  # by batch, of all calls that have ended
        self._own: dict[int, set[int]] = {}  # of the present call
        self._known: dict[int, int] | None = None

    @property
    def listens(self) -> bool:
        """Whether calls still have to say where their layers have converged."""
        return self._known is None

    def after(self, batch: int, done: int, converged: bool) -> bool:
        """Whether to stop after so many passes of a batch.

        Args:
            batch: its index.
            done: number of passes.
            converged: whether the layers of this call have converged.
        """
        if self._known is not None:
            return self._known.get(batch) == done
        if converged:
            self._own.setdefault(batch, set()).add(done)
        return False

    def ask(self) -> bool:
        """End a call that said where its layers had converged; whether all calls so far agree on any pass."""
        agreed = self._own
        if self._agreed is not None:
            pairs = ((batch, passes & self._agreed.get(batch, set())) for batch, passes in self._own.items())
            agreed = {batch: passes for batch, passes in pairs if passes}
        self._agreed, self._own = agreed, {}
        return bool(agreed)

    def decide(self) -> None:
        """From now on calls stop at the first pass on which all agreed."""
        self._known = {batch: min(passes) for batch, passes in (self._agreed or {}).items()}


def in_groups(
    groups: Sequence[list[Layer]], estimate: Callable[[list[Layer], Stops | None], Estimated]
) -> Iterator[tuple[list[Layer], Estimated]]:
    """Estimates of groups of layers one after another, as a single estimate of all layers would be.

    Args:
        groups: of layers.
        estimate: computes those of one group; as ``label_free_hessian`` with ``only`` and ``stops``.
    """
    if len(groups) == 1:
        yield groups[0], estimate(groups[0], None)
        return
    stops = Stops()
    first: Estimated | None = estimate(groups[0], stops)
    if stops.ask():
        first = None  # it did not stop where it may have to
        for group in groups[1:]:
            estimate(group, stops)
            if not stops.ask():
                break
    stops.decide()
    for index, group in enumerate(groups):
        found = first if first is not None and index == 0 else estimate(group, stops)
        first = None
        yield group, found
        del found
