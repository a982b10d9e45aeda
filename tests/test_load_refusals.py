"""Inputs that cannot be loaded: each is refused in one exact sentence, with nothing on stdout or stderr."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
import pytest

from optkit.errors import InputError
from optkit.model.loading import load
from refusal_cases import NEWEST, RELU, Case, registrars

CASES: dict[str, Case] = {}


refuses, text_case = registrars(CASES)


# Versions

text_case(
    "opset_6",
    "{file}: opset 6 is older than 7, the oldest that is read; convert it with onnx.version_converter",
    RELU.replace("17", "6"),
)
text_case(
    "opset_99",
    f"{{file}}: opset 99 is newer than onnx {onnx.__version__} knows ({NEWEST}); upgrade the onnx package",
    RELU.replace("17", "99"),
)
text_case(
    "ir_version_99",
    f"{{file}}: IR version 99 is newer than onnx {onnx.__version__} knows ({onnx.IR_VERSION}); "
    "upgrade the onnx package",
    RELU.replace("ir_version: 8", "ir_version: 99"),
)
text_case(
    "no_opset_for_a_domain",
    "{file}: node 'r' (Spline): it is of the domain 'com.acme', for which the model declares no opset",
    "main (float[4] x) => (float[4] y) { [r] y = com.acme.Spline (x) }",
)
text_case(
    "no_opset_for_onnx",
    "{file}: node 'r' (Relu): it is of the domain 'ai.onnx', for which the model declares no opset",
    '<ir_version: 8, opset_import: ["com.acme" : 1]> main (float[4] x) => (float[4] y) { [r] y = Relu (x) }',
)

# Names

text_case(
    "undefined_input",
    "{file}: node 'r' (Relu): it reads 'q', which nothing produces",
    "main (float[4] x) => (float[4] y) { [r] y = Relu (q) }",
)
text_case(
    "undefined_input_of_an_unnamed_node",
    "{file}: Relu that produces 'y': it reads 'q', which nothing produces",
    "main (float[4] x) => (float[4] y) { y = Relu (q) }",
)
text_case(
    "produced_twice",
    "{file}: 'a' is produced twice: by node 'one' (Relu) and by node 'two' (Abs)",
    "main (float[4] x) => (float[4] y) { [one] a = Relu (x) [two] a = Abs (x) y = Neg (a) }",
)
text_case(
    "produces_an_input",
    "{file}: node 'r' (Relu): it produces 'x', which is already an input or initializer",
    "main (float[4] x) => (float[4] x) { [r] x = Relu (x) }",
)
text_case(
    "two_inputs_of_one_name",
    "{file}: the graph has two inputs named 'x'",
    "main (float[4] x, float[4] x) => (float[4] y) { y = Relu (x) }",
)
text_case(
    "two_initializers_of_one_name",
    "{file}: the graph has two initializers named 'w'",
    "main (float[1] x) => (float[1] y) <float[1] w = {1}> { y = Add (x, w) }",
    lambda model: model.graph.initializer.append(model.graph.initializer[0]),
)
text_case(
    "initializer_without_a_name",
    "{file}: the graph has an input or initializer without a name",
    RELU,
    lambda model: model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(3))),
)
text_case(
    "output_without_producer",
    "{file}: the graph has an output 'z', which nothing in it produces",
    "main (float[4] x) => (float[4] y, float[4] z) { y = Relu (x) }",
)
text_case(
    "input_without_a_type",
    "{file}: the graph has an input 'x' without an element type",
    RELU,
    lambda model: model.graph.input[0].ClearField("type"),
)
text_case(
    "cycle",
    "{file}: the nodes feed each other in a circle: node 'one' (Add) -> node 'two' (Relu) -> node 'one' (Add)",
    "main (float[4] x) => (float[4] y) { [one] a = Add (x, b) [two] b = Relu (a) y = Neg (b) }",
)
text_case(
    "cycle_through_a_body",
    "{file}: the nodes feed each other in a circle: node 'if' (If) -> node 'if' (If)",
    """main (float[4] x, bool c) => (float[4] y) {
         [if] a = If (c) <then_branch = t () => (float[4] p) { p = Relu (a) },
                          else_branch = e () => (float[4] q) { q = Identity (x) }>
         y = Neg (a)
       }""",
)
text_case(
    "body_reads_an_unknown_tensor",
    "{file}: node 'inner' (Relu): it reads 'nowhere', which nothing produces",
    """main (float[4] x, bool c) => (float[4] y) {
         y = If (c) <then_branch = t () => (float[4] p) { [inner] p = Relu (nowhere) },
                     else_branch = e () => (float[4] q) { q = Identity (x) }>
       }""",
)
text_case(
    "body_reads_the_other_branch",
    "{file}: node 'inner' (Relu): it reads 'p', which nothing produces",
    """main (float[4] x, bool c) => (float[4] y) {
         y = If (c) <then_branch = t () => (float[4] p) { p = Relu (x) },
                     else_branch = e () => (float[4] q) { [inner] q = Relu (p) }>
       }""",
)
text_case(
    "body_returns_an_outer_tensor",
    "{file}: the body 'then_branch' of node 'if' (If) has an output 'x', which nothing in it produces",
    """main (float[4] x, bool c) => (float[4] y) {
         [if] y = If (c) <then_branch = t () => (float[4] x) { },
                          else_branch = e () => (float[4] q) { q = Identity (x) }>
       }""",
)

# Operators

text_case(
    "unknown_operator",
    "{file}: node 'r' (Reluu): ai.onnx has no operator 'Reluu'; did you mean 'Relu' or 'PRelu' or 'Selu'?",
    RELU.replace("Relu", "Reluu"),
)
text_case(
    "unknown_operator_like_no_other",
    "{file}: node 'r' (Xyzzyqqqqq): ai.onnx has no operator 'Xyzzyqqqqq'; "
    "an operator of your own needs a domain of its own",
    RELU.replace("Relu", "Xyzzyqqqqq"),
)
text_case(
    "operator_of_a_later_opset",
    "{file}: node 'r' (Gelu): Gelu exists since opset 20, and the model declares opset 17; export it with that opset",
    RELU.replace("Relu", "Gelu"),
)
text_case(
    "operator_of_an_earlier_opset",
    "{file}: node 'r' (Upsample): Upsample was removed from ONNX in opset 10, and the model declares opset 17; "
    "export it with an older opset, or with the operator's successor",
    RELU.replace("Relu", "Upsample"),
)
text_case(
    "unknown_attribute",
    "{file}: node 'r' (LeakyRelu): LeakyRelu has no attribute 'alpa' in this opset; did you mean 'alpha'?",
    RELU.replace("Relu (x)", "LeakyRelu <alpa = 0.1> (x)"),
)
text_case(
    "attribute_of_the_wrong_type",
    "{file}: node 'r' (LeakyRelu): its attribute 'alpha' is int, but must be float",
    RELU.replace("Relu (x)", "LeakyRelu <alpha = 1> (x)"),
)
text_case(
    "missing_attribute",
    "{file}: node 'r' (Cast): it lacks the attribute 'to', which Cast requires",
    RELU.replace("Relu", "Cast"),
)
text_case("too_few_inputs", "{file}: node 'r' (Add): it has 1 input, but takes 2 inputs", RELU.replace("Relu", "Add"))
text_case(
    "too_many_inputs",
    "{file}: node 'r' (Clip): it has 4 inputs, but takes at most 3 inputs",
    RELU.replace("Relu (x)", "Clip (x, x, x, x)"),
)
text_case(
    "no_inputs_at_all",
    "{file}: node 'r' (Concat): it has 0 inputs, but takes at least 1 input",
    RELU.replace("Relu (x)", "Concat <axis = 0> ()"),
)
text_case(
    "too_many_outputs",
    "{file}: node 'r' (Relu): it has 2 outputs, but produces 1 output",
    RELU.replace("y = Relu", "y, z = Relu"),
)

# Functions

FUNCTION = """<ir_version: 8, opset_import: ["" : 17, "pkg" : 1]>
main (float[4] x) => (float[4] y) { [call] y = pkg.f (x) }
<domain: "pkg", opset_import: ["" : 17, "pkg" : 1]> f (a) => (b) { [inner] b = BODY }
"""
text_case("recursive_function", "{file}: function 'pkg::f' calls itself", FUNCTION.replace("BODY", "pkg.f (a)"))
text_case(
    "mutually_recursive_functions",
    "{file}: functions 'pkg::f' and 'pkg::g' call each other in a circle",
    FUNCTION.replace("BODY", "pkg.g (a)")
    + '<domain: "pkg", opset_import: ["" : 17, "pkg" : 1]> g (a) => (b) { b = pkg.f (a) }',
)
text_case(
    "function_reads_an_unknown_tensor",
    "{file}: node 'inner' (Relu): it reads 'x', which nothing produces",
    FUNCTION.replace("BODY", "Relu (x)"),
)
text_case(
    "function_called_with_too_many_inputs",
    "{file}: node 'call' (f): it has 2 inputs, but takes at most 1 input",
    FUNCTION.replace("BODY", "Relu (a)").replace("pkg.f (x)", "pkg.f (x, x)"),
)
text_case(
    "function_of_another_opset",
    "{file}: function 'pkg::f': ReduceMax of opset 18 differs from the model's, opset 17; "
    "export the model with one opset",
    FUNCTION.replace("BODY", "ReduceMax (a)").replace('"pkg", opset_import: ["" : 17', '"pkg", opset_import: ["" : 18'),
)


text_case(
    "function_that_takes_a_body",
    "{file}: a function cannot be inlined: Inliner does not support graph attribute parameters to functions. "
    "Function 'pkg::f' has graph attributes",
    FUNCTION.replace("BODY", "Relu (a)")
    .replace("f (a) => (b)", "f <body> (a) => (b)")
    .replace("pkg.f (x)", "pkg.f <body = g () => (float[4] c) { c = Relu (x) }> (x)"),
)


@pytest.mark.parametrize("name", CASES)
def test_refused(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    build, sentence = CASES[name]
    folder = tmp_path / "model"
    folder.mkdir()
    path = build(folder)
    with pytest.raises(InputError) as caught:
        load(path)
    expected = sentence.format(file=path, folder=folder.resolve(), outside=folder.parent / "w.bin")
    assert str(caught.value) == expected
    assert caught.value.exit_code == 2
    assert capfd.readouterr() == ("", "")
