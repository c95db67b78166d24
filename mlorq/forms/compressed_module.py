"""``CompressedModule``: base of the modules that compute from packed codes, which holds a layer's stored matrices.

A layer stores the matrices of its form, each as the packed tensors of its codec (METHOD 1, 2). A matrix is dequantized
in float32, exactly as ``StoredMatrix.dequantize`` does, and then cast to the dtype of the float layer. A forward pass
never forms a product of matrices.

Stored tensors keep their dtypes under ``.half()``, ``.to(torch.bfloat16)`` and the like: such a call only changes the
dtype of the computation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from mlorq.codecs.affine import merged
from mlorq.codecs.base import Codec, StoredMatrix, ZeroPoint
from mlorq.errors import ModelError
from mlorq.forms.base import FORMS, Candidate, Form, Shape
from mlorq.forms.stored_layer import CompressedLayer
from mlorq.models.direct import weight_of
from mlorq.models.kinds import BY_NAME, kind_of, why_not_a_product
from mlorq.models.left_float import own_code
from mlorq.models.library_layers import is_computed_by_class

WIDENED = ((torch.uint8, torch.int16), (torch.float16, torch.float32))  # dtypes of one matrix and of its layer


class CompressedModule(nn.Module):
    """Base of the compressed modules: stored matrices in buffers, dequantized ones cached after use.

    Buffers are named by matrix and part: ``weight_codes``, ``weight_scale``, ``weight_zero_point``, or the same of
    ``a`` and ``b``, as the form's codecs lay them out.

    Attributes:
        kind: name of the layer's kind (``mlorq.models.kinds``).
        float_class: class of the float layers that it replaces.
        layer_name: the layer's name in the model; modules that share one weight share the name.
        candidate: form, bits and rank.
        zero_point: how zero-points and scales are stored.
        weight_shape: shape of the float layer's weight.
        compute_dtype: dtype of the dequantized matrices.
        cache: keep dequantized matrices after first use (more memory, less time). They are not in the state dict, and
            are dropped when the module is moved, cast or loaded; a copy starts without them.
        bias: the float layer's bias, or None.
    """

    kind: ClassVar[str]
    float_class: ClassVar[type[nn.Module]]
    bias: nn.Parameter | None

    def __init__(self, layer: nn.Module, name: str, candidate: Candidate, zero_point: ZeroPoint, cache: bool) -> None:
        """Use ``from_layer`` or ``placeholder``, which check their arguments."""
        super().__init__()
        weight, bias = weight_of(layer), getattr(layer, "bias", None)
        self.layer_name = name
        self.candidate = candidate
        self.zero_point: ZeroPoint = zero_point
        self.weight_shape = tuple(weight.shape)
        self.compute_dtype = weight.dtype
        self.cache = cache
        self._kept: dict[str, Tensor] = {}
        self.form: Form[Any] = FORMS[candidate.form]
        shape = Shape(*BY_NAME[self.kind].matrix_shape(weight.shape), getattr(layer, "groups", 1))
        self._matrices = self.form.matrices(candidate, shape, zero_point)
        self._parts: dict[str, str] = {}  # {buffer: dtype}
        for matrix, (rows, columns, codec) in self._matrices.items():
            for part, (size, dtype) in codec.layout(rows, columns).items():
                blank = torch.zeros(size, dtype=getattr(torch, dtype), device=weight.device)
                # Scales of one: a placeholder that was never loaded outputs zeros, not denormals.
                self.register_buffer(f"{matrix}_{part}", blank + 1 if blank.is_floating_point() else blank)
                self._parts[f"{matrix}_{part}"] = dtype
        self.bias = None
        if bias is not None:
            assert isinstance(bias, Tensor)
            self.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.computed_by_class = is_computed_by_class(layer)
        self._copy_geometry(layer)

    def _copy_geometry(self, layer: nn.Module) -> None:
        raise NotImplementedError

    # -- construction -------------------------------------------------------------------------------------

    @classmethod
    def from_layer(cls, layer: nn.Module, compressed: CompressedLayer, *, cache: bool = True) -> Self:
        """The compressed counterpart of a float layer, on its device and in its dtype.

        Args:
            layer: the float layer, for its shape, bias, stride and the like; it is not changed.
            compressed: the stored matrices.
            cache: keep dequantized matrices after first use.

        Raises:
            ModelError: the layer has another class or shape, or cannot take this form.
            ValueError: a code does not fit its bits.
        """
        name, matrices = compressed.layer, compressed.matrices
        zero_point = merged(matrix.codec.zero_point for matrix in matrices.values())
        result = cls.placeholder(layer, name, compressed.candidate, zero_point, cache=cache)
        expected = {part: ((rows, columns), codec.bits) for part, (rows, columns, codec) in result._matrices.items()}
        given = {part: (matrix.shape, matrix.codec.bits) for part, matrix in matrices.items()}
        if given != expected:
            raise ModelError(f"layer {name!r}: matrices (shape, bits) are {given} instead of {expected}")
        for part, matrix in matrices.items():
            for key, tensor in result._matrices[part].codec.pack(matrix).items():
                buffer = result.get_buffer(f"{part}_{key}")
                # If one matrix has int16 zero-points or float32 scales, all matrices of the layer have them.
                if tensor.dtype != buffer.dtype and (tensor.dtype, buffer.dtype) not in WIDENED:
                    raise ModelError(f"layer {name!r}: {key} of {part} is {tensor.dtype} instead of {buffer.dtype}")
                buffer.copy_(tensor)
        if compressed.bias is not None:
            if result.bias is None:
                raise ModelError(f"layer {name!r} has no bias, but the stored layer has one")
            result.bias.copy_(compressed.bias)
        return result

    @classmethod
    def placeholder(
        cls, layer: nn.Module, name: str, candidate: Candidate, zero_point: ZeroPoint, *, cache: bool = True
    ) -> Self:
        """Like ``from_layer``, with zero codes, to load a state dict into.

        Raises:
            ModelError: the layer has another class, or cannot take this form.
        """
        reason = _why_not(layer, cls.float_class, candidate)
        if reason:
            raise ModelError(f"layer {name!r} cannot become a {cls.__name__}: {reason}")
        return cls(layer, name, candidate, zero_point, cache)

    # -- contents -----------------------------------------------------------------------------------------

    def stored_tensors(self) -> dict[str, Tensor]:
        """The layer's stored tensors by buffer name: all that counts towards the budget.

        Raises:
            ModelError: the codes have been dropped.
        """
        if not self._parts:
            raise ModelError(
                f"layer {self.layer_name!r} has dropped its codes; load it with weights='packed' to keep them"
            )
        return {name: self.get_buffer(name) for name in self._parts}

    def drop_codes(self, twin: CompressedModule | None = None) -> None:
        """Keep only the dequantized matrices: memory and time of a float layer, which cannot be stored again.

        Args:
            twin: a layer with the same weight that has dropped its codes; its matrices are shared.
        """
        for name in self._matrices:
            values = self.dense(name) if twin is None else twin.dense(name)
            self.register_buffer(_values(name), values, persistent=False)
        for part in self._parts:
            del self._buffers[part]
        self._parts = {}
        self.drop_cache()

    @property
    def stored_bytes(self) -> int:
        """Bytes of the stored tensors: ``Form.size`` of the candidate in ``exact`` accounting."""
        return sum(tensor.nbytes for tensor in self.stored_tensors().values())

    def matrix(self, name: str) -> StoredMatrix:
        """One stored matrix with its codes unpacked.

        Raises:
            ModelError: the codes have been dropped.
        """
        _, columns, codec = self._matrices[name]
        return codec.unpack(self._tensors(name), columns)

    def _tensors(self, name: str) -> dict[str, Tensor]:
        prefix = f"{name}_"
        stored = self.stored_tensors()
        return {key.removeprefix(prefix): tensor for key, tensor in stored.items() if key.startswith(prefix)}

    def packed(self) -> dict[str, tuple[dict[str, Tensor], int, Codec]]:
        """The stored matrices by name, each with its packed tensors, its number of columns and its codec."""
        return {name: (self._tensors(name), columns, codec) for name, (_, columns, codec) in self._matrices.items()}

    def compressed_layer(self) -> CompressedLayer:
        """The stored matrices as a record: the inverse of ``from_layer``."""
        matrices = {name: self.matrix(name) for name in self._matrices}
        return CompressedLayer(self.layer_name, self.candidate, matrices)

    def dense(self, name: str) -> Tensor:
        """One stored matrix dequantized, ``(rows, columns)`` in the compute dtype."""
        values = self._buffers.get(_values(name))
        if values is not None:
            return values
        if torch.compiler.is_compiling():  # the traced program holds the codes; no traced tensor is cached
            return self._dequantize(name)
        kept = self._kept.get(name)
        if kept is None:
            # Never an inference tensor: later calls that need gradients reuse the cached one.
            with torch.inference_mode(False), torch.no_grad():
                kept = self._dequantize(name)
            if self.cache:
                self._kept[name] = kept
        return kept

    def _dequantize(self, name: str) -> Tensor:
        return self.matrix(name).dequantize().to(self.compute_dtype)

    @property
    def weight(self) -> Tensor:
        """The dense weight in the float layer's shape and the compute dtype.

        For code that reads ``layer.weight`` (models that cast their input to its dtype). Forms with factors compute A B
        at every access.
        """
        return self._dense_weight()

    def _dense_weight(self) -> Tensor:
        matrix = self.form.combine({name: self.dense(name) for name in self._matrices})
        return BY_NAME[self.kind].to_weight(matrix, self.weight_shape)

    def extra_repr(self) -> str:
        fields = ("form", "bits", "rank", "bits_a", "bits_b")
        shown = [(field, getattr(self.candidate, field)) for field in fields]
        form = [f"{field}={value}" for field, value in shown if value is not None]
        return ", ".join([*self._sizes_repr(), *form, f"bias={self.bias is not None}"])

    def _sizes_repr(self) -> list[str]:
        raise NotImplementedError

    def use_values(self, matrices: Mapping[str, Tensor]) -> None:
        """Compute with other matrices than the stored ones until the cache is dropped.

        Args:
            matrices: ``(rows, columns)`` in the compute dtype, by name.
        """
        self._kept = dict(matrices)

    # -- moving, casting, copying -------------------------------------------------------------------------

    def drop_cache(self) -> None:
        """Free the dequantized matrices; the next forward pass recomputes them."""
        self._kept = {}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.drop_cache()
        before = self.stored_tensors() if self._parts else {}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in before.items():
            after = self.get_buffer(name)
            if after.dtype != tensor.dtype:
                # A cast: only the device may change. Scales stay float16 in every compute dtype.
                self._buffers[name] = tensor.to(after.device)
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype)).dtype
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.drop_cache()
        error_messages = args[-1]
        for name, tensor in (self.stored_tensors() if self._parts else {}).items():
            given = state_dict.get(prefix + name)
            if given is not None and given.dtype != tensor.dtype:  # copying would wrap or round silently
                error_messages.append(f"{prefix + name} is {given.dtype} instead of {tensor.dtype}")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}}


def _values(matrix: str) -> str:
    """Name of the buffer with the values of a matrix whose codes have been dropped."""
    return f"{matrix}_values"


def _why_not(layer: nn.Module, float_class: type[nn.Module], candidate: Candidate) -> str | None:
    """Reason why a layer cannot take a form, or None."""
    if not isinstance(layer, float_class):
        return f"it is a {type(layer).__name__}"
    reason = own_code(layer, float_class)
    if reason is not None:
        return reason
    groups = getattr(layer, "groups", 1)
    if groups != 1 and FORMS[candidate.form].has_product:
        return f"a convolution with {groups} groups has no low-rank form"
    return why_not_a_product(layer) if kind_of(layer) is not None else None
