"""Modules that compute from packed codes, and their place in a model.

Linear layers and embedding tables are here, convolutions in ``convolutions``, and what all of them have in common is in
``compressed_module``. A product of matrices runs factor by factor, ``(x Bᵀ) Aᵀ``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlorq.errors import ModelError
from mlorq.forms.compressed_module import CompressedModule
from mlorq.forms.convolutions import CONVOLUTIONS
from mlorq.forms.stored_layer import CompressedLayer
from mlorq.models.direct import DirectLinear, DirectlyRead, ParameterLike, ParameterLinear, WeightView
from mlorq.models.kinds import CLASSES
from mlorq.models.layers import weight_identity
from mlorq.models.transposed import is_transposed


class CompressedLinear(CompressedModule):
    """``y = W x + b`` from packed codes; replaces an ``nn.Linear``."""

    kind = "linear"
    float_class = nn.Linear

    def _copy_geometry(self, layer: nn.Module) -> None:
        self.out_features, self.in_features = self.weight_shape
        self.transposed = is_transposed(layer)

    def forward(self, input: Tensor) -> Tensor:
        """``(…, in_features)`` to ``(…, out_features)``."""
        return self._product(input, self.bias)

    def _product(self, input: Tensor, bias: Tensor | None) -> Tensor:
        def multiply(name: str, value: Tensor, last: bool) -> Tensor:
            return F.linear(value, self.dense(name), bias if last else None)

        result: Tensor = self.form.apply(multiply, input)
        return result

    def _sizes_repr(self) -> list[str]:
        return [f"in_features={self.in_features}", f"out_features={self.out_features}"]


class CompressedDirect(DirectlyRead, CompressedLinear):
    """``CompressedLinear`` whose weight other code multiplies with; replaces a ``DirectLinear``."""

    float_class = DirectLinear

    @property
    def own_weight(self) -> Tensor:  # type: ignore[override]
        """The dense weight, ``(out_features, in_features)``."""
        return self._dense_weight()

    @property
    def weight(self) -> Any:
        """The weight, for other code: torch's products with it call the layer."""
        return WeightView(self)

    def forward(self, input: Tensor, *given: Tensor | None) -> Tensor:
        """``(…, in_features)`` to ``(…, out_features)``; ``given`` is a bias in place of the layer's own."""
        return self._product(input, given[0] if given else self.bias)


class CompressedParameter(ParameterLike, CompressedDirect):
    """A compressed layer in the place of a parameter; replaces a ``ParameterLinear``."""

    float_class = ParameterLinear


class CompressedEmbedding(CompressedModule):
    """``y = W[i]`` from packed codes; replaces an ``nn.Embedding``."""

    kind = "embedding"
    float_class = nn.Embedding

    def _copy_geometry(self, layer: nn.Module) -> None:
        assert isinstance(layer, nn.Embedding)
        self.num_embeddings, self.embedding_dim = self.weight_shape
        self.padding_idx = layer.padding_idx

    def forward(self, input: Tensor) -> Tensor:
        """Rows of the table, ``(…, embedding_dim)``."""
        if torch.compiler.is_compiling():
            return F.embedding(input, self.weight)
        (name,) = self.form.names
        _, columns, codec = self._matrices[name]
        found = codec.dequantize_rows(self._tensors(name), input.reshape(-1), columns)
        return found.to(self.compute_dtype).view(*input.shape, self.embedding_dim)

    def _sizes_repr(self) -> list[str]:
        sizes = [f"num_embeddings={self.num_embeddings}", f"embedding_dim={self.embedding_dim}"]
        return [*sizes, f"padding_idx={self.padding_idx}"]


COMPRESSED: tuple[type[CompressedModule], ...] = (  # a subclass before its base
    CompressedParameter,
    CompressedDirect,
    CompressedLinear,
    *CONVOLUTIONS,
    CompressedEmbedding,
)

# -- replacement in a model ---------------------------------------------------------------------------------


def compressed_class(layer: nn.Module, name: str) -> type[CompressedModule]:
    """The compressed class that replaces a float layer; ``name`` is for the error message.

    Raises:
        ModelError: the layer is not an ``nn.Linear``, a convolution or an ``nn.Embedding``.
    """
    for cls in COMPRESSED:
        if isinstance(layer, cls.float_class):
            return cls
    raise ModelError(
        f"layer {name!r} is a {type(layer).__name__}: only nn.Linear, convolutions and nn.Embedding can be compressed"
    )


def replace_layers(
    module: nn.Module,
    layers: Mapping[str, CompressedLayer],
    aliases: Mapping[str, Sequence[str]] | None = None,
    *,
    cache: bool = True,
) -> None:
    """Swap float layers for compressed ones, in place.

    A layer that has several names in the model, or shares its weight parameter with other layers, is compressed once
    and replaced under all these names; each module keeps its own bias.

    Args:
        module: the float model; copy it first if it is still needed.
        layers: compressed layers by name.
        aliases: further names of a layer; names that share its module or parameter are found automatically.
        cache: keep dequantized matrices after first use.

    Raises:
        ModelError: a name is not in the model, or a layer cannot take its stored matrices.
    """
    for name, paths in shared_names(module, layers, aliases).items():

        def make(layer: nn.Module, path: str, name: str = name) -> CompressedModule:
            record = replace(layers[name], layer=path)
            return compressed_class(layer, path).from_layer(layer, record, cache=cache)

        install(module, name, paths, make)


def install(
    module: nn.Module, name: str, paths: Sequence[str], make: Callable[[nn.Module, str], CompressedModule]
) -> None:
    """Replace the float layers at ``paths`` by the compressed layer ``name``; all share its stored tensors.

    Raises:
        ModelError: the model has no layer at a path.
    """
    made: dict[int, CompressedModule] = {}
    for path in paths:
        layer = get_layer(module, path)
        if any(layer is new for new in made.values()):
            continue  # a module that contains it has several names, too
        new = made.get(id(layer))
        if new is None:
            new = make(layer, path)
            new.layer_name = name
            for first in list(made.values())[:1]:
                new._buffers.update(first.stored_tensors())
            made[id(layer)] = new
        swap_module(module, path, layer, new)


def shared_names(
    module: nn.Module, layers: Mapping[str, Any], aliases: Mapping[str, Sequence[str]] | None = None
) -> dict[str, list[str]]:
    """All names of each layer, its own first: the given aliases and all that share its module or weight.

    Raises:
        ModelError: a name is not in the model.
    """
    by_weight: dict[int, list[str]] = {}
    for path, child in module.named_modules(remove_duplicate=False):
        if isinstance(child, CLASSES):
            by_weight.setdefault(weight_identity(child), []).append(path)
    result = {}
    for name in layers:
        sharing = by_weight.get(weight_identity(get_layer(module, name)), ())
        found = [*(aliases or {}).get(name, ()), *sharing]
        result[name] = [name, *(path for path in dict.fromkeys(found) if path not in layers)]
    return result


def get_layer(module: nn.Module, name: str) -> nn.Module:
    """A submodule by name.

    Raises:
        ModelError: the model has no such module, or the name is empty: the model cannot replace itself.
    """
    if not name:
        raise ModelError("the model is one single layer, which has no name: wrap it in nn.Sequential")
    try:
        return module.get_submodule(name)
    except AttributeError as error:
        raise ModelError(f"the model has no layer {name!r}") from error


def swap_module(module: nn.Module, path: str, old: nn.Module, new: nn.Module) -> None:
    """Replace a module by another, in place; modules that used ``old``'s bias parameter then use ``new``'s.

    Some modules call their children from a list attribute instead of their registered names: it is updated as well.
    """
    parent, _, attribute = path.rpartition(".")
    setattr(module.get_submodule(parent), attribute, new)
    new.train(old.training)
    bias = getattr(old, "bias", None)
    for other in module.modules():
        for key, parameter in other._parameters.items():
            if parameter is not None and parameter is bias:
                other._parameters[key] = new._parameters["bias"]
        for value in vars(other).values():
            if isinstance(value, list):
                value[:] = [new if item is old else item for item in value]
