"""Small transformers as exporters write them, random weights, every size fixed: a decoder's step and an encoder."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from optkit.model.loading import infer_shapes

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64
VOCABULARY, WIDTH, HEADS, KV_HEADS, HIDDEN = 48, 32, 4, 2, 64
DEPTH = WIDTH // HEADS  # of a head


class Builder:
    """Adds nodes to a graph, one after the other; constants and weights become initializers."""

    def __init__(self, opset: int) -> None:
        self.random = np.random.default_rng(0)
        self.graph = ir.Graph([], [], nodes=[], opset_imports={"": opset}, name="transformer")
        self._count = 0

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int]) -> ir.Value:
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self.graph.inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str) -> None:
        value.name = name
        self.graph.outputs.append(value)

    def constant(self, array: np.ndarray | float | list[int]) -> ir.Value:
        array = np.array(array, np.int64 if isinstance(array, list) else np.float32)
        value = ir.Value(name=f"c{len(self.graph.initializers)}", const_value=ir.tensor(array))
        value.type, value.shape = ir.TensorType(ir.tensor(array).dtype), ir.Shape(array.shape)
        self.graph.register_initializer(value)
        return value

    def weight(self, *shape: int) -> ir.Value:
        return self.constant(self.random.standard_normal(shape).astype(np.float32) / np.sqrt(shape[0]))

    def add(self, op_type: str, *inputs: ir.Value, **attributes: int | float | str | list[int]) -> ir.Value:
        node = ir.node(op_type, inputs, attributes, name=f"{op_type}_{self._count}")
        node.outputs[0].name = f"v{self._count}"
        self._count += 1
        self.graph.append(node)
        return node.outputs[0]

    def linear(self, x: ir.Value, into: int, out: int) -> ir.Value:
        return self.add("MatMul", x, self.weight(into, out))

    def model(self) -> ir.Model:
        model = ir.Model(self.graph, ir_version=8)
        infer_shapes(model)
        return model


def rms_norm(b: Builder, x: ir.Value) -> ir.Value:
    mean = b.add("ReduceMean", b.add("Pow", x, b.constant(2.0)), axes=[-1])
    inverse = b.add("Reciprocal", b.add("Sqrt", b.add("Add", mean, b.constant(1e-5))))
    return b.add("Mul", b.weight(WIDTH), b.add("Mul", x, inverse))


def layer_norm(b: Builder, x: ir.Value) -> ir.Value:
    centered = b.add("Sub", x, b.add("ReduceMean", x, axes=[-1]))
    variance = b.add("ReduceMean", b.add("Pow", centered, b.constant(2.0)), axes=[-1])
    deviation = b.add("Sqrt", b.add("Add", variance, b.constant(1e-12)))
    return b.add("Add", b.add("Mul", b.add("Div", centered, deviation), b.weight(WIDTH)), b.weight(WIDTH))


def heads(b: Builder, x: ir.Value, tokens: int, count: int) -> ir.Value:
    """``[1, tokens, count * depth]`` to ``[1, count, tokens, depth]``."""
    return b.add("Transpose", b.add("Reshape", x, b.constant([1, tokens, count, DEPTH])), perm=[0, 2, 1, 3])


def slice_last(b: Builder, x: ir.Value, start: int, end: int) -> ir.Value:
    return b.add("Slice", x, b.constant([start]), b.constant([end]), b.constant([-1]))


def rotate(b: Builder, x: ir.Value, cosine: ir.Value, sine: ir.Value) -> ir.Value:
    half = b.add("Neg", slice_last(b, x, DEPTH // 2, DEPTH))
    turned = b.add("Concat", half, slice_last(b, x, 0, DEPTH // 2), axis=-1)
    return b.add("Add", b.add("Mul", x, cosine), b.add("Mul", turned, sine))


def repeat(b: Builder, x: ir.Value, tokens: int) -> ir.Value:
    """``[1, kv_heads, tokens, depth]`` to ``[1, heads, tokens, depth]``: each key serves several queries."""
    group = HEADS // KV_HEADS
    wide = b.add("Expand", b.add("Unsqueeze", x, b.constant([2])), b.constant([1, KV_HEADS, group, tokens, DEPTH]))
    return b.add("Reshape", wide, b.constant([1, HEADS, tokens, DEPTH]))


def attend(b: Builder, q: ir.Value, k: ir.Value, v: ir.Value, bias: ir.Value, tokens: int) -> ir.Value:
    scores = b.add("MatMul", q, b.add("Transpose", k, perm=[0, 1, 3, 2]))
    scores = b.add("Add", b.add("Div", scores, b.constant(float(np.sqrt(DEPTH)))), bias)
    mixed = b.add("Transpose", b.add("MatMul", b.add("Softmax", scores, axis=-1), v), perm=[0, 2, 1, 3])
    return b.linear(b.add("Reshape", mixed, b.constant([1, tokens, WIDTH])), WIDTH, WIDTH)


def decoder_step(layers: int = 2, past: int = 7, opset: int = 17) -> ir.Model:
    """One token of a Llama-like decoder: RMS norm, rotary positions, shared keys, SiLU, a cache in and out."""
    b, total = Builder(opset), past + 1
    tokens = b.input("input_ids", INT64, (1, 1))
    mask = b.input("attention_mask", INT64, (1, total))
    position = b.input("position_ids", INT64, (1, 1))
    x = b.add("Gather", b.weight(VOCABULARY, WIDTH), tokens)
    frequencies = b.constant((10000.0 ** -(np.arange(0, DEPTH, 2) / DEPTH))[None, None].astype(np.float32))
    angle = b.add("Mul", b.add("Unsqueeze", b.add("Cast", position, to=1), b.constant([-1])), frequencies)
    angle = b.add("Unsqueeze", b.add("Concat", angle, angle, axis=-1), b.constant([1]))
    cosine, sine = b.add("Cos", angle), b.add("Sin", angle)
    wide = b.add("Unsqueeze", b.add("Unsqueeze", b.add("Cast", mask, to=1), b.constant([1])), b.constant([2]))
    lowest = b.constant(float(np.finfo(np.float32).min))
    bias = b.add("Mul", b.add("Sub", b.constant(1.0), wide), lowest)
    present = []
    for layer in range(layers):
        normal = rms_norm(b, x)
        q = rotate(b, heads(b, b.linear(normal, WIDTH, WIDTH), 1, HEADS), cosine, sine)
        k = rotate(b, heads(b, b.linear(normal, WIDTH, KV_HEADS * DEPTH), 1, KV_HEADS), cosine, sine)
        v = heads(b, b.linear(normal, WIDTH, KV_HEADS * DEPTH), 1, KV_HEADS)
        cache = [b.input(f"past_{kind}_{layer}", FLOAT, (1, KV_HEADS, past, DEPTH)) for kind in ("key", "value")]
        k, v = (b.add("Concat", old, new, axis=2) for old, new in zip(cache, (k, v), strict=True))
        present += [(k, f"present_key_{layer}"), (v, f"present_value_{layer}")]
        x = b.add("Add", x, attend(b, q, repeat(b, k, total), repeat(b, v, total), bias, 1))
        normal = rms_norm(b, x)
        gate = b.linear(normal, WIDTH, HIDDEN)
        gated = b.add("Mul", b.add("Mul", gate, b.add("Sigmoid", gate)), b.linear(normal, WIDTH, HIDDEN))
        x = b.add("Add", x, b.linear(gated, HIDDEN, WIDTH))
    b.output(b.linear(rms_norm(b, x), WIDTH, VOCABULARY), "logits")
    for value, name in present:
        b.output(value, name)
    return b.model()


def encoder(layers: int = 2, length: int = 12, opset: int = 17) -> ir.Model:
    """A BERT-like encoder: learned positions, layer norm, GELU by erf, a mask of int64, a class of the whole."""
    b = Builder(opset)
    tokens, mask = b.input("input_ids", INT64, (1, length)), b.input("attention_mask", INT64, (1, length))
    x = layer_norm(b, b.add("Add", b.add("Gather", b.weight(VOCABULARY, WIDTH), tokens), b.weight(length, WIDTH)))
    wide = b.add("Unsqueeze", b.add("Unsqueeze", mask, b.constant([1])), b.constant([2]))
    absent = b.add("Equal", wide, b.constant([0]))
    bias = b.add("Where", absent, b.constant(float(np.finfo(np.float32).min)), b.constant(0.0))
    for _ in range(layers):
        q, k, v = (heads(b, b.linear(x, WIDTH, WIDTH), length, HEADS) for _ in range(3))
        x = layer_norm(b, b.add("Add", x, attend(b, q, k, v, bias, length)))
        hidden = b.add("Add", b.linear(x, WIDTH, HIDDEN), b.weight(HIDDEN))
        bell = b.add("Add", b.add("Erf", b.add("Div", hidden, b.constant(float(np.sqrt(2))))), b.constant(1.0))
        gelu = b.add("Mul", b.add("Mul", hidden, bell), b.constant(0.5))
        x = layer_norm(b, b.add("Add", x, b.linear(gelu, HIDDEN, WIDTH)))
    first = b.add("Gather", x, b.constant([0]), axis=1)
    logits = b.linear(b.add("Tanh", b.linear(b.add("Squeeze", first, b.constant([1])), WIDTH, WIDTH)), WIDTH, 3)
    b.output(logits, "logits")
    b.output(b.add("ArgMax", logits, axis=-1, keepdims=0), "label")
    return b.model()
