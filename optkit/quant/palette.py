"""How a palettized weight stands in a graph: a Gather from look-up tables, written and read back in one place.

``weight = Gather(lut, Cast(indices))``, and with several LUTs, which lie one behind the other in ``lut``,
``weight = Gather(lut, Cast(indices) + offset)`` where ``offset`` is the place of each channel's LUT. Indices are stored
in the narrowest type that the opset has. A runtime without LUTs expands the weight when it loads the model; a packager
whose format has them reads them with ``palette_of``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from optkit.graph import add_constant, constant, unique
from optkit.quant.codebook import lut_blocks, reconstruct

LUT_BITS_KEY = "optkit.lut_bits"  # metadata_props of every node of the pattern: bits of an index

INT32 = ir.DataType.INT32
# Element types of indices and the opset that brought each to Cast.
INDEX_TYPES = ((2, 25, ir.DataType.UINT2), (4, 21, ir.DataType.UINT4), (8, 1, ir.DataType.UINT8))


@dataclass(frozen=True)
class Palette:
    """A weight as LUTs and indices.

    Attributes:
        lut: [blocks, 2**bits], in the weight's type; a sparse weight's is [blocks, 2**bits + 1], 256 with 8 bits, and
            each begins with 0, which stands for the weights that were pruned.
        indices: uint8, in the weight's shape.
        bits: Bits of an index.
        axis: The axis whose channels are divided among the LUTs; 0 with one LUT.
        channels_per_lut: How many neighbouring channels share a LUT, the last block may be short; 0 with one LUT.
    """

    lut: np.ndarray
    indices: np.ndarray
    bits: int
    axis: int = 0
    channels_per_lut: int = 0

    @property
    def sparse(self) -> bool:
        """Whether index 0 stands for 0 in every block, and no other weight."""
        return not self.lut[:, 0].any()

    @property
    def weight(self) -> np.ndarray:
        """The weights that it stands for."""
        return reconstruct(self.lut, self.indices, axis=self.axis, channels_per_lut=self.channels_per_lut)

    @property
    def offset(self) -> np.ndarray | None:
        """int32 [1, .., channels, .., 1]: where each channel's LUT begins, or None with one LUT."""
        if len(self.lut) == 1:
            return None
        shape = [1] * self.indices.ndim
        shape[self.axis] = self.indices.shape[self.axis]
        block = np.arange(shape[self.axis], dtype=np.int32) // self.channels_per_lut
        return (block * np.int32(self.lut.shape[1])).reshape(shape)

    def index_type(self, opset: int) -> ir.DataType:
        """Return the element type that an ONNX file stores the indices in."""
        return index_type(max(self.bits, int(self.lut.shape[1] - 1).bit_length()), opset)

    def stored_bytes(self, opset: int) -> int:
        """Return the bytes that its constants take in an ONNX file."""
        offset = self.offset
        indices = -(-self.indices.size * self.index_type(opset).bitwidth // 8)
        return indices + self.lut.nbytes + (0 if offset is None else offset.nbytes)


def index_type(bits: int, opset: int) -> ir.DataType:
    """Return the narrowest element type that indices can be stored in."""
    return next(dtype for width, since, dtype in INDEX_TYPES if bits <= width and opset >= since)


def write_palette(before: ir.Node, name: str, palette: Palette, opset: int, taken: set[str]) -> ir.Value:
    """Add the constants and nodes that compute a palettized weight to a graph, in front of a node.

    Args:
        before: The first node of the graph that reads the weight.
        name: The weight's name; the new values' are derived from it.
        palette: The weight.
        opset: Version of the default operator set.
        taken: All names in the model; the new ones are added.

    Returns:
        The weight.
    """
    graph = before.graph
    assert graph is not None
    stored = palette.indices.astype(palette.index_type(opset).numpy())
    lut = add_constant(graph, f"{name}/lut", palette.lut.ravel(), taken)
    index = add_constant(graph, f"{name}/indices", stored, taken)
    nodes = [ir.node("Cast", [index], {"to": INT32.value}, name=unique(f"{name}/Cast", taken))]
    if palette.offset is not None:
        offset = add_constant(graph, f"{name}/offset", palette.offset, taken)
        nodes.append(ir.node("Add", [nodes[-1].outputs[0], offset], name=unique(f"{name}/Add", taken)))
    nodes.append(ir.node("Gather", [lut, nodes[-1].outputs[0]], {"axis": 0}, name=unique(f"{name}/Gather", taken)))
    for node in nodes:
        node.metadata_props[LUT_BITS_KEY] = str(palette.bits)
        node.outputs[0].name = unique(f"{node.name}_output", taken)
        node.outputs[0].shape = ir.Shape(palette.indices.shape)
        node.outputs[0].type = ir.TensorType(INT32 if node is not nodes[-1] else lut.dtype or ir.DataType.FLOAT)
    graph.insert_before(before, nodes)
    return nodes[-1].outputs[0]


def palette_of(node: ir.Node | None) -> Palette | None:
    """Return the LUTs and indices of the Gather that computes a palettized weight; None for any other node.

    A pass that changes what is written here removes the mark, or the weight is no palette any more.
    """
    text = "" if node is None else node.metadata_props.get(LUT_BITS_KEY, "")
    if node is None or node.op_type != "Gather" or node.domain != "" or text not in "12345678" or not text:
        return None
    bits = int(text)
    lut, source = constant(node.inputs[0]), _producer(node.inputs[1])
    offset = constant(source.inputs[1]) if source is not None and source.op_type == "Add" else None
    cast = source if source is None or offset is None else _producer(source.inputs[0])
    indices = constant(cast.inputs[0]) if cast is not None and cast.op_type == "Cast" else None
    if lut is None or lut.ndim != 1 or indices is None:
        return None
    entries = (
        lut.size if offset is None else int(offset.min(initial=lut.size, where=offset > 0))
    )  # the second LUT's place
    if entries not in (1 << bits, (1 << bits) + 1) or lut.size % entries:
        return None
    luts, integers = lut.reshape(-1, entries), indices.astype(np.uint8)
    if offset is None:
        return Palette(luts, integers, bits) if len(luts) == 1 else None
    axis, channels = int(np.argmax(offset.shape)), int(np.count_nonzero(offset == 0))
    palette = Palette(luts, integers, bits, axis, channels)
    fits = channels > 0 and len(luts) == len(lut_blocks(integers, axis, channels)) > 1
    expected = palette.offset if fits else None
    return palette if expected is not None and np.array_equal(expected, offset) else None


def _producer(value: ir.Value | None) -> ir.Node | None:
    return None if value is None else value.producer()
