"""Models in newer opsets: real ones, against the converter of onnx, and what must not change."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.version_converter
import onnx_ir as ir
import pytest

from optkit.dataset.samples import random_samples
from optkit.model.loading import load, load_text, save
from optkit.pass_check import fingerprint
from optkit.pipeline import Context, Pipeline
from optkit.session import Session
from pass_runs import create, messages, run, silero_sample


def constants(model: ir.Model, arrays: dict[str, np.ndarray]) -> ir.Model:
    """Turn the named inputs of a model into initializers."""
    for value in [value for value in model.graph.inputs if value.name in arrays]:
        assert value.name is not None
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(arrays[value.name], name=value.name)
        model.graph.register_initializer(value)
    return model


@pytest.mark.parametrize("opset", [13, 18, 21, 23])
@pytest.mark.parametrize(
    "path",
    [
        "squeezenet1_1/squeezenet1_1.onnx",
        "mnist/mnist_cntk8.onnx",
        "ultraface_rfb320/ultraface_rfb320.onnx",
        "magika_v3_3/magika_v3_3.onnx",
        "relu_lm/relu_lm.onnx",
        "stories260k/stories260k.onnx",
        "silero_vad/silero_vad.onnx",
        "silero_vad/silero_vad_op18_ifless.onnx",
    ],
)
def test_real_models_in_newer_opsets(shared: Path, path: str, opset: int) -> None:
    model = load(shared / "data" / path)
    old, others = model.opset_imports[""], {k: v for k, v in model.opset_imports.items() if k}
    names, values = [n.name for n in model.graph.all_nodes()], {v.name for n in model.graph for v in n.outputs}
    tensors = {id(v.const_value) for g in model.graphs() for v in g.initializers.values()}
    samples = [silero_sample()] if "silero" in path else list(random_samples(model, 1))
    context = Context()
    result = Pipeline([create("raise-opset", opset=opset)], strict=True).run(model, context, samples)
    assert result.steps[0].change == 0
    assert model.opset_imports == {"": max(old, opset), **others}
    assert bool(context.remarks) == (old < opset)
    assert set(names) <= {n.name for n in model.graph.all_nodes()}
    assert values <= {v.name for n in model.graph for v in n.outputs}
    assert tensors <= {id(v.const_value) for g in model.graphs() for v in g.initializers.values()}


@pytest.mark.slow
def test_candy_is_lowered_before_it_is_raised(shared: Path) -> None:
    model = load(shared / "data" / "fns_candy" / "fns_candy.onnx")
    refused = messages(model, create("raise-opset", opset=13))
    assert refused == ["opset 7 cannot become 13: ImageScaler is no standard operator of opset 7"]
    context = run(model, create("lower-experimental-ops"), create("raise-opset", opset=13), samples=1)
    assert not [remark for remark in context.remarks if remark.kind == "missed"]
    assert model.opset_imports[""] == 13


CONVERTED = {
    "clip": (7, 13, "float[2,3] x", "float[2,3] y", "y = Clip <min: float = -0.5, max: float = 0.5> (x)"),
    "pad": (9, 18, "float[2,3] x", "float[3,5] y", "y = Pad <pads: ints = [0, 1, 1, 1], value: float = 2.0> (x)"),
    "slice": (
        9,
        13,
        "float[2,3] x",
        "float[1,3] y",
        "y = Slice <axes: ints = [0], starts: ints = [1], ends: ints = [9]> (x)",
    ),
    "softmax": (9, 13, "float[2,3,4] x", "float[2,3,4] y", "y = Softmax <axis: int = 1> (x)"),
    "log-softmax": (9, 13, "float[2,3,4] x", "float[2,3,4] y", "y = LogSoftmax <axis: int = 1> (x)"),
    "squeeze": (11, 13, "float[1,3] x", "float[3] y", "y = Squeeze <axes: ints = [0]> (x)"),
    "reduce": (
        11,
        18,
        "float[2,3] x",
        "float[2,1] y",
        "a = ReduceMax <axes: ints = [1]> (x) y = ReduceSum <axes: ints = [1]> (a)",
    ),
    "split": (11, 18, "float[4] x", "float[2] y, float[2] z", "y, z = Split (x)"),
    "top-k": (9, 13, "float[4] x", "float[2] y, int64[2] i", "y, i = TopK <k: int = 2> (x)"),
}


@pytest.mark.parametrize("name", CONVERTED)
def test_conversion_agrees_with_onnx(name: str) -> None:
    old, new, inputs, outputs, body = CONVERTED[name]
    text = f'<ir_version: 4, opset_import: ["" : {old}]> main ({inputs}) => ({outputs}) {{ {body} }}'
    model = load_text(text)
    theirs = onnx.version_converter.convert_version(onnx.parser.parse_model(text), new)
    run(model, create("raise-opset", opset=new))
    for sample in random_samples(model, 2):
        mine, reference = Session(model).run(sample), Session(ir.from_proto(theirs)).run(sample)
        for key, value in reference.items():
            np.testing.assert_array_equal(mine[key], value)


def test_group_normalization_gets_one_scale_per_channel() -> None:
    text = '<ir_version: 8, opset_import: ["" : 18]> main (float[1,4,2] x) => (float[1,4,2] y)'
    weights = "<float[2] s = {1.0, 2.0}, float[2] b = {3.0, 4.0}>"
    model = ir.from_onnx_text(f"{text} {weights} {{ [norm] y = GroupNormalization <num_groups: int = 2> (x, s, b) }}")
    run(model, create("raise-opset", opset=21))
    scale = model.graph[0].inputs[1]
    assert scale is not None
    assert scale.const_value is not None
    assert scale.const_value.numpy().tolist() == [1, 1, 2, 2]


@pytest.mark.parametrize(
    ("old", "inputs", "outputs", "body", "reason"),
    [
        (
            9,
            "float[4] x",
            "float[4] y, float[4] z",
            "y, m = Dropout (x) z = Neg (m)",
            "its mask is used, which became boolean",
        ),
        (
            10,
            "float[1,1,4,4] x, float[4] s",
            "float[1,1,h,w] y",
            "y = Resize (x, s)",
            "its scales are computed at run time, which decides how it rounds",
        ),
        (
            8,
            "float[1,3,2] x",
            "float[1,2] y, float[1,3,2] z",
            "y, z = Scan <num_scan_inputs: int = 1, body: graph = body (float[2] e) => (float[2] f, float[2] g) "
            "{ f = Identity (e) g = Neg (e) }> (, x)",
            "Scan took a batch axis until opset 8",
        ),
    ],
)
def test_what_cannot_be_raised_stays(old: int, inputs: str, outputs: str, body: str, reason: str) -> None:
    text = f'<ir_version: 4, opset_import: ["" : {old}]> main ({inputs}) => ({outputs}) {{ {body} }}'
    model = ir.from_onnx_text(text)
    before = fingerprint(model)
    assert messages(model, create("raise-opset", opset=13)) == [f"opset {old} cannot become 13: {reason}"]
    assert fingerprint(model) == before


def test_raising_leaves_other_domains_ties_and_mapped_weights_alone(tmp_path: Path) -> None:
    text = """<ir_version: 4, opset_import: ["" : 9, "mine" : 3]>
    main (float[1,200] x, float[200,200] w, float[200,200] u) => (float[200] y)
    { a = MatMul (x, w) b = mine.Twist <angle: int = 3> (a, u) y = Squeeze <axes: ints = [0]> (b) }"""
    arrays = {name: np.ones((200, 200), np.float32) for name in ("w", "u")}
    proto = ir.to_proto(constants(ir.from_onnx_text(text), arrays))
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    model = load(tmp_path / "m.onnx")
    tied = model.graph.initializers["w"].const_value
    assert isinstance(tied, ir.ExternalTensor)
    model.graph.initializers["u"].const_value = tied
    assert messages(model, create("raise-opset", opset=13), kind="applied")[0] == "adapted to opset 13"
    assert model.graph.initializers["w"].const_value is model.graph.initializers["u"].const_value is tied
    assert dict(model.opset_imports) == {"": 13, "mine": 3}
    assert next(n for n in model.graph if n.domain == "mine").attributes["angle"].as_int() == 3
    save(model, tmp_path / "raised.onnx")
    assert load(tmp_path / "raised.onnx").opset_imports[""] == 13
