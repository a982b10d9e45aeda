"""Models for the constraints of Apple's Neural Engine: one that violates each, and its neighbour that does not."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from optkit.model.loading import load_text

H13, H14, H15, H16 = "apple-m1-ane", "apple-m2-ane", "apple-m3-ane", "apple-m4-ane"
IMAGE = "float[1,4,8,8]"


def model(inputs: str, outputs: str, nodes: str, opset: int = 21, constants: str = "") -> ir.Model:
    given = f"<{constants}>" if constants else ""
    return load_text(
        f'<ir_version: 10, opset_import: ["" : {opset}]> net ({inputs}) => ({outputs}) {given} {{ {nodes} }}'
    )


def one(nodes: str, x: str = IMAGE, y: str = IMAGE, constants: str = "") -> ir.Model:
    return model(f"{x} x", f"{y} y", nodes, constants=constants)


def shaped(nodes: str, x: Sequence[int], y: Sequence[int], **constants: np.ndarray) -> ir.Model:
    """A model of given shapes; constants are added after it was read, so that they may be large."""
    dims = [",".join(map(str, shape)) for shape in (x, y)]
    inputs = "".join(f", float[{','.join(map(str, array.shape))}] {name}" for name, array in constants.items())
    result = model(f"float[{dims[0]}] x{inputs}", f"float[{dims[1]}] y", nodes)
    for name, array in constants.items():
        value = next(value for value in result.graph.inputs if value.name == name)
        result.graph.inputs.remove(value)
        value.const_value = ir.tensor(array.astype(np.float32), name=name)
        result.graph.register_initializer(value)
    return result


def weights(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


SMALL, LONG = 16384, 16385
# The constraint; a model that violates it and one that does not, each with its device.
CASES: dict[str, list[tuple[ir.Model, str, ir.Model, str]]] = {
    "body": [
        (
            model(
                f"bool c, {IMAGE} x",
                f"{IMAGE} y",
                f"y = If (c) <then_branch = a () => ({IMAGE} p) {{ p = Relu (x) }}, "
                f"else_branch = b () => ({IMAGE} q) {{ q = Abs (x) }}>",
            ),
            H16,
            one("y = Relu (x)"),
            H16,
        )
    ],
    "domain": [
        (
            load_text(
                '<ir_version: 10, opset_import: ["" : 21, "mine" : 1]> net (float[2] x) => (float[2] y) '
                "{ y = mine.Relu (x) }"
            ),
            H16,
            one("y = Relu (x)"),
            H16,
        )
    ],
    "recurrent": [
        (
            model(
                "float[4,1,3] x, float[1,8,3] w, float[1,8,2] r",
                "float[4,1,1,2] y",
                "y = LSTM <hidden_size = 2> (x, w, r)",
            ),
            H16,
            one("y = Tanh (x)"),
            H16,
        )
    ],
    "scatter": [
        (
            one("y = ScatterND (x, i, u)", "float[4]", "float[4]", "int64[1,1] i = {0}, float[1] u = {1}"),
            H16,
            one("y = Concat <axis = 0> (x, u)", "float[3]", "float[4]", "float[1] u = {1}"),
            H16,
        )
    ],
    "counting": [
        (one("y = NonZero (x)", "float[4]", "int64[1,n]"), H16, one("y = Abs (x)", "float[4]", "float[4]"), H16)
    ],
    "logic": [
        (
            model("bool[4] a, bool[4] b", "bool[4] y", "y = And (a, b)"),
            H16,
            model("bool[4] a", "bool[4] y", "y = Not (a)"),
            H16,
        )
    ],
    "product": [
        (
            one("y = ReduceProd (x)", "float[4]", "float[1]"),
            H16,
            one("y = ReduceSum (x)", "float[4]", "float[1]"),
            H16,
        ),
        (
            one("y = Mod <fmod = 1> (x, m)", "float[4]", "float[4]", "float m = {2}"),
            H16,
            one("y = Div (x, m)", "float[4]", "float[4]", "float m = {2}"),
            H16,
        ),
    ],
    "table": [(one("y = Trilu (x)"), H16, one("y = Relu (x)"), H16)],
    "trigonometry": [(one("y = Tan (x)"), H16, one("y = Atan (x)"), H16)],
    "random": [
        (one("y = RandomNormalLike (x)"), H16, one("y = RandomUniformLike (x)"), H15),
        (one("y = RandomUniformLike (x)"), H14, one("y = RandomUniformLike (x)"), H15),
    ],
    "running_sum": [(one("y = CumSum (x, a)", constants="int64 a = {1}"), H16, one("y = Softmax <axis = 1> (x)"), H16)],
    "sine": [(one("y = Sin (x)"), H14, one("y = Sin (x)"), H15), (one("y = Cos (x)"), H13, one("y = Cos (x)"), H16)],
    "smallest": [
        (
            one("y = ArgMin <axis = 1> (x)", y="int64[1,1,8,8]"),
            H14,
            one("y = ArgMin <axis = 1> (x)", y="int64[1,1,8,8]"),
            H15,
        ),
        (
            one("y = ArgMin <axis = 1> (x)", y="int64[1,1,8,8]"),
            H13,
            one("y = ArgMax <axis = 1> (x)", y="int64[1,1,8,8]"),
            H13,
        ),
    ],
    "sort": [
        (
            one("y, i = TopK (x, k)", "float[1,8]", "float[1,2]", "int64[1] k = {2}"),
            H13,
            one("y, i = TopK (x, k)", "float[1,8]", "float[1,2]", "int64[1] k = {2}"),
            H14,
        )
    ],
    "sampling": [
        (
            model(f"{IMAGE} x, float[1,8,8,2] g", f"{IMAGE} y", "y = GridSample (x, g)"),
            H13,
            model(f"{IMAGE} x, float[1,8,8,2] g", f"{IMAGE} y", "y = GridSample (x, g)"),
            H14,
        )
    ],
    "padding": [
        (
            one('y = Pad <mode = "reflect"> (x, p)', y="float[1,4,8,9]", constants="int64[8] p = {0,0,0,0,0,0,0,1}"),
            H13,
            one('y = Pad <mode = "reflect"> (x, p)', y="float[1,4,8,9]", constants="int64[8] p = {0,0,0,0,0,0,0,1}"),
            H14,
        ),
        (
            one('y = Pad <mode = "edge"> (x, p)', y="float[1,4,8,9]", constants="int64[8] p = {0,0,0,0,0,0,0,1}"),
            H13,
            one("y = Pad (x, p)", y="float[1,4,8,9]", constants="int64[8] p = {0,0,0,0,0,0,0,1}"),
            H13,
        ),
    ],
    "lookup": [
        (
            model("float[9,4] x, int64[2] i", "float[2,4] y", "y = Gather (x, i)"),
            H16,
            one("y = Gather (x, i)", "float[9,4]", "float[2,4]", "int64[2] i = {1, 2}"),
            H16,
        )
    ],
    "gather": [
        (
            one("y = Gather (x, i)", "float[9,4]", "float[2,4]", "int64[2] i = {1, 2}"),
            H13,
            one("y = Gather (x, i)", "float[9,4]", "float[2,4]", "int64[2] i = {1, 2}"),
            H14,
        )
    ],
    "volume": [
        (
            shaped("y = Conv (x, w)", (1, 1, 4, 4, 4), (1, 1, 2, 2, 2), w=weights(1, 1, 3, 3, 3)),
            H16,
            shaped("y = Conv (x, w)", (1, 1, 4, 4), (1, 1, 2, 2), w=weights(1, 1, 3, 3)),
            H16,
        ),
        (
            one("y = MaxPool <kernel_shape = [2,2,2]> (x)", "float[1,1,4,4,4]", "float[1,1,3,3,3]"),
            H16,
            one("y = MaxPool <kernel_shape = [2,2]> (x)", "float[1,1,4,4]", "float[1,1,3,3]"),
            H16,
        ),
    ],
    "kernel": [
        (
            shaped("y = Conv (x, w)", (1, 1, 40, 40), (1, 1, 40, 27), w=weights(1, 1, 1, 14)),
            H13,
            shaped("y = Conv (x, w)", (1, 1, 40, 40), (1, 1, 40, 28), w=weights(1, 1, 1, 13)),
            H13,
        ),
        (
            shaped("y = Conv (x, w)", (1, 1, 40, 40), (1, 1, 11, 40), w=weights(1, 1, 30, 1)),
            H13,
            shaped("y = Conv (x, w)", (1, 1, 40, 40), (1, 1, 11, 40), w=weights(1, 1, 30, 1)),
            H16,
        ),
        (
            shaped("y = Conv (x, w)", (1, 1, 40, 40), (1, 1, 40, 25), w=weights(1, 1, 1, 16)),
            H16,
            shaped("y = Conv (x, w)", (1, 1, 40, 40), (1, 1, 40, 26), w=weights(1, 1, 1, 15)),
            H16,
        ),
    ],
    "computed_kernel": [
        (
            model("float[2,1,4,4] x, float[1,1,3,3] w", "float[2,1,2,2] y", "y = Conv (x, w)"),
            H16,
            model("float[1,1,4,4] x, float[1,1,3,3] w", "float[1,1,2,2] y", "y = Conv (x, w)"),
            H16,
        ),
        (
            model("float[2,1,4,4] x, float[1,1,3,3] w", "float[2,1,2,2] y", "y = Conv (x, w)"),
            H16,
            shaped("y = Conv (x, w)", (2, 1, 4, 4), (2, 1, 2, 2), w=weights(1, 1, 3, 3)),
            H16,
        ),
    ],
    "window": [
        (
            one("y = AveragePool <kernel_shape = [30,1]> (x)", "float[1,1,40,4]", "float[1,1,11,4]"),
            H13,
            one("y = AveragePool <kernel_shape = [30,1]> (x)", "float[1,1,40,4]", "float[1,1,11,4]"),
            H14,
        ),
        (
            one("y = AveragePool <kernel_shape = [32,1]> (x)", "float[1,1,40,4]", "float[1,1,9,4]"),
            H16,
            one("y = GlobalAveragePool (x)", "float[1,1,40,4]", "float[1,1,1,1]"),
            H16,
        ),
    ],
    "matmul": [
        (
            model("float[1,1,2,3,4] a, float[1,1,2,4,3] b", "float[1,1,2,3,3] y", "y = MatMul (a, b)"),
            H16,
            model("float[1,2,3,4] a, float[1,2,4,3] b", "float[1,2,3,3] y", "y = MatMul (a, b)"),
            H16,
        )
    ],
    "slopes": [
        (
            one("y = PRelu (x, s)", "float[1,4]", "float[1,4]", "float[1] s = {0.1}"),
            H16,
            one("y = PRelu (x, s)", "float[1,4,1]", "float[1,4,1]", "float[1] s = {0.1}"),
            H16,
        )
    ],
    "factors": [
        (
            one("y = Tile (x, r)", "float[1,4]", "float[5,4]", "int64[2] r = {5, 1}"),
            H16,
            one("y = Tile (x, r)", "float[1,4]", "float[6,4]", "int64[2] r = {6, 1}"),
            H16,
        ),
        (
            one("y = DepthToSpace <blocksize = 6> (x)", "float[1,36,1,1]", "float[1,1,6,6]"),
            H16,
            one("y = DepthToSpace <blocksize = 4> (x)", "float[1,16,1,1]", "float[1,1,4,4]"),
            H16,
        ),
    ],
    "documented": [(one("y = IsNaN (x)", y="bool[1,4,8,8]"), H16, one("y = Abs (x)"), H16)],
    "shapes": [
        (one("y = Relu (x)", "float[n,4]", "float[n,4]"), H16, one("y = Relu (x)", "float[1,4]", "float[1,4]"), H16),
        (one("y = Relu (x)", "float[0,4]", "float[0,4]"), H16, one("y = Relu (x)", "float[1,4]", "float[1,4]"), H16),
    ],
    "types": [
        (
            model("int64[4] a, int64[4] b", "int64[4] y", "y = Add (a, b)"),
            H16,
            model("float[4] a, float[4] b", "float[4] y", "y = Add (a, b)"),
            H16,
        ),
        (
            one("y = Cast <to = 6> (x)", "float[4]", "int32[4]"),
            H16,
            one("y = Cast <to = 9> (x)", "float[4]", "bool[4]"),
            H16,
        ),
    ],
    "rank": [
        (
            one("y = Relu (x)", "float[1,1,1,1,1,2]", "float[1,1,1,1,1,2]"),
            H16,
            one("y = Relu (x)", "float[1,1,1,1,2]", "float[1,1,1,1,2]"),
            H16,
        )
    ],
    "dimensions": [
        (
            shaped("y = MatMul (x, w)", (1, 2), (1, LONG), w=weights(2, LONG)),
            H15,
            shaped("y = MatMul (x, w)", (1, 2), (1, LONG), w=weights(2, LONG)),
            H16,
        ),
        (
            shaped("y = Relu (x)", (1, 2, LONG, 1), (1, 2, LONG, 1)),
            H13,
            shaped("y = Relu (x)", (1, LONG, SMALL, 1), (1, LONG, SMALL, 1)),
            H13,
        ),
        (
            shaped("y = Relu (x)", (LONG, 2), (LONG, 2)),
            H13,
            shaped("y = Relu (x)", (LONG, 2, 1, 1), (LONG, 2, 1, 1)),
            H13,
        ),
    ],
}
