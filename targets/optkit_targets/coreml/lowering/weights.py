"""Weights as they are stored: dense, pruned, as scaled integers, or as palettes; axes are moved in the stored form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

from optkit.graph import argument, constant
from optkit.quant.palette import Palette, palette_of
from optkit_targets.coreml import toolkit
from optkit_targets.coreml.lowering.forms import needs, prefers
from optkit_targets.coreml.lowering.scope import CannotLower, Scope

SMALL_BLOCK = 8  # smaller blocks cost more in scales than integers save
PALETTE_BITS = (1, 2, 3, 4, 6, 8)  # of an index in Core ML's LUTs; before iOS 18 not 3
FLOAT_BITS = 16  # of a weight that is not compressed
WORTH = 1024  # bits: what keeping zeros apart must save, more than the second constant costs


class Weight(Protocol):
    """A constant weight in some stored form."""

    def transposed(self, perm: Sequence[int]) -> Weight:
        """Return the weight with its axes in another order."""

    def write(self, scope: Scope, name: str) -> Any:
        """Write the constants, and the operation that expands them, into the program."""


@dataclass(frozen=True)
class Dense:
    """A weight as it is; of a pruned one that many are zeros, the others and one bit for each that says where."""

    array: np.ndarray

    def transposed(self, perm: Sequence[int]) -> Dense:
        """Return the weight with its axes in another order."""
        return Dense(np.ascontiguousarray(self.array.transpose(perm)))

    def write(self, scope: Scope, name: str) -> Any:
        """Write a constant, pruned as iOS 16 has it."""
        mask = self.array != 0
        if self.array.ndim < 2 or self.array.dtype.kind != "f" or not _pays(mask, FLOAT_BITS, FLOAT_BITS):
            return scope.const(self.array, name)
        if scope.deployment < 16:
            prefers(scope, 16, "a pruned weight")
            return scope.const(self.array, name)
        return _sparse(scope, self.array[mask], mask, name)


@dataclass(frozen=True)
class Scaled:
    """A weight as integers: ``scale·(data - offset)``, one scale and offset for each block of every axis.

    Attributes:
        data: int8 or uint8, which also hold integers of 4 bits.
        scale: Floats of the same rank; each dimension divides that of ``data``.
        offset: In the type of ``data`` and the shape of ``scale``, or None for zeros.
        bits: 4 or 8.
    """

    data: np.ndarray
    scale: np.ndarray
    offset: np.ndarray | None
    bits: int

    def transposed(self, perm: Sequence[int]) -> Scaled:
        """Return the weight with its axes in another order: integers, scales and offsets alike."""
        offset = None if self.offset is None else self.offset.transpose(perm)
        return replace(self, data=self.data.transpose(perm), scale=self.scale.transpose(perm), offset=offset)

    def write(self, scope: Scope, name: str) -> Any:
        """Write integers of 8 bits with scales along one axis at most as iOS 16 has them, all others as iOS 18 does."""
        varied = [axis for axis, size in enumerate(self.scale.shape) if size > 1]
        blocks = any(self.scale.shape[axis] != self.data.shape[axis] for axis in varied)
        if self.bits < 8 or blocks or len(varied) > 1:
            needs(scope, 18, f"a weight of {self.bits} bits{' in blocks' if blocks else ''}")
            return self._write_blocks(scope, name)
        needs(scope, 16, "a weight of 8 bits")
        offset = np.zeros_like(self.scale, self.data.dtype) if self.offset is None else self.offset
        return scope.mb.constexpr_affine_dequantize(
            quantized_data=np.ascontiguousarray(self.data),
            zero_point=offset.ravel() if varied else offset.ravel()[0],
            scale=self.scale.ravel() if varied else self.scale.ravel()[0],
            axis=np.int32(varied[0] if varied else 0),
            name=scope.name(name),
        )

    def _write_blocks(self, scope: Scope, name: str) -> Any:
        kind = f"{'u' if self.data.dtype.kind == 'u' else ''}int{self.bits}"
        stored = toolkit.mil().types.string_to_nptype(kind)
        offset = None if self.offset is None else np.ascontiguousarray(self.offset).astype(stored)
        return scope.mb.constexpr_blockwise_shift_scale(
            data=np.ascontiguousarray(self.data).astype(stored),
            scale=np.ascontiguousarray(self.scale),
            **({} if offset is None else {"offset": offset}),
            name=scope.name(name),
        )


@dataclass(frozen=True)
class Palettized:
    """A weight as indices into LUTs."""

    palette: Palette

    def transposed(self, perm: Sequence[int]) -> Palettized:
        """Return the weight with its axes in another order: the indices', and which of them the LUTs divide."""
        axis = list(perm).index(self.palette.axis)
        return Palettized(replace(self.palette, indices=self.palette.indices.transpose(perm), axis=axis))

    def write(self, scope: Scope, name: str) -> Any:
        """Write one LUT as iOS 16 has it, several as iOS 18 does; wider indices where their width is none of MIL's."""
        needs(scope, 16, "a palettized weight")
        if len(self.palette.lut) > 1:
            needs(scope, 18, "a weight with several LUTs")
        entries = int(self.palette.lut.shape[1] - 1).bit_length()
        widths = [bits for bits in PALETTE_BITS if bits >= max(entries, self.palette.bits)]
        mask = self.palette.indices != 0
        narrow = next(bits for bits in PALETTE_BITS if bits >= self.palette.bits)
        if self.palette.sparse and _pays(mask, widths[0], narrow):
            if scope.deployment >= 18:
                return self._write_apart(scope, mask, narrow, name)
            prefers(scope, 18, "a pruned weight with a LUT")
        if scope.deployment < 18 and widths[0] == 3:
            prefers(scope, 18, "a LUT of 3 bits")
            del widths[0]
        bits = widths[0]
        luts = np.pad(self.palette.lut, ((0, 0), (0, (1 << bits) - self.palette.lut.shape[1])))
        indices = np.ascontiguousarray(self.palette.indices)
        if scope.deployment < 18:
            return scope.mb.constexpr_lut_to_dense(
                indices=pack(indices, bits),
                lut=luts[0],
                shape=np.array(indices.shape, np.uint32),
                name=scope.name(name),
            )
        stored = toolkit.mil().types.string_to_nptype(f"uint{bits}")
        return scope.mb.constexpr_lut_to_dense(
            indices=indices.astype(stored), lut=self._tables(luts), name=scope.name(name)
        )

    def _write_apart(self, scope: Scope, mask: np.ndarray, bits: int, name: str) -> Any:
        """Write indices of the weights that are not 0, and a mask of those."""
        indices = (self.palette.indices[mask] - 1).astype(toolkit.mil().types.string_to_nptype(f"uint{bits}"))
        luts = self.palette.lut[:, 1:]
        luts = np.pad(luts, ((0, 0), (0, (1 << bits) - luts.shape[1])))
        found, values = scope.mb.constexpr_lut_to_sparse(
            indices_mask=_bits(mask),
            indices_nonzero_data=indices,
            lut=self._tables(luts),
            name=scope.name(name, "values"),
        )
        return scope.mb.constexpr_sparse_to_dense(nonzero_data=values, mask=found, name=scope.name(name))

    def _tables(self, luts: np.ndarray) -> np.ndarray:
        """Return LUTs, [blocks along each axis, entries, 1]; a short last block shares its LUT by fewer channels."""
        palette = self.palette
        shape = [1] * palette.indices.ndim
        if len(luts) > 1:
            channels = palette.indices.shape[palette.axis]
            shared = int(np.gcd(palette.channels_per_lut, channels))
            luts = luts[np.arange(0, channels, shared) // palette.channels_per_lut]
            shape[palette.axis] = len(luts)
        return luts.reshape(*shape, luts.shape[1], 1)


def _pays(mask: np.ndarray, dense_bits: int, kept_bits: int) -> bool:
    """Return whether a mask and the elements that it keeps take clearly less than all of them."""
    kept = int(np.count_nonzero(mask))
    return kept > 0 and mask.size * dense_bits - (mask.size + kept * kept_bits) > WORTH


def _sparse(scope: Scope, values: np.ndarray, mask: np.ndarray, name: str) -> Any:
    """Write what a mask keeps of a tensor, zeros elsewhere."""
    if scope.deployment >= 18:
        return scope.mb.constexpr_sparse_to_dense(nonzero_data=values, mask=_bits(mask), name=scope.name(name))
    return scope.mb.constexpr_sparse_to_dense(
        nonzero_data=values,
        mask=pack(mask.astype(np.uint8), 1),
        shape=np.array(mask.shape, np.uint32),
        name=scope.name(name),
    )


def _bits(mask: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(mask).astype(toolkit.mil().types.string_to_nptype("uint1"))


def weight_input(scope: Scope, node: ir.Node, index: int) -> Any:
    """Return the variable of a weight that a node reads at ``index``, a constant in its stored form.

    Raises:
        CannotLower: The node has no such input.
    """
    value = argument(node, index)
    return scope.input(node, index) if value is None else weight_variable(scope, value)


def weight_variable(scope: Scope, value: ir.Value) -> Any:
    """Return the variable of a weight, a constant in its stored form; it is written where it is first read."""
    array = constant(value)
    if array is not None and not scope.written(value):
        scope.set(value, Dense(array).write(scope, value.name or ""))
    return scope.variable(value)


def pack(indices: np.ndarray, bits: int) -> np.ndarray:
    """Return indices in as few bytes as they fill, the first in the lowest bits (MIL's constexpr_lut_to_dense)."""
    planes = (indices.ravel()[:, None] >> np.arange(bits, dtype=np.uint8)) & 1
    return np.packbits(planes.astype(np.uint8).ravel(), bitorder="little")


def weight_of(value: ir.Value | None) -> Weight | None:
    """Return the stored form of a constant weight, through the nodes that expand or transpose it; None: computed."""
    if value is None:
        return None
    array = constant(value)
    if array is not None:
        return Dense(array)
    node = value.producer()
    if node is None or node.domain not in ("", "ai.onnx"):
        return None
    if node.op_type == "Transpose":
        inner = weight_of(argument(node, 0))
        rank = len(value.shape) if value.shape is not None else 0
        given = node.attributes.get("perm")
        perm = list(given.as_ints()) if given is not None else list(range(rank))[::-1]
        return inner.transposed(perm) if inner is not None and len(perm) == rank else None
    palette = palette_of(node)
    if palette is not None:
        return Palettized(palette)
    return scaled_of(node) if node.op_type == "DequantizeLinear" else None


def _held(value: ir.Value | None) -> np.ndarray | None:
    """Return constant integers, through a node that transposes them: a tied table has one for the other reader."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "Transpose" or node.domain not in ("", "ai.onnx"):
        return constant(value)
    array = constant(argument(node, 0))
    given = node.attributes.get("perm")
    return None if array is None else array.transpose(None if given is None else list(given.as_ints()))


def scaled_of(node: ir.Node) -> Scaled | Dense | None:
    """Return the constant weight that a DequantizeLinear expands; None where it reads what is computed.

    Vectors, scalars, and integers of other widths than 4 and 8 bits are expanded here: Core ML stores none of them.
    """
    data, scale = _held(argument(node, 0)), constant(argument(node, 1))
    point = argument(node, 2)
    offset = constant(point)
    if data is None or scale is None or (point is not None and offset is None):
        return None
    scale = aligned(node, scale, data.shape)
    scale = scale if scale.dtype.name in ("float16", "float32") else scale.astype(np.float32)
    offset = None if offset is None or not offset.any() else aligned(node, offset, data.shape)
    kind = _kind(node)
    blocks = _even_blocks(node, data.shape, scale.shape)
    if kind is None or data.ndim < 2 or blocks is None:
        return Dense(expanded(node, data, scale, offset))
    stored, bits = kind
    axis, places = blocks
    scale = np.take(scale, places, axis)
    offset = None if offset is None else np.take(offset, places, axis).astype(stored)
    return Scaled(data.astype(stored), scale, offset, bits)


def _even_blocks(node: ir.Node, shape: Sequence[int], parts: Sequence[int]) -> tuple[int, np.ndarray] | None:
    """Return the axis of the blocks and which scale each block takes, where all blocks are to have one size.

    A short last block is no more than a block that shares its scale with its neighbours: blocks as large as divide
    both the axis and ``block_size`` are of one size. None where they would be too small to be worth it.
    """
    block = node.attributes.get_int("block_size", 0)
    if not block:
        return 0, np.arange(parts[0])
    axis = node.attributes.get_int("axis", 1) % len(shape)
    size = shape[axis]
    even = block if size % block == 0 else math.gcd(block, size)
    if even < min(block, SMALL_BLOCK):
        return None
    return axis, np.arange(0, size, even) // block


def _kind(node: ir.Node) -> tuple[type[np.generic], int] | None:
    """Return the type that holds a node's integers and their bits, or None where Core ML stores no such weights."""
    value = node.inputs[0]
    turned = None if value is None else value.producer()
    value = value if turned is None else turned.inputs[0]
    # a pruned model has no types but those of its constants
    name = "" if value is None or value.const_value is None else value.const_value.dtype.name
    return {"INT8": (np.int8, 8), "UINT8": (np.uint8, 8), "INT4": (np.int8, 4), "UINT4": (np.uint8, 4)}.get(name)


def aligned(node: ir.Node, array: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Return scales or zero points in the rank of the data: of a tensor, along ``axis``, or in blocks along it."""
    if array.size == 1 and array.ndim < 2:
        return array.reshape([1] * len(shape))
    if node.attributes.get_int("block_size", 0) and array.ndim == len(shape):
        return array
    axis = node.attributes.get_int("axis", 1)
    if array.ndim != 1 or not -len(shape) <= axis < len(shape):
        raise CannotLower(f"its scales, {list(array.shape)}, do not fit data of {list(shape)}")
    return array.reshape([array.size if place == axis % len(shape) else 1 for place in range(len(shape))])


def expanded(node: ir.Node, data: np.ndarray, scale: np.ndarray, offset: np.ndarray | None) -> np.ndarray:
    """Return ``scale·(data - offset)``."""
    block = node.attributes.get_int("block_size", 0)
    if block:
        axis = node.attributes.get_int("axis", 1)
        places = np.arange(data.shape[axis]) // block
        scale, offset = np.take(scale, places, axis), None if offset is None else np.take(offset, places, axis)
    real = data.astype(np.float32) - (0 if offset is None else offset.astype(np.float32))
    return np.asarray(real * scale.astype(np.float32)).astype(scale.dtype)
