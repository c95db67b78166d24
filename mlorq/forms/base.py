"""What a layer can become: candidates, the protocol of a form, and the registry of forms (METHOD 1).

A form stores some matrices by name, and its weight is a sum of their products (``Form.terms``):

    Q    weight            codes of W
    LR   a b               codes of two factors, W ≈ A B
    QLR  weight + a b      both

From the terms follow the dense weight, its gradients, the modules that compute from codes, the bit operations, and what
an exporter writes. A form's file adds its configuration keys, its candidates, how one is fitted, and what all of them
cost locally. Everything else asks ``FORMS``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import numpy as np

from mlorq.codecs.base import Codec, Storage, ZeroPoint
from mlorq.registry import Registry, Settings

if TYPE_CHECKING:
    from torch import Tensor

    from mlorq.codecs.affine import Rounded
    from mlorq.fitting.base import LayerFit

FIELDS = ("form", "bits", "bits_a", "bits_b", "rank")
SVD_WORK = 110.0  # products of size m·n·min(m, n) that a weighted SVD in float64 costs, fitted to runs on CPUs


@dataclass(frozen=True)
class Candidate:
    """One way to store one layer. Which fields a form uses is the form's affair; the others are None.

    Attributes:
        form: name of the form.
        bits: bits per code of W, or of what a product leaves of it.
        bits_a: bits per code of the left factor A, ``(out_features, rank)``.
        bits_b: bits per code of the right factor B, ``(rank, in_features)``.
        rank: columns of A and rows of B.
    """

    form: str
    bits: int | None = None
    bits_a: int | None = None
    bits_b: int | None = None
    rank: int | None = None

    @property
    def candidate_id(self) -> str:
        """A short name, such as ``Q4``, or ``LR64-8-4`` (rank, bits of A, bits of B)."""
        return FORMS[self.form].candidate_id(self)

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> Candidate:
        """The candidate of a row of a table."""
        return cls(**{name: row[name] for name in FIELDS})


class Shape(NamedTuple):
    """A layer's weight as a matrix.

    Attributes:
        out_features: rows of W.
        in_features: columns of W (of a convolution: ``in_channels / groups · kh · kw``).
        groups: convolution groups.
    """

    out_features: int
    in_features: int
    groups: int = 1


class MatrixSpec(NamedTuple):
    """One stored matrix: its size, and what stores it."""

    rows: int
    columns: int
    codec: Codec


Config = TypeVar("Config", bound=Settings)


class Form(ABC, Generic[Config]):
    """One kind of candidate.

    Attributes:
        name: as configurations, tables and checkpoints have it.
        label: for people.
        colour: of its marks in pictures.
        settings: its configuration keys, part of ``search`` and of ``search.layers``.
        terms: the products of stored matrices, by name, whose sum is the weight.
        uniform: whether its candidates are one bit-width each and serve any layer: what uniform methods use, what is
            measured in any case, and what bounds the size of the other forms' candidates.
        by_default: whether layers may take it where the configuration does not name the forms.
    """

    name: str
    label: str
    colour: str
    settings: type[Config]
    terms: tuple[tuple[str, ...], ...]
    uniform: bool = False
    by_default: bool = True

    # -- candidates -------------------------------------------------------------------------------------------

    def serves(self, shape: Shape) -> bool:
        """Whether a layer can take the form: a convolution with groups has no factors."""
        return shape.groups == 1 or not self.has_product

    @abstractmethod
    def enumerate(self, shape: Shape, settings: Config) -> list[Candidate]:
        """The candidates of a layer that the form serves, before those that are too large are left out."""

    @abstractmethod
    def candidate_id(self, candidate: Candidate) -> str:
        """A name that no other candidate of the layer has."""

    @abstractmethod
    def codecs(self, candidate: Candidate, zero_point: ZeroPoint) -> dict[str, Codec]:
        """What stores the candidate's matrices, by name, in the order of ``terms``.

        Raises:
            ValueError: the candidate lacks a field that the form needs, or has one of another.
        """

    @abstractmethod
    def sizes(self, candidate: Candidate, shape: Shape) -> dict[str, tuple[int, int]]:
        """``(rows, columns)`` of the candidate's matrices, by name."""

    @abstractmethod
    def largest(self, shape: Shape) -> Candidate:
        """A candidate whose description in a checkpoint is at least as long as that of any other of the layer."""

    def matrices(self, candidate: Candidate, shape: Shape, zero_point: ZeroPoint = "codes") -> dict[str, MatrixSpec]:
        """The stored matrices by name.

        Raises:
            ValueError: see ``codecs``.
        """
        codecs = self.codecs(candidate, zero_point)
        return {name: MatrixSpec(*size, codecs[name]) for name, size in self.sizes(candidate, shape).items()}

    def size(self, candidate: Candidate, shape: Shape, storage: Storage) -> int:
        """Bytes of a candidate (METHOD 2)."""
        matrices = self.matrices(candidate, shape, storage.zero_point).values()
        if storage.accounting == "paper":
            return (sum(rows * columns * codec.bits for rows, columns, codec in matrices) + 7) // 8
        return sum(codec.size(rows, columns) for rows, columns, codec in matrices)

    def bit_operations(self, candidate: Candidate, shape: Shape, tokens: float) -> float:
        """Bit operations of a layer per sample and bit of its input: multiply-accumulates times bits of the weights.

        The output of B counts as many bits as the layer's input.

        Args:
            candidate: its form.
            shape: of its weight.
            tokens: multiply-accumulates per entry of W and sample.
        """
        matrices = self.matrices(candidate, shape).values()
        return sum(tokens * (rows * columns * codec.bits) for rows, columns, codec in matrices)

    # -- fits and costs ---------------------------------------------------------------------------------------

    @abstractmethod
    def fit(self, fit: LayerFit, candidate: Candidate) -> dict[str, Rounded]:
        """The stored matrices of a candidate, rounded, in the metric of the fit."""

    @abstractmethod
    def local_costs(self, fit: LayerFit, candidates: Sequence[Candidate]) -> Sequence[float]:
        """Local costs of some of the form's candidates, in their order."""

    @abstractmethod
    def curve(self, candidate: Candidate) -> Hashable:
        """Candidates of one curve have costs that change steadily with ``position``: few of them are measured."""

    def position(self, candidate: Candidate) -> int:
        """Where a candidate lies on its curve."""
        return candidate.rank or 0

    def dense(self, fit: LayerFit, candidate: Candidate) -> Tensor:
        """Ŵ of a candidate as the search judges it, ``(out_features, in_features)`` float32."""
        return self.combine({name: part.dequantize() for name, part in self.fit(fit, candidate).items()})

    # -- values -----------------------------------------------------------------------------------------------

    @property
    def has_product(self) -> bool:
        """Whether a term has several factors."""
        return any(len(term) > 1 for term in self.terms)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the stored matrices."""
        return tuple(name for term in self.terms for name in term)

    def combine(self, values: Mapping[str, Tensor]) -> Tensor:
        """The weight from the values of the stored matrices."""
        products = [reduce(lambda left, right: left @ right, (values[name] for name in term)) for term in self.terms]
        return reduce(lambda left, right: left + right, products)

    def apply(self, multiply: Callable[[str, Any, bool], Any], inputs: Any) -> Any:
        """The layer's output, matrix by matrix, without ever forming a product of matrices.

        Args:
            multiply: ``multiply(name, inputs, last)`` multiplies by one stored matrix; ``last`` is True once, where the
                layer's bias is to be added.
            inputs: of the layer.
        """
        outputs = []
        for term in self.terms:
            value = inputs
            for name in reversed(term):
                value = multiply(name, value, term is self.terms[-1] and name == term[0])
            outputs.append(value)
        return reduce(lambda left, right: left + right, outputs)

    # -- estimates --------------------------------------------------------------------------------------------

    def fitting_work(self, shape: Shape, settings: Config, percentiles: int) -> tuple[float, float]:
        """What the fits of a layer's candidates cost: multiply-adds of matrix products, entries of scale searches."""
        return 0.0, 0.0

    def costing_work(self, shape: Shape, settings: Config) -> tuple[float, float]:
        """What local costs of all candidates cost: multiply-adds of matrix products, element-wise operations."""
        return 0.0, 0.0

    def measurements(self, settings: Config, points: int) -> int:
        """How many of a layer's candidates are measured at most, with so many per curve."""
        return points


FORMS: Registry[Form[Any]] = Registry("form")


def uniform_form() -> Form[Any]:
    """The form of uniform methods and of embedding tables: one bit-width, and it serves any layer."""
    return next(form for form in FORMS if form.uniform)


def uniform_candidate(bits: int) -> Candidate:
    """A uniform form's candidate of a bit-width."""
    return Candidate(uniform_form().name, bits=bits)


def enumerate_candidates(
    shape: Shape, settings: Mapping[str, Settings], storage: Storage
) -> list[tuple[Candidate, int]]:
    """All candidates of a layer with their bytes, forms in the order of the registry.

    Candidates of forms that are not uniform are left out where they are not smaller than the largest uniform one.

    Args:
        shape: of the layer's weight.
        settings: those of every form that the layer may take, by the form's name.
        storage: how matrices are stored and counted.
    """
    found: list[tuple[Candidate, int]] = []
    limit: float = 0
    for form in sorted((form for form in FORMS if form.name in settings), key=lambda form: not form.uniform):
        if not form.serves(shape):
            continue
        own = [(one, form.size(one, shape, storage)) for one in form.enumerate(shape, settings[form.name])]
        if form.uniform:
            limit = max([limit, *(size for _, size in own)])
        found += [pair for pair in own if form.uniform or pair[1] < limit]
    return found


def smallest_size(shape: Shape, settings: Mapping[str, Settings], storage: Storage) -> int:
    """Bytes of a layer's smallest candidate; arguments as for ``enumerate_candidates``."""
    return min(size for _, size in enumerate_candidates(shape, settings, storage))


def local_cost_array(fit: LayerFit, candidates: Sequence[Candidate]) -> np.ndarray:
    """Local costs of a layer's candidates of any forms, ``(candidates,)`` float64."""
    found = np.empty(len(candidates))
    for name in dict.fromkeys(candidate.form for candidate in candidates):
        rows = [index for index, candidate in enumerate(candidates) if candidate.form == name]
        found[rows] = FORMS[name].local_costs(fit, [candidates[row] for row in rows])
    return found
