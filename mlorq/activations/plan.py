"""What is done to a model's activations, as data: which LayerNorms are folded, which tensors quantized, with what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from mlorq.activations.folding import Fold, fold_norm
from mlorq.activations.products import ProductQuantizers, attach_input, attach_products
from mlorq.activations.quantizers import ActivationQuantizer, build
from mlorq.errors import ModelError


@dataclass(frozen=True)
class Site:
    """One quantized tensor.

    Attributes:
        name: as in ``survey.Observed``.
        layers: that read it; empty for an operand of a product.
        size: entries per sample.
        quantizer: its description (``quantizers.build``).
        variants: descriptions at other code widths, where the width is yet to be chosen; their tensors are
            ``site.<name>@<width>.<buffer>``.
        macs: of a product's left operand: multiply-accumulates of the product per sample.
    """

    name: str
    layers: tuple[str, ...]
    size: int
    quantizer: dict[str, Any]
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    macs: int = 0

    @property
    def group(self) -> str:
        """What shares its code width: layers that read one tensor, or the operands of one product."""
        return self.name if self.layers else self.name.rpartition("_")[0]

    @property
    def owner(self) -> tuple[str, str]:
        """Of an operand: the module that multiplies, and ``number_side``."""
        module, _, operand = self.name.rpartition("#")
        return module, operand


@dataclass(frozen=True)
class ActivationPlan:
    """Everything that ``calibrate`` found.

    Attributes:
        sites: the quantized tensors.
        folds: LayerNorms to be folded into what reads them.
        tensors: ``fold.<norm>.scale``, ``fold.<norm>.shift`` and ``site.<name>.<buffer>``.
    """

    sites: Sequence[Site]
    folds: Sequence[Fold] = ()
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Without the tensors; read back by ``from_json``."""
        return {"sites": [asdict(site) for site in self.sites], "folds": [asdict(fold) for fold in self.folds]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> ActivationPlan:
        """The inverse of ``to_json``.

        Raises:
            KeyError, TypeError, ValueError: it is malformed.
        """
        sites = [Site(**{**site, "layers": tuple(site["layers"])}) for site in value["sites"]]
        folds = [Fold(**{**fold, "layers": tuple(fold["layers"])}) for fold in value["folds"]]
        return cls(sites, folds, dict(tensors or {}))

    def check(self) -> None:
        """Refuse quantizers of unknown kinds, before a module is touched.

        Raises:
            KeyError, TypeError, ValueError: a description is malformed.
        """
        for site in self.sites:
            build(site.quantizer)

    def groups(self) -> dict[str, list[Site]]:
        """Sites by group."""
        found: dict[str, list[Site]] = {}
        for site in self.sites:
            found.setdefault(site.group, []).append(site)
        return found

    def at(self, widths: Mapping[str, int]) -> ActivationPlan:
        """The plan with every group's code width decided.

        Args:
            widths: by group; groups that are not named keep theirs.
        """
        sites, tensors = [], {key: value for key, value in self.tensors.items() if key.startswith("fold.")}
        for site in self.sites:
            width = widths.get(site.group, site.quantizer["bits"])
            prefix, chosen = f"site.{site.name}.", site.quantizer
            if width != chosen["bits"]:
                prefix, chosen = f"site.{site.name}@{width}.", site.variants[str(width)]
            own = {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}
            tensors |= {f"site.{site.name}.{part}": value for part, value in own.items()}
            sites.append(replace(site, quantizer=chosen, variants={}))
        return ActivationPlan(sites, self.folds, tensors)

    def without_folds(self) -> ActivationPlan:
        """What a checkpoint needs, whose weights are folded already."""
        return replace(self, folds=())

    def fold(self, module: nn.Module) -> None:
        """Fold the LayerNorms of a float model, in place; its function stays what it was."""
        for fold in self.folds:
            fold_norm(module, fold, self.tensors[f"fold.{fold.norm}.scale"], self.tensors[f"fold.{fold.norm}.shift"])

    def install(self, module: nn.Module) -> dict[str, ActivationQuantizer]:
        """Have a folded model, float or compressed, quantize its activations from now on.

        Quantizers without tensors are installed with blank ones, which the module's state dict fills.

        Returns:
            The quantizers by site.

        Raises:
            ModelError: the model has no such layer or module.
        """
        device = next((value.device for value in module.parameters()), torch.device("cpu"))
        operands: dict[str, dict[str, ActivationQuantizer]] = {}
        installed: dict[str, ActivationQuantizer] = {}
        try:
            for site in self.sites:
                quantizer = installed[site.name] = build(site.quantizer, self._of(site.name)).to(device)
                if site.layers:
                    for name in site.layers:
                        attach_input(module.get_submodule(name), quantizer)
                else:
                    owner, operand = site.owner
                    operands.setdefault(owner, {})[operand] = quantizer
            for name, quantizers in operands.items():
                attach_products(module.get_submodule(name), ProductQuantizers(quantizers))
        except AttributeError as error:
            raise ModelError(f"the model has no place for its activation quantizers: {error}") from error
        return installed

    def _of(self, name: str) -> dict[str, Tensor] | None:
        prefix = f"site.{name}."
        found = {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}
        return {key: value.clone() for key, value in found.items()} or None


def quantizers_of(module: nn.Module) -> list[ActivationQuantizer]:
    """All activation quantizers of a module, each once."""
    return [child for child in module.modules() if isinstance(child, ActivationQuantizer)]
