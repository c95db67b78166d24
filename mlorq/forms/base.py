"""Candidates of a layer, the protocol of a form, and the registry of forms (METHOD 1).

A form stores some matrices by name, and its weight is a sum of their products (``Form.terms``):

    Q    weight            codes of W
    LR   a b               codes of two factors, W ≈ A B
    QLR  weight + a b      both
    TCQ  weight            trellis codes of W

The terms determine the dense weight, its gradients, the modules that compute from codes, the bit operations, and the
output of exporters. A form's file adds its configuration keys, its candidates, their fits and their local costs. All
other code finds forms in ``FORMS``.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import numpy as np

from mlorq.codecs.base import Codec, Held, Residency, Storage, ZeroPoint, held_values
from mlorq.registry import Registry, Settings

if TYPE_CHECKING:
    from torch import Tensor

    from mlorq.codecs.base import FittedMatrix
    from mlorq.codecs.graph import Graph
    from mlorq.fitting.base import LayerFit

FIELDS = ("form", "bits", "bits_a", "bits_b", "rank")
BREAK_EVEN = (
    0.65  # rank r of r (m + n) = m n, from which factors take longer than the dense weight (measured: .5 to .8)
)
SVD_WORK = 110.0  # cost of a float64 weighted SVD in products of m·n·min(m, n) multiply-adds, fitted to CPU runs


@dataclass(frozen=True)
class Candidate:
    """One way to store one layer. Fields that its form does not use are None.

    Attributes:
        form: name of the form.
        bits: bits per code of W, or of W minus a product of factors.
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
        """The candidate in a row of a candidate table."""
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
    """Size and codec of one stored matrix."""

    rows: int
    columns: int
    codec: Codec


Config = TypeVar("Config", bound=Settings)


class Form(ABC, Generic[Config]):
    """One kind of candidate.

    Attributes:
        name: its name in configurations, tables and checkpoints.
        label: its name in reports and plots.
        colour: colour of its marks in plots.
        settings: class of its configuration keys, part of ``search`` and of ``search.layers``.
        terms: products of stored matrices, by name; their sum is the weight.
        uniform: whether each of its candidates is one bit-width that any layer can take. Uniform methods use this form;
            its candidates are always measured, and the largest bounds the size of other forms' candidates.
        separate: whether each code can be rounded by itself; the codes of other forms are only found together.
        by_default: whether layers may take it if the configuration does not name the forms.
    """

    name: str
    label: str
    colour: str
    settings: type[Config]
    terms: tuple[tuple[str, ...], ...]
    uniform: bool = False
    separate: bool = True
    by_default: bool = True

    # -- candidates -------------------------------------------------------------------------------------------

    def serves(self, shape: Shape) -> bool:
        """Whether a layer can take the form; a grouped convolution cannot be factored."""
        return shape.groups == 1 or not self.has_product

    def supersedes(self, settings: Config) -> int:
        """Uniform candidates of up to this many bits are worse and no smaller: layers that take the form skip them."""
        return 0

    @abstractmethod
    def enumerate(self, shape: Shape, settings: Config) -> list[Candidate]:
        """All candidates of a layer that can take the form, before those that are too large are dropped."""

    @abstractmethod
    def candidate_id(self, candidate: Candidate) -> str:
        """A name that is unique among the layer's candidates."""

    @abstractmethod
    def codecs(self, candidate: Candidate, zero_point: ZeroPoint) -> dict[str, Codec]:
        """Codecs of the candidate's matrices, by name, in the order of ``terms``.

        Raises:
            ValueError: the candidate lacks a field that the form uses, or sets one that it does not use.
        """

    @abstractmethod
    def sizes(self, candidate: Candidate, shape: Shape) -> dict[str, tuple[int, int]]:
        """``(rows, columns)`` of the candidate's matrices, by name."""

    @abstractmethod
    def largest(self, shape: Shape) -> Candidate:
        """A candidate whose description in a checkpoint is at least as long as that of any other candidate."""

    def matrices(self, candidate: Candidate, shape: Shape, zero_point: ZeroPoint = "codes") -> dict[str, MatrixSpec]:
        """Sizes and codecs of the candidate's matrices, by name.

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

    def held(self, candidate: Candidate, shape: Shape, residency: Residency, zero_point: ZeroPoint = "codes") -> Held:
        """What a runtime holds of a candidate of a linear layer."""
        if residency.packed:
            return Held(self.size(candidate, shape, Storage("exact", zero_point)), True)
        if self.multiplies_out(candidate, shape):
            return held_values(shape.out_features, shape.in_features, residency)
        matrices = self.matrices(candidate, shape, zero_point).values()
        parts = [codec.held(rows, columns, residency) for rows, columns, codec in matrices]
        return Held(sum(part.bytes for part in parts), all(part.native for part in parts))

    def bit_operations(self, candidate: Candidate, shape: Shape, tokens: float) -> float:
        """Bit operations of a layer per sample and bit of its input: multiply-accumulates times bits of the weights.

        The output of B is assumed to have the bit-width of the layer's input (METHOD 8, ``choices``).

        Args:
            candidate: the layer's candidate.
            shape: shape of its weight.
            tokens: multiply-accumulates per entry of W and sample.
        """
        matrices = self.matrices(candidate, shape).values()
        return sum(tokens * (rows * columns * codec.bits) for rows, columns, codec in matrices)

    # -- fits and costs ---------------------------------------------------------------------------------------

    @abstractmethod
    def fit(self, fit: LayerFit, candidate: Candidate) -> Mapping[str, FittedMatrix]:
        """The rounded matrices of a candidate, by name, in the metric of the fit."""

    @abstractmethod
    def local_costs(self, fit: LayerFit, candidates: Sequence[Candidate]) -> Sequence[float]:
        """Local costs of ``candidates``, all of this form, in their order (METHOD 4, 7)."""

    def local_bounds(self, fit: LayerFit, candidates: Sequence[Candidate]) -> Sequence[float] | None:
        """What the local costs of ``candidates`` are at least; None if those are as much work as the costs."""
        return None

    @abstractmethod
    def curve(self, candidate: Candidate) -> Hashable:
        """Key of the candidate's curve. Costs vary smoothly with ``position`` along it: few points are measured."""

    def position(self, candidate: Candidate) -> int:
        """Position of a candidate on its curve."""
        return candidate.rank or 0

    def factors(self, fit: LayerFit, candidates: Sequence[Candidate]) -> tuple[list[Tensor], Tensor] | None:
        """Factors of a curve's candidates for little work each, close to those of ``fit``; None if there are none.

        Args:
            fit: of the layer.
            candidates: candidates of one curve, in ascending order of position.

        Returns:
            A ``(out_features, r)`` of each candidate, r its position, and B ``(k, in_features)``, k the last one. A
            candidate's weight is about ``A @ B[:r]``.
        """
        return None

    def dense(self, fit: LayerFit, candidate: Candidate) -> Tensor:
        """Ŵ of a candidate as the search evaluates it, ``(out_features, in_features)`` float32."""
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

    def apply(
        self, multiply: Callable[[str, Any, bool], Any], inputs: Any, add: Callable[[Any, Any], Any] = operator.add
    ) -> Any:
        """The layer's output, matrix by matrix, without forming a product of stored matrices.

        Args:
            multiply: ``multiply(name, inputs, last)`` multiplies by one stored matrix; ``last`` is True once, for
                the product to which the layer's bias is added.
            inputs: inputs of the layer.
            add: ``add(left, right)`` adds two outputs.
        """
        outputs = []
        for term in self.terms:
            value = inputs
            for name in reversed(term):
                value = multiply(name, value, term is self.terms[-1] and name == term[0])
            outputs.append(value)
        return reduce(add, outputs)

    # -- operators of exported graphs (mlorq.codecs.graph) ----------------------------------------------------

    def graph_weight(self, graph: Graph, values: Mapping[str, str]) -> str:
        """Write ``combine``: the transposed weight from the transposed values of the stored matrices."""
        products = [
            reduce(lambda left, right: graph.node("MatMul", left, right), (values[name] for name in reversed(term)))
            for term in self.terms
        ]
        return reduce(lambda left, right: graph.node("Add", left, right), products)

    def multiplies_out(self, candidate: Candidate, shape: Shape) -> bool:
        """Whether a product with the dense weight takes less time than one product per stored matrix."""
        if not self.has_product:
            return False
        rows, columns = shape.out_features, shape.in_features
        return (candidate.rank or 0) * (rows + columns) > BREAK_EVEN * rows * columns

    # -- estimates --------------------------------------------------------------------------------------------

    def fitting_work(self, shape: Shape, settings: Config, percentiles: int) -> tuple[float, float]:
        """Work of the fits of a layer's candidates: multiply-adds of matrix products, entries of scale searches."""
        return 0.0, 0.0

    def costing_work(self, shape: Shape, settings: Config) -> tuple[float, float]:
        """Work of the local costs of all candidates: multiply-adds of matrix products, element-wise operations."""
        return 0.0, 0.0

    def measurements(self, settings: Config, points: int) -> int:
        """Largest number of a layer's candidates that are measured, with ``points`` per curve."""
        return points


FORMS: Registry[Form[Any]] = Registry("form")


def uniform_form() -> Form[Any]:
    """The form of uniform methods and embedding tables: one bit-width, for any layer."""
    return next(form for form in FORMS if form.uniform)


def uniform_candidate(bits: int) -> Candidate:
    """The uniform form's candidate of a bit-width."""
    return Candidate(uniform_form().name, bits=bits)


def enumerate_candidates(
    shape: Shape, settings: Mapping[str, Settings], storage: Storage
) -> list[tuple[Candidate, int]]:
    """All candidates of a layer with their bytes, uniform forms first, otherwise in the order of the registry.

    Candidates of other forms are dropped unless they are smaller than the largest uniform one (METHOD 2), and uniform
    ones that another form supersedes, except for the largest. If a runtime is chosen, only candidates remain that are
    native to it, unless there are none, and none is superseded: what is smaller on disk may be larger in memory.

    Args:
        shape: shape of the layer's weight.
        settings: settings of every form that the layer may take, by the form's name.
        storage: how matrices are stored and counted.
    """
    found: list[tuple[Candidate, int]] = []
    limit: float = 0
    serving = [form for form in FORMS if form.name in settings and form.serves(shape)]
    residency = storage.residency
    least = 0 if residency else max((form.supersedes(settings[form.name]) for form in serving), default=0)
    for form in sorted(serving, key=lambda form: not form.uniform):
        own = [(one, form.size(one, shape, storage)) for one in form.enumerate(shape, settings[form.name])]
        if form.uniform:
            limit = max([limit, *(size for _, size in own)])
            own = [(one, size) for one, size in own if (one.bits or 0) > least or size == limit]
        found += [pair for pair in own if form.uniform or pair[1] < limit]
    if residency is None:
        return found
    native = [pair for pair in found if held(pair[0], shape, residency, storage.zero_point).native]
    return native or found


def held(candidate: Candidate, shape: Shape, residency: Residency, zero_point: ZeroPoint = "codes") -> Held:
    """What a runtime holds of a candidate (``Form.held``)."""
    return FORMS[candidate.form].held(candidate, shape, residency, zero_point)


class Smallest(NamedTuple):
    """The least that a layer can take.

    Attributes:
        bytes: in a checkpoint.
        memory: in the memory of the chosen runtime; None without one.
    """

    bytes: int
    memory: int | None


def smallest_size(shape: Shape, settings: Mapping[str, Settings], storage: Storage) -> Smallest:
    """Bytes of a layer's smallest candidates; arguments as for ``enumerate_candidates``."""
    found = enumerate_candidates(shape, settings, storage)
    size, residency = min(size for _, size in found), storage.residency
    if residency is None:
        return Smallest(size, None)
    return Smallest(size, min(held(one, shape, residency, storage.zero_point).bytes for one, _ in found))


def local_cost_array(
    fit: LayerFit, candidates: Sequence[Candidate], sizes: Sequence[int], memory: Sequence[int] | None = None
) -> np.ndarray:
    """Local costs of a layer's candidates of mixed forms, ``(candidates,)`` float64.

    Where a form knows bounds, candidates that others beat already by their bound have the bound as their cost.

    Args:
        fit: of the layer.
        candidates: the candidates.
        sizes: their bytes.
        memory: their bytes in a runtime's memory, if these count too.
    """
    found, size = np.full(len(candidates), np.inf), np.array(sizes)
    measures = np.stack([size, np.zeros_like(size) if memory is None else np.array(memory)])
    bounded: list[tuple[Form[Any], np.ndarray, np.ndarray]] = []
    for name in dict.fromkeys(candidate.form for candidate in candidates):
        form, rows = FORMS[name], np.array([i for i, candidate in enumerate(candidates) if candidate.form == name])
        own = [candidates[row] for row in rows]
        bounds = form.local_bounds(fit, own)
        if bounds is None:
            found[rows] = form.local_costs(fit, own)
        else:
            bounded.append((form, rows, np.array(bounds)))
    for form, rows, least in bounded:
        beaten = _are_beaten(least, measures[:, rows], found, measures)
        found[rows[beaten]] = least[beaten]
        left = rows[~beaten]
        if len(left):
            found[left] = form.local_costs(fit, [candidates[row] for row in left])
    return found


def _are_beaten(cost: np.ndarray, size: np.ndarray, costs: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Whether some of ``costs`` is no higher, and no larger in any measure, for each of ``cost``.

    Args:
        cost: ``(points,)``.
        size: ``(measures, points)``.
        costs: ``(others,)``.
        sizes: ``(measures, others)``.
    """
    smaller = (sizes[:, None, :] <= size[:, :, None]).all(0)
    return np.asarray((smaller & (costs <= cost[:, None])).any(1))
