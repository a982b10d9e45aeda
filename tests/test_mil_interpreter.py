"""The interpreter of saved Core ML packages: what it takes, how it rounds, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("coremltools")

from mil_programs import close, interpreter, normal, run, saved
from optkit.errors import InputError
from optkit_targets.coreml import toolkit
from optkit_targets.coreml.interpreter import Interpreter, load
from optkit_targets.coreml.interpreter.halves import LARGE, overflowed, rounded, widened
from optkit_targets.coreml.interpreter.kernels.indexing import checked

SPECIFICATION = "Data/com.apple.CoreML/model.mlmodel"


def _scale(mb: Any, x: Any) -> dict[str, Any]:
    return {"y": mb.mul(x=x, y=2.0)}


def test_inputs_and_outputs_are_named_typed_and_shaped(tmp_path: Path) -> None:
    inputs = {"x": normal(2, 3), "k": np.array([1, 0], np.int32)}
    found = interpreter(tmp_path, lambda mb, x, k: {"y": mb.gather(x=x, indices=k, axis=0), "z": mb.exp(x=x)}, inputs)
    assert [(each.name, each.dtype, each.shape) for each in found.inputs] == [
        ("x", "float32", (2, 3)),
        ("k", "int32", (2,)),
    ]
    assert [(each.name, each.dtype, each.shape) for each in found.outputs] == [
        ("y", "float32", (2, 3)),
        ("z", "float32", (2, 3)),
    ]
    given = {"x": inputs["x"].astype(np.float64), "k": [1, 0], "other": 3}  # converted, and ignored
    close(found.run(given)["y"], inputs["x"][::-1])


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({}, "the input 'x' is missing"),
        ({"xx": normal(2, 3)}, "the input 'x' is missing; did you mean 'xx'"),
        ({"x": normal(3, 2)}, r"the input 'x' has shape \[3, 2\], and the package takes \[2, 3\]"),
        ({"x": np.full((2, 3), "a")}, "has elements of type <U1, and the package takes float32"),
    ],
)
def test_inputs_that_do_not_fit_are_sentences(tmp_path: Path, given: dict[str, Any], sentence: str) -> None:
    found = interpreter(tmp_path, _scale, {"x": normal(2, 3)})
    with pytest.raises(InputError, match=sentence):
        found.run(given)


def test_integers_are_not_made_of_floats(tmp_path: Path) -> None:
    found = interpreter(tmp_path, lambda mb, x: {"y": mb.add(x=x, y=1)}, {"x": np.array([1], np.int32)})
    with pytest.raises(InputError, match="has elements of type float32, and the package takes int32"):
        found.run({"x": np.array([1.5], np.float32)})


@pytest.mark.parametrize("layout", ["RGB", "BGR", "GRAYSCALE"])
def test_images_become_the_tensor_that_the_program_takes(tmp_path: Path, layout: str) -> None:
    ct, mb = toolkit.coremltools(), toolkit.builder()
    shape = (1, 1 if layout == "GRAYSCALE" else 3, 4, 5)

    @mb.program(input_specs=[mb.TensorSpec(shape=shape)], opset_version=ct.target.iOS17)
    def program(x: Any) -> Any:
        return mb.identity(x=x, name="y")

    bias = 1.0 if layout == "GRAYSCALE" else [1.0] * 3
    kind = ct.ImageType(name="x", shape=shape, scale=0.5, bias=bias, color_layout=getattr(ct.colorlayout, layout))
    with toolkit.quiet():
        made = ct.convert(
            program,
            inputs=[kind],
            convert_to="mlprogram",
            minimum_deployment_target=ct.target.iOS17,
            compute_precision=ct.precision.FLOAT32,
            skip_model_load=True,
        )
    made.save(str(tmp_path / "image.mlpackage"))
    found = load(tmp_path / "image.mlpackage")
    picture = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)[..., : 3 if shape[1] == 3 else 1].squeeze()
    ordered = picture[..., ::-1] if layout == "BGR" else picture
    tensor = ordered.reshape(4, 5, -1).transpose(2, 0, 1)[None]
    image = found.inputs[0].image
    assert image is not None
    assert (image.layout, image.height, image.width) == (layout, 4, 5)
    for given in (picture, tensor):
        close(found.run({"x": given})["y"], tensor * np.float32(0.5) + np.float32(1))
    with pytest.raises(InputError, match="the input 'x' does not fit: it takes an image"):
        found.run({"x": picture[:3]})


def test_half_precision_rounds_each_result_once(tmp_path: Path) -> None:
    x = normal(64, 64)
    weight = normal(32, 64, seed=1)

    def build(mb: Any, x: Any) -> dict[str, Any]:
        return {"y": mb.linear(x=mb.tanh(x=x), weight=weight)}

    half = interpreter(tmp_path, build, {"x": x}, half=True)
    hidden = np.tanh(x.astype(np.float16).astype(np.float32)).astype(np.float16)
    product = hidden.astype(np.float32) @ weight.astype(np.float16).astype(np.float32).T
    found = half.run({"x": x})["y"]
    assert found.dtype == np.float32  # the package casts its output back
    # Sums of float32 differ by their order: a rounding to float16 may fall to the other side.
    assert (found == product.astype(np.float16)).mean() > 0.98
    np.testing.assert_allclose(found, product, rtol=2**-10)
    close(run(tmp_path, build, {"x": x})["y"], np.tanh(x) @ weight.T, 1e-4)


def test_overflow_of_half_precision_is_infinite_and_counted(tmp_path: Path) -> None:
    found = interpreter(tmp_path, lambda mb, x: {"y": mb.mul(x=mb.square(x=x), y=1e-3)}, {"x": normal(3)}, half=True)
    assert found.run({"x": np.array([300.0, -1.0, np.inf])})["y"].tolist() == [
        np.inf,
        pytest.approx(1e-3, rel=1e-3),
        np.inf,
    ]
    assert len(found.overflows) == 1
    assert "square" in found.overflows[0]
    found.run({"x": np.array([2.0, -1.0, np.inf])})  # what is infinite from the start does not overflow
    assert found.overflows == ()


@pytest.mark.parametrize("size", [1, LARGE])
def test_conversions_are_numpys_however_they_are_made(size: int) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16).view(np.float16)  # every float16
    finite = bits[np.isfinite(bits)]
    for half in (bits, bits[:: (1 << 16) // 64]) if size == LARGE else (bits[:7],):
        np.testing.assert_array_equal(widened(half), half.astype(np.float32))
    edges = np.array([65519.996, 65520, -65520, 2**-25, 3e-8, 2**-24 * 1.5, np.inf, np.nan], np.float32)
    between = (finite[1:].astype(np.float32) + finite[:-1].astype(np.float32)) / 2  # halfway: to the even one
    wide = np.concatenate([edges, between])[: max(size, 16) * 2]
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(rounded(wide), wide.astype(np.float16))
        assert overflowed(rounded(edges), edges)
        assert not overflowed(rounded(edges[3:]), edges[3:])


def test_branches_and_loops(tmp_path: Path) -> None:
    def build(mb: Any, x: Any, n: Any) -> dict[str, Any]:
        total = mb.reduce_sum(x=x, axes=[0], keep_dims=False)
        chosen = mb.cond(
            pred=mb.greater(x=total, y=0.0), _true_fn=lambda: mb.add(x=x, y=1.0), _false_fn=lambda: mb.mul(x=x, y=2.0)
        )
        first = mb.squeeze(x=n, axes=[0])
        looped = mb.while_loop(
            _cond=lambda i, _: mb.less(x=i, y=first),
            _body=lambda i, value: (mb.add(x=i, y=1), mb.mul(x=value, y=chosen)),
            loop_vars=(0, chosen),
        )
        return {"chosen": chosen, "looped": looped[1]}

    inputs = {"x": np.array([1.0, 2.0], np.float32), "n": np.array([2], np.int32)}
    found = interpreter(tmp_path, build, inputs)
    positive = found.run(inputs)
    close(positive["chosen"], np.array([2.0, 3.0], np.float32))
    close(positive["looped"], np.array([8.0, 27.0], np.float32))
    close(found.run({**inputs, "x": -inputs["x"]})["chosen"], np.array([-2.0, -4.0], np.float32))
    close(found.run({**inputs, "n": [0]})["looped"], np.array([2.0, 3.0], np.float32))


def test_lists_keep_what_loops_write(tmp_path: Path) -> None:
    def build(mb: Any, x: Any) -> dict[str, Any]:
        written = mb.list_write(ls=mb.make_list(init_length=3, elem_shape=(2,)), index=1, value=x)
        written = mb.list_scatter(ls=written, indices=[0], value=mb.expand_dims(x=mb.mul(x=x, y=3.0), axes=[0]))
        return {"y": mb.list_gather(ls=written, indices=[1, 0]), "z": mb.list_read(ls=written, index=2)}

    x = normal(2)
    found = run(tmp_path, build, {"x": x})
    close(found["y"], np.stack([x, 3 * x]))
    close(found["z"], np.zeros(2, np.float32))


def _stateful(folder: Path) -> Interpreter:
    ct, mb = toolkit.coremltools(), toolkit.builder()
    specs = [mb.TensorSpec((2,), dtype=toolkit.mil().types.fp16), mb.StateTensorSpec((2,), toolkit.mil().types.fp16)]

    @mb.program(input_specs=specs, opset_version=ct.target.iOS18)
    def program(x: Any, state: Any) -> Any:
        total = mb.add(x=mb.read_state(input=state), y=x)
        return mb.identity(x=mb.coreml_update_state(state=state, value=total), name="y")

    with toolkit.quiet():
        made = ct.convert(
            program, convert_to="mlprogram", minimum_deployment_target=ct.target.iOS18, skip_model_load=True
        )
    made.save(str(folder / "state.mlpackage"))
    return load(folder / "state.mlpackage")


def test_states_live_as_long_as_their_owner(tmp_path: Path) -> None:
    found = _stateful(tmp_path)
    x = {"x": np.array([1.0, 2.0])}
    state = found.new_state()
    assert [found.run(x, state)["y"].tolist() for _ in range(3)] == [[1, 2], [2, 4], [3, 6]]
    assert found.run(x)["y"].tolist() == [1, 2]


def test_operators_that_are_not_executed_are_all_named(tmp_path: Path) -> None:
    def build(mb: Any, x: Any) -> dict[str, Any]:
        noise = mb.random_normal(shape=[2, 3], name="noise")
        more = mb.random_uniform(shape=[2, 3], name="more")
        return {"y": mb.add(x=mb.add(x=x, y=noise), y=more)}

    sentence = r"not executed by the interpreter: random_normal \(noise\); random_uniform \(more\)"
    with pytest.raises(InputError, match=sentence):
        interpreter(tmp_path, build, {"x": normal(2, 3)})


def test_indices_out_of_bounds_are_sentences(tmp_path: Path) -> None:
    inputs = {"x": normal(3), "k": np.array([-1, 0], np.int32)}
    found = interpreter(tmp_path, lambda mb, x, k: {"y": mb.gather(x=x, indices=k, axis=0)}, inputs, deployment=16)
    close(found.run(inputs)["y"], inputs["x"][[2, 0]])
    sentence = r"\(gather\) cannot be computed: index 3 is out of bounds for 3 elements"
    with pytest.raises(InputError, match=sentence):
        found.run({**inputs, "k": [3, 0]})
    with pytest.raises(ValueError, match="index -1 is out of bounds for 3 elements"):
        checked(inputs["k"], 3, deployment=17)


def test_damaged_packages_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the package is missing"):
        load(tmp_path / "none.mlpackage")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=r"has no Manifest.json, so it is no .mlpackage"):
        load(tmp_path / "folder")
    package = saved(tmp_path, _scale, {"x": normal(2)})
    manifest, model = package / "Manifest.json", package / SPECIFICATION
    text, content = manifest.read_text(), model.read_bytes()
    for damaged in ("{", "{}", json.dumps({"itemInfoEntries": [], "rootModelIdentifier": "a"})):
        manifest.write_text(damaged)
        with pytest.raises(InputError, match="the manifest does not say which file is the model"):
            load(package)
    manifest.write_text(text.replace("model.mlmodel", "other.mlmodel"))
    with pytest.raises(InputError, match=r"names 'com.apple.CoreML/other.mlmodel', which is missing"):
        load(package)
    manifest.write_text(text)
    model.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="the specification cannot be read"):
        load(package)
    model.write_bytes(b"")
    with pytest.raises(InputError, match="holds a model without content, no ML Program"):
        load(package)
    model.write_bytes(content)
    with pytest.raises(InputError, match="has no function 'other'; it has: main"):
        load(package, "other")


def _changed(package: Path, change: Any) -> None:
    """Let ``change`` edit the operations of a package's specification."""
    model = toolkit.proto().Model.FromString((package / SPECIFICATION).read_bytes())
    function = model.mlProgram.functions["main"]
    change(function.block_specializations[function.opset].operations)
    (package / SPECIFICATION).write_bytes(model.SerializeToString())


def test_operations_that_lack_what_they_need_are_sentences(tmp_path: Path) -> None:
    def build(mb: Any, x: Any) -> dict[str, Any]:
        looped = mb.while_loop(
            _cond=lambda i, _: mb.less(x=i, y=2), _body=lambda i, v: (mb.add(x=i, y=1), mb.exp(x=v)), loop_vars=(0, x)
        )
        return {"y": mb.add(x=looped[1], y=mb.cumsum(x=x))}

    def of(type_: str, operations: Any) -> Any:
        return next(operation for operation in operations if operation.type == type_)

    changes = {
        r"const without 'val' \(": lambda ops: of("const", ops).attributes.pop("val"),
        r"while_loop without the bodies it needs \(": lambda ops: of("while_loop", ops).blocks[1].outputs.pop(),
        r"add with nothing for 'x' \(add_\d+\)": lambda ops: of("add", ops).inputs["x"].ClearField("arguments"),
        r"cumsum with 'z' \(": lambda ops: of("cumsum", ops).inputs["z"].arguments.add(name="x"),
        r"'add_\d+' \(add\) computes 1 results, and the program declares 2": lambda ops: of("add", ops).outputs.add(
            name="z"
        ),
        r"\(add\) cannot be computed: .*missing 1 required": lambda ops: of("add", ops).inputs.pop("y"),
        r"variable 'none' is read before": lambda ops: setattr(of("add", ops).inputs["x"].arguments[0], "name", "none"),
    }
    for sentence, change in changes.items():
        package = saved(tmp_path, build, {"x": normal(2, 3)})
        _changed(package, change)
        with pytest.raises(InputError, match=sentence):
            load(package).run({"x": normal(2, 3)})


def test_a_constant_outside_the_package_is_refused(tmp_path: Path) -> None:
    package = saved(tmp_path, lambda mb, x: {"y": mb.linear(x=x, weight=normal(8, 4))}, {"x": normal(2, 4)})

    def change(operations: Any) -> None:
        for operation in operations:
            if operation.attributes["val"].WhichOneof("value") == "blobFileValue":
                operation.attributes["val"].blobFileValue.fileName = "@model_path/../../../secret"

    _changed(package, change)
    with pytest.raises(InputError, match=r"lies in '@model_path/../../../secret', outside the package"):
        load(package)


def test_a_result_that_is_not_as_declared_is_a_sentence(tmp_path: Path) -> None:
    package = saved(tmp_path, _scale, {"x": normal(2, 3)})

    def change(operations: Any) -> None:
        last = next(operation for operation in operations if operation.type == "mul")
        last.outputs[0].type.tensorType.dimensions[0].constant.size = 7

    _changed(package, change)
    with pytest.raises(InputError, match=r"'mul_\d+' \(mul\) has shape \[2, 3\], and the program declares \[7, 3\]"):
        load(package).run({"x": normal(2, 3)})
