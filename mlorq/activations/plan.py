"""The plan of a model's quantized activations: folded LayerNorms, quantized tensors, their quantizers (METHOD 8)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from mlorq.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mlorq.activations.quantizers import ActivationQuantizer


MOST_BITS = 32


@dataclass(frozen=True)
class Fold:
    """A LayerNorm and all linear layers that read its output."""

    norm: str
    layers: tuple[str, ...]


@dataclass(frozen=True)
class RectifiedMlp:
    """A GELU that becomes ReLU, and the linear layers before and after it, which get other weights."""

    activation: str
    layers: tuple[str, str]


@dataclass(frozen=True)
class Site:
    """One quantized tensor.

    Attributes:
        name: name as in ``survey.Observed``.
        layers: layers that read it; empty for an operand of a product.
        size: entries per sample.
        quantizer: description of its quantizer (``quantizers.build``).
        variants: descriptions at other bit-widths, if the width is still to be chosen; their tensors are
            ``site.<name>@<width>.<buffer>``.
        macs: multiply-accumulates of the product per sample, for its left operand; 0 for other tensors.
    """

    name: str
    layers: tuple[str, ...]
    size: int
    quantizer: dict[str, Any]
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    macs: int = 0

    @property
    def group(self) -> str:
        """Name of the group that shares its bit-width: the tensor itself, or the product of an operand."""
        return self.name if self.layers else self.name.rpartition("_")[0]

    @property
    def owner(self) -> tuple[str, str]:
        """For an operand: the module that multiplies, and ``number_side``."""
        module, _, operand = self.name.rpartition("#")
        return module, operand


@dataclass(frozen=True)
class ActivationPlan:
    """The result of ``calibrate``.

    Attributes:
        sites: the quantized tensors.
        folds: LayerNorms to fold into their readers.
        tensors: ``fold.<norm>.scale``, ``fold.<norm>.shift``, ``site.<name>.<buffer>``, ``mlp.<layer>.weight`` and
            ``mlp.<layer>.bias``.
        mlps: MLPs whose GELU becomes ReLU, before LayerNorms are folded.
    """

    sites: Sequence[Site]
    folds: Sequence[Fold] = ()
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    mlps: Sequence[RectifiedMlp] = ()

    def to_json(self) -> dict[str, Any]:
        """The plan without its tensors, for ``from_json``."""
        found = {"sites": [asdict(site) for site in self.sites], "folds": [asdict(fold) for fold in self.folds]}
        return found | ({"mlps": [asdict(mlp) for mlp in self.mlps]} if self.mlps else {})

    @classmethod
    def from_json(cls, value: Mapping[str, Any], tensors: Mapping[str, Any] | None = None) -> ActivationPlan:
        """The inverse of ``to_json``.

        Raises:
            KeyError, TypeError, ValueError: ``value`` is malformed.
        """
        sites = [Site(**{**site, "layers": tuple(site["layers"])}) for site in value["sites"]]
        folds = [Fold(**{**fold, "layers": tuple(fold["layers"])}) for fold in value["folds"]]
        mlps = tuple(RectifiedMlp(mlp["activation"], tuple(mlp["layers"])) for mlp in value.get("mlps", []))
        return cls(sites, folds, dict(tensors or {}), mlps)

    def check(self) -> None:
        """Check that all quantizers can be built, before a module is changed; takes no memory for their tensors.

        Raises:
            KeyError, TypeError, ValueError, RuntimeError: a description is malformed.
        """
        import torch

        from mlorq.activations.quantizers import build

        for site in self.sites:
            if not all(isinstance(name, str) for name in (site.name, *site.layers)):
                raise ValueError(f"site {site.name!r:.60} has a name that is not a text")
            bits = site.quantizer["bits"]
            if type(bits) is not int or not 1 <= bits <= MOST_BITS:
                raise ValueError(f"site {site.name!r} has {bits!r:.60} bits instead of 1 to {MOST_BITS}")
            with torch.device("meta"):
                build(site.quantizer)
        for mlp in self.mlps:
            if not isinstance(mlp.activation, str):
                raise ValueError(f"mlps: {mlp.activation!r:.60} is a name that is not a text")

    def groups(self) -> dict[str, list[Site]]:
        """Sites by group."""
        found: dict[str, list[Site]] = {}
        for site in self.sites:
            found.setdefault(site.group, []).append(site)
        return found

    def at(self, widths: Mapping[str, int]) -> ActivationPlan:
        """The plan with the bit-width of every group decided.

        Args:
            widths: bit-widths by group; other groups keep theirs.

        Raises:
            KeyError: a group has no quantizer of that width.
        """
        sites, tensors = [], {key: value for key, value in self.tensors.items() if not key.startswith("site.")}
        for site in self.sites:
            width = widths.get(site.group, site.quantizer["bits"])
            prefix, chosen = f"site.{site.name}.", site.quantizer
            if width != chosen["bits"]:
                prefix, chosen = f"site.{site.name}@{width}.", site.variants[str(width)]
            own = {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}
            tensors |= {f"site.{site.name}.{part}": value for part, value in own.items()}
            sites.append(replace(site, quantizer=chosen, variants={}))
        return ActivationPlan(sites, self.folds, tensors, self.mlps)

    def without_folds(self) -> ActivationPlan:
        """The plan for a checkpoint, whose weights are folded already."""
        return replace(self, folds=())

    def fold(self, module: nn.Module) -> None:
        """Fold the LayerNorms of a float model, in place; its function is unchanged, unless MLPs are rectified."""
        from mlorq.activations.folding import fold_norm
        from mlorq.activations.rectify import replace_activation, set_layer

        for mlp in self.mlps:
            replace_activation(module, mlp.activation)
            for name in mlp.layers:
                set_layer(module, name, self.tensors[f"mlp.{name}.weight"], self.tensors.get(f"mlp.{name}.bias"))
        for fold in self.folds:
            fold_norm(module, fold, self.tensors[f"fold.{fold.norm}.scale"], self.tensors[f"fold.{fold.norm}.shift"])

    def install(self, module: nn.Module) -> dict[str, ActivationQuantizer]:
        """Install the quantizers, and ReLU in place of GELU, in a folded model, float or compressed, in place.

        Quantizers whose tensors the plan lacks get blank buffers, to be filled by the module's state dict.

        Returns:
            The quantizers by site.

        Raises:
            ModelError: the model lacks a layer or module of the plan.
        """
        import torch

        from mlorq.activations.products import ProductQuantizers, attach_input, attach_products
        from mlorq.activations.quantizers import build
        from mlorq.activations.rectify import replace_activation

        device = next((value.device for value in module.parameters()), torch.device("cpu"))
        operands: dict[str, dict[str, ActivationQuantizer]] = {}
        installed: dict[str, ActivationQuantizer] = {}
        try:
            for mlp in self.mlps:
                replace_activation(module, mlp.activation)
            for site in self.sites:
                tensors = self._of(site.name)
                quantizer = installed[site.name] = build(site.quantizer, tensors)
                if tensors is not None:
                    quantizer.to(device)
                if site.layers:
                    for name in site.layers:
                        attach_input(module.get_submodule(name), quantizer)
                else:
                    owner, operand = site.owner
                    operands.setdefault(owner, {})[operand] = quantizer
            for name, quantizers in operands.items():
                attach_products(module.get_submodule(name), ProductQuantizers(quantizers))
        except AttributeError as error:
            raise ModelError(f"the activation plan does not fit the model: {error}") from error
        return installed

    def _of(self, name: str) -> dict[str, Tensor] | None:
        prefix = f"site.{name}."
        found = {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}
        return {key: value.clone() for key, value in found.items()} or None


def quantizers_of(module: nn.Module) -> list[ActivationQuantizer]:
    """All activation quantizers of a module, each once."""
    from mlorq.activations.quantizers import ActivationQuantizer

    return [child for child in module.modules() if isinstance(child, ActivationQuantizer)]
