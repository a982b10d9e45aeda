from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from optkit.dataset.samples import random_samples
from optkit.model.loading import load_text
from optkit.pipeline import Context, Pipeline
from optkit_passes.cleanup.prune_metadata import PruneMetadata

BODIES = """
<ir_version: 8, opset_import: ["" : 13]>
main (float[4] some_input, bool condition) => (float[4] result)
<float[4] shared_weight = {1, 2, 3, 4}>
{
  before_the_branch = Relu (some_input)
  result = If (condition) <
    then_branch = then_graph () => (float[4] then_output) {
      inner_value = Add (before_the_branch, shared_weight)
      then_output = Relu (inner_value)
    },
    else_branch = else_graph () => (float[4] else_output) { else_output = Neg (before_the_branch) }
  >
}
"""


def test_bodies_are_renamed_with_what_they_capture() -> None:
    model, context = load_text(BODIES), Context()
    Pipeline([PruneMetadata()], strict=True).run(model, context, list(random_samples(model, 3)))
    assert [remark.message for remark in context.remarks] == ["shortened the names of 5 values"]
    names = [v.name for graph in model.graphs() for node in graph for v in node.outputs]
    assert all(len(name or "") == 1 for name in names if name != "result")
    assert [value.name for value in [*model.graph.inputs, *model.graph.outputs]] == [
        "some_input",
        "condition",
        "result",
    ]
    onnx.checker.check_model(ir.to_proto(model))


def test_taken_names_are_left_out() -> None:
    header = '<ir_version: 8, opset_import: ["" : 13]>'
    model = load_text(f"{header} main (float[4] a) => (float[4] b) {{ long_name = Relu (a)  b = Relu (long_name) }}")
    Pipeline([PruneMetadata()], strict=True).run(model, Context(), list(random_samples(model, 1)))
    assert [value.name for node in model.graph for value in node.outputs] == ["c", "b"]


def test_file_shrinks_and_runs_the_same() -> None:
    values = " ".join(f"a_rather_long_name_{i} = Relu (a_rather_long_name_{i - 1})" for i in range(1, 60))
    text = (
        '<ir_version: 8, opset_import: ["" : 13]> main (float[4] a_rather_long_name_0) => (float[4] y) '
        f"{{ {values} y = Relu (a_rather_long_name_59) }}"
    )
    model = load_text(text)
    before = len(ir.to_proto(model).SerializeToString())
    Pipeline([PruneMetadata()], strict=True).run(model, Context(), [{"a_rather_long_name_0": np.ones(4, np.float32)}])
    assert len(ir.to_proto(model).SerializeToString()) < before / 2
