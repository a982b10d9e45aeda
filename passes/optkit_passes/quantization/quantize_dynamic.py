"""Dynamic int8 quantization: weights stored as integers, activations quantized as they come."""

from __future__ import annotations

from typing import ClassVar, Literal

import onnx_ir as ir
from pydantic import Field

from optkit.errors import InputError
from optkit.graph import argument, is_unused, opset, remove
from optkit.pipeline import LOSSY, Context, Effect, Pass
from optkit.quant.integers import IntegerGrid, integer_grid
from optkit.target import IntegerFormat, Target

from ._dynamic_writer import DynamicWriter
from ._formats import OLDEST_OPSET as TABLE_OPSET
from ._formats import WEIGHTS, choose_formats
from ._layers import Layer, describe, embedding_table
from ._qdq import QdqWriter

OLDEST_OPSET = 11  # DynamicQuantizeLinear
PRODUCT_OPS = frozenset({"Gemm", "MatMul"})
SMALL = 0.01  # of all weights of products
DYNAMIC = "dynamic"  # target.activations: the runtime finds activation ranges as it runs


class QuantizeDynamic(Pass):
    """Quantize matrix products with constant weights to 8 bits, with activation scales found at run time.

    Every run finds the range of each activation anew, so that no calibration is needed and none can be wrong. MatMul
    and Gemm become DynamicQuantizeLinear, MatMulInteger and the scaling; what reads the same value shares its integers.
    onnxruntime fuses that into its own operators when it loads the model. Convolutions stay as they are: onnxruntime's
    ConvInteger took 5 to 18 times as long as its float convolution (64 and 256 channels, one thread, AVX-512 VNNI).

    Unsigned weights are the default where signed ones would saturate: on x86 without VNNI onnxruntime adds pairs of
    products of signed weights in int16, and those of unsigned ones in int32, in more instructions
    (onnxruntime/core/mlas/lib/platform.cpp@0112bef28c2d: GemmU8S8Kernel, GemmU8U8Kernel). Elsewhere signed ones are the
    faster: with AMX 14 times at 128 rows. SQNR in dB on an emulated Haswell, of the same models and samples:

    =============  ======  ==========  ========  ===================
    model          signed  kept apart  unsigned  unsigned per tensor
    =============  ======  ==========  ========  ===================
    ReLU decoder     35.6        41.1      41.9                 40.2
    SST-2 encoder    27.4        41.6      41.0                 41.3
    =============  ======  ==========  ========  ===================

    "Kept apart" are signed weights with scales at which no pair saturates: what ``int8`` gives there.

    Attributes:
        weights: ``int8``, ``uint8`` (one zero point per scale), or ``auto``: what the target takes, and ``uint8`` where
            that would have to give up range.
        per_channel: Whether each output channel has its own scale, where the target takes that.
        clip: Search scales of smallest squared error, instead of covering every weight.
        embeddings: Whether tables that Gather picks rows of are stored in 8 bits.
        min_elements: Products with fewer weights stay in float if they hold less than a hundredth of all: a small last
            layer makes a file no larger, and rounding what it reads goes straight into the outputs (2 dB on the SST-2
            encoder).
    """

    effect: ClassVar[Effect] = LOSSY

    weights: Literal["auto", "int8", "uint8"] = "auto"
    per_channel: bool = True
    clip: bool = False
    embeddings: bool = True
    min_elements: int = Field(default=1024, ge=0)

    def run(self, model: ir.Model, context: Context) -> None:
        """Quantize every graph in place, bodies included."""
        grid, pairs_saturate = self._grid(context.target)
        layers = self._layers(model, context)
        tables = self._tables(model, context)
        if not layers and not tables:
            return
        per_channel = self.per_channel and "channel" in _weights(context.target).granularity
        writer = DynamicWriter(model, grid, per_channel=per_channel, pairs_saturate=pairs_saturate, clip=self.clip)
        read_by_rows = {layer.stored for layer in layers if _reads_rows(layer)}
        read = dict.fromkeys(node.inputs[0] for node in tables) | dict.fromkeys(layer.stored for layer in layers)
        for node in [node for node in tables if node.inputs[0] in read_by_rows]:
            tables.remove(node)
            context.applied(node, "table stored in 8 bits, once for its rows and for the products with it")
            writer.table(node)
        for layer in layers:
            kind = f"{'unsigned ' if grid.low >= 0 else ''}8 bits"
            what = f"{_size(layer)} weights in {kind} with {writer.layer(layer)} scales, activations as they come"
            context.applied(layer.node, what)
        _store(model, tables, context)
        remove([layer.transpose for layer in layers if layer.transpose is not None])
        for value in read:
            if value is None or value.graph is None:
                continue  # removed with its last reader
            if is_unused(value):
                value.graph.initializers.pop(value.name or "")
            elif value.dtype == ir.DataType.FLOAT:
                use = next(iter(value.uses()), None)  # None: it is an output of the model
                where = value if use is None else use.node
                context.missed(where, f"reads '{value.name}' in float, so that it is stored in both forms")

    def _grid(self, target: Target | None) -> tuple[IntegerGrid, bool]:
        """Return the integers for weights, and whether their scales must keep pairs of products within int16.

        Raises:
            InputError: The target's runtime does not quantize activations as they come.
        """
        if target is not None and DYNAMIC not in target.activations:
            what = f"target '{target.name}' does not quantize activations at run time"
            raise InputError(what, hint="choose another precision, or give the target a table [activations.dynamic]")
        taken = _weights(target)
        reduced = target is not None and target.needs_reduced_range(taken)
        if self.weights == "uint8" or (self.weights == "auto" and (reduced or taken.dtype == "uint8")):
            return integer_grid("uint8", symmetric=False), False
        return integer_grid("int8", symmetric=True), reduced

    def _layers(self, model: ir.Model, context: Context) -> list[Layer]:
        layers = {node: dynamic_layer(node, opset(model)) for node in model.graph.all_nodes() if is_product(node)}
        for node, layer in layers.items():
            if isinstance(layer, str):
                context.missed(node, layer)
        found = {layer: _size(layer) for layer in layers.values() if isinstance(layer, Layer)}
        small = [layer for layer, size in found.items() if size < min(self.min_elements, SMALL * sum(found.values()))]
        for layer in small:
            context.missed(
                layer.node, f"its {found[layer]} weights are less than a hundredth of all: not worth rounding"
            )
        return [layer for layer in found if layer not in small]

    def _tables(self, model: ir.Model, context: Context) -> list[ir.Node]:
        tables = [node for node in model.graph if self.embeddings and embedding_table(node) is not None]
        if tables and opset(model) < TABLE_OPSET:
            for node in tables:
                context.missed(node, f"opset {opset(model)}: one scale per column of a table needs opset {TABLE_OPSET}")
            return []
        return tables


def _size(layer: Layer) -> int:
    return 0 if layer.stored is None or layer.stored.const_value is None else layer.stored.const_value.size


def _store(model: ir.Model, tables: list[ir.Node], context: Context) -> None:
    """Store tables that are only picked from as quantize-static does."""
    if tables:
        writer = QdqWriter(model, choose_formats(context.target, 8, 8), shared=())
        for node in tables:
            writer.embedding(node)
            context.applied(node, "table stored in 8 bits")


def _weights(target: Target | None) -> IntegerFormat:
    formats = WEIGHTS if target is None else target.weights
    if "int8" not in formats:
        name = "" if target is None else target.name
        raise InputError(f"target '{name}' takes no 8-bit weights", hint="choose another precision")
    return formats["int8"]


def is_product(node: ir.Node) -> bool:
    """Whether the node is a matrix product."""
    return node.op_type in PRODUCT_OPS and node.domain in ("", "ai.onnx")


def dynamic_layer(node: ir.Node, version: int) -> Layer | str:
    """Return the layer that a matrix product is, or why it has no dynamically quantized form."""
    layer = describe(node)
    if isinstance(layer, str):
        return layer
    if layer.weight is None:
        return "its weights are not constant"
    if version < OLDEST_OPSET:
        return f"opset {version}: DynamicQuantizeLinear needs opset {OLDEST_OPSET}"
    if node.attributes.get_int("transA", 0):
        return "it transposes its input"
    data = argument(node, 0)
    if data is None or data.shape is None or len(data.shape) < 2:
        return "its input is not known to be a matrix"
    return layer


def _reads_rows(layer: Layer) -> bool:
    """Whether the stored weight is [N, K], so that an output channel is a row of it."""
    return layer.transpose is not None or (layer.node.op_type == "Gemm" and layer.axis == 0)
