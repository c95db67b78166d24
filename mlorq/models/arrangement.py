"""What is rearranged in a model so that weights which it reads directly belong to layers, by names.

``direct_weights`` finds it and rearranges; checkpoints hold it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Arrangement:
    """What is rearranged in a model, by names.

    Attributes:
        layers: linear layers whose weight is read directly.
        parameters: parameters that become linear layers.
        transposed: those of the parameters and stacks whose matrices are ``(in_features, out_features)``.
        attention: attention modules whose projections become layers.
        stacks: parameters with several matrices, each of which becomes a linear layer.
    """

    layers: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    transposed: tuple[str, ...] = ()
    attention: tuple[str, ...] = ()
    stacks: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.layers or self.parameters or self.attention or self.stacks)

    def items(self) -> list[Arrangement]:
        """Arrangements of one module or parameter each."""
        flipped = {name: (name,) if name in self.transposed else () for name in (*self.parameters, *self.stacks)}
        return [
            *(Arrangement(layers=(name,)) for name in self.layers),
            *(Arrangement(parameters=(name,), transposed=flipped[name]) for name in self.parameters),
            *(Arrangement(attention=(name,)) for name in self.attention),
            *(Arrangement(stacks=(name,), transposed=flipped[name]) for name in self.stacks),
        ]

    @classmethod
    def of_items(cls, items: Iterable[Arrangement]) -> Arrangement:
        """The inverse of ``items``."""
        found = list(items)
        return cls(*(tuple(name for one in found for name in getattr(one, key)) for key in cls.__dataclass_fields__))

    def renamed(self, rename: Callable[[str], str | None]) -> Arrangement:
        """The arrangement with other names; parts without a new name are left out."""
        parts = ((new for name in getattr(self, key) if (new := rename(name))) for key in self.__dataclass_fields__)
        return Arrangement(*map(tuple, parts))

    def to_json(self) -> dict[str, list[str]]:
        """Lists of names, without empty ones."""
        return {key: list(names) for key, names in asdict(self).items() if names}

    @classmethod
    def from_json(cls, value: Any) -> Arrangement:
        """The inverse of ``to_json``; ValueError if the value is something else."""
        if not isinstance(value, Mapping) or not set(value) <= set(cls.__dataclass_fields__):
            raise ValueError("the arrangement of the model's weights has unknown keys")
        if not all(isinstance(names, list) and all(isinstance(one, str) for one in names) for names in value.values()):
            raise ValueError("the arrangement of the model's weights must be lists of names")
        return cls(**{key: tuple(names) for key, names in value.items()})
