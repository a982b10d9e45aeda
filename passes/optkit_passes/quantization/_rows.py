"""A convolution or matrix product as one matrix [N, K], and the rows [T, K] of its input that the matrix multiplies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ._layers import Layer


@dataclass(frozen=True)
class Window:
    """What a convolution reads for one output position, by spatial axis."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[tuple[int, int], ...] | None
    auto_pad: str

    def padding(self, sizes: Sequence[int]) -> list[tuple[int, int]]:
        """Return the zeros before and after each axis of an input with these sizes."""
        if self.pads is not None:
            return list(self.pads)
        found = []
        for size, kernel, stride, dilation in zip(sizes, self.kernel, self.strides, self.dilations, strict=True):
            total = max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
            small, large = total // 2, total - total // 2
            found.append((small, large) if self.auto_pad == "SAME_UPPER" else (large, small))
        return found


@dataclass(frozen=True)
class MatrixLayer:
    """How a layer's weight reads as a matrix [N, K] of output channels by summed inputs.

    Attributes:
        shape: The weight's own shape.
        transposed: The weight is stored as [K, N].
        window: What a convolution reads; None for a matrix product.
        transposed_input: The product reads its input [K, T] transposed.
        groups: Into how many equal groups the matrix's rows fall; each multiplies K columns of its own.
    """

    shape: tuple[int, ...]
    transposed: bool = False
    window: Window | None = None
    transposed_input: bool = False
    groups: int = 1

    @property
    def columns(self) -> int:
        """K."""
        return self.shape[0] if self.transposed else int(np.prod(self.shape[1:]))

    def matrix(self, weight: np.ndarray) -> np.ndarray:
        """Return the weight as [N, K]."""
        return weight.T if self.transposed else weight.reshape(self.shape[0], -1)

    def restore(self, matrix: np.ndarray) -> np.ndarray:
        """Return [N, K] in the weight's own shape."""
        return matrix.T if self.transposed else matrix.reshape(self.shape)

    def rows(self, value: np.ndarray, most: int, turn: int = 0) -> np.ndarray:
        """Return at most ``most`` rows [T, groups K], spread over one input; others with every ``turn``."""
        if self.window is not None:
            return _patches(value, self.window, most, turn)
        flat = value.T if self.transposed_input else value.reshape(-1, value.shape[-1])
        return np.asarray(flat[_spread(len(flat), most, turn)])


def matrix_layer(layer: Layer, shape: tuple[int, ...]) -> MatrixLayer | str:
    """Return how a layer's stored weight of this shape reads as one matrix, or why it does not."""
    node = layer.node
    if node.op_type == "ConvTranspose":
        return "an input of a transposed convolution adds to many outputs"
    if layer.axis is None:
        return "its weights are no matrix"
    if node.op_type == "Conv":
        return MatrixLayer(shape, window=_window(node, shape), groups=node.attributes.get_int("group", 1) or 1)
    if node.op_type == "Gemm":
        return MatrixLayer(
            shape, transposed=layer.axis == 1, transposed_input=bool(node.attributes.get_int("transA", 0))
        )
    return MatrixLayer(shape, transposed=layer.transpose is None)


def _window(node: ir.Node, shape: tuple[int, ...]) -> Window:
    axes = len(shape) - 2
    strides, dilations = (
        tuple(node.attributes[name].as_ints()) if name in node.attributes else (1,) * axes
        for name in ("strides", "dilations")
    )
    auto_pad = node.attributes.get_string("auto_pad", "NOTSET") or "NOTSET"
    pads = tuple(node.attributes["pads"].as_ints()) if "pads" in node.attributes else (0,) * (2 * axes)
    fixed = None if auto_pad.startswith("SAME") else tuple(zip(pads[:axes], pads[axes:], strict=True))
    if auto_pad == "VALID":
        fixed = ((0, 0),) * axes
    return Window(shape[2:], strides, dilations, fixed, auto_pad)


def _patches(value: np.ndarray, window: Window, most: int, turn: int) -> np.ndarray:
    """Return input patches [T, C * kernel] of [N, C, spatial...] in the order of the weight's axes."""
    axes, columns = len(window.kernel), value.shape[1] * int(np.prod(window.kernel))
    padded = np.pad(value, [(0, 0), (0, 0), *window.padding(value.shape[2:])])
    reach = tuple((k - 1) * d + 1 for k, d in zip(window.kernel, window.dilations, strict=True))
    if any(size < needed for size, needed in zip(padded.shape[2:], reach, strict=True)):
        return np.empty((0, columns), value.dtype)
    view = np.lib.stride_tricks.sliding_window_view(padded, reach, axis=tuple(range(2, 2 + axes)))
    steps = (1, 1, *window.strides, *window.dilations)  # [N, C, positions..., taps...]
    view = view[tuple(slice(None, None, step) for step in steps)]
    positions = (view.shape[0], *view.shape[2 : 2 + axes])
    picked = np.unravel_index(_spread(int(np.prod(positions)), most, turn), positions)
    patches = np.moveaxis(view, 1, 1 + axes)[picked]  # [T, C, kernel...]
    return np.asarray(patches.reshape(len(patches), columns))


def _spread(count: int, most: int, turn: int) -> np.ndarray:
    """Return one index out of each of ``most`` equal parts of ``range(count)``, or all of them, in their order.

    Which one is a matter of chance: a fixed step would pick the same columns of every image.
    """
    if count <= most:
        return np.arange(count)
    chance = np.random.default_rng([turn, count]).random(most)
    return np.unique(((np.arange(most) + chance) * (count / most)).astype(int))
