"""A model as a MIL program, and a MIL program as a package on disk, the same bytes for the same model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from optkit.errors import GateError, InputError, OptkitError
from optkit.graph import opset
from optkit.model.loading import graph_inputs
from optkit_targets.coreml import toolkit
from optkit_targets.coreml.features import FlexibleDim, ImageInput, Shape, check_labels, flexible_shape, tensor_type
from optkit_targets.coreml.lowering.scope import MAX_RANK, CannotLower, NoLowering, Scope, identifier
from optkit_targets.coreml.lowering.table import lacking, operator, table

NAMED = 5  # nodes that an error names
# The types of graph inputs; integers of every width are int32 inside a program.
INTEGERS = ("INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64")
TYPES = {"FLOAT": "fp32", "FLOAT16": "fp16", "DOUBLE": "fp32", "BOOL": "bool", **dict.fromkeys(INTEGERS, "int32")}
# coremltools 9.0 gives it constants in float32 where the program has float16.
TYPED_WRONGLY = ("common::fuse_elementwise_to_batchnorm",)
SCALAR = (1,)  # the shape in which a scalar is fed
DESCRIBING = {"author": "author", "description": "short_description", "license": "license", "version": "version"}
VOLATILE = ("com.github.apple.coremltools.conversion_date",)


def lower(model: ir.Model, deployment: int, flexible: Sequence[FlexibleDim] = (), *, settle: bool = True) -> Any:
    """Return a model as a MIL program.

    Args:
        model: The model, with static shapes.
        deployment: The number in the deployment target (17 for iOS 17).
        flexible: Dimensions that stay open.
        settle: Whether weights may take a wider form where only a later deployment target has the narrow one.

    Raises:
        GateError: An operator has no lowering; its nodes are named, with the reason where there is one.
        InputError: A node has a form that MIL lacks; every such node is named.
        MissingDependencyError: coremltools is not installed.
    """
    require_lowerings(model)
    for value in graph_inputs(model):
        _check_input(value)
    mil, mb = toolkit.mil(), toolkit.builder()
    known = table()
    scope = Scope(deployment, settle=settle, opset=opset(model))
    program = mil.Program()
    target = getattr(toolkit.coremltools().target, f"iOS{deployment}")
    symbols: dict[str, Any] = {}
    inputs = {
        scope.name(value.name or ""): mb.placeholder(_symbolic(value, flexible, symbols), dtype=_type(value))
        for value in graph_inputs(model)
    }
    refused: list[str] = []
    failure: type[OptkitError] = InputError
    lost: set[ir.Value | None] = set()
    with mil.Function(inputs, opset_version=target) as function:
        for value, name in zip(graph_inputs(model), inputs, strict=True):
            scope.set(value, _given(scope, value, function.inputs[name]))
        for node in model.graph:
            if any(value in lost for value in node.inputs):
                lost.update(node.outputs)  # what it reads was refused: that is the reason to name
                continue
            try:
                scope.bind(node, known[operator(node)](scope, node))
            except CannotLower as error:
                refused.append(f"{node.name} ({node.op_type}): {error}")
                failure = GateError if isinstance(error, NoLowering) else failure
                lost.update(node.outputs)
        outputs = []
        for value in model.graph.outputs:
            try:
                outputs += [] if value in lost else [_output(scope, value)]
            except CannotLower as error:
                refused.append(f"output '{value.name}': {error}")
        if refused:
            raise failure(f"the model has forms that Core ML's MIL does not have: {'; '.join(refused)}")
        function.set_outputs(outputs)
    program.add_function("main", function)
    return program


def require_lowerings(model: ir.Model) -> None:
    """Refuse a model with operators that have no lowering, bodies included.

    Raises:
        GateError: Lists the operators with the names of their nodes.
    """
    missing: dict[str, list[str]] = {}
    for node in lacking(list(model.graph.all_nodes())):
        missing.setdefault(operator(node), []).append(node.name or "")
    if missing:
        parts = [
            f"{op} ({', '.join(names[:NAMED])}{', ...' if len(names) > NAMED else ''})" for op, names in missing.items()
        ]
        hint = "a plugin can add one through the entry point group 'optkit.lowerings'"
        raise GateError(f"these operators have no lowering to Core ML: {'; '.join(parts)}", hint=hint)


def _check_input(value: ir.Value) -> None:
    """Refuse a graph input that Core ML has no tensor for.

    Raises:
        InputError: It has more than 5 axes, no elements, or elements of a type that Core ML lacks.
    """
    kind = value.dtype or ir.DataType.FLOAT
    if kind.name not in TYPES:
        raise InputError(f"Core ML has no tensors of {kind.name}, the type of input '{value.name}'")
    shape = list(value.shape or ())
    if len(shape) > MAX_RANK or 0 in shape:
        what = (
            f"Core ML's inputs have at most {MAX_RANK} axes and at least one element: '{value.name}' has shape {shape}"
        )
        raise InputError(what, hint="fix it to a value with --fix, or export it with another shape")


def _symbolic(value: ir.Value, flexible: Sequence[FlexibleDim], symbols: dict[str, Any]) -> tuple[Any, ...]:
    """Return a shape with a symbol for every open dimension, the same one for the same name; of a scalar, one of 1."""
    shape = flexible_shape(value, flexible) or SCALAR
    for dim in shape:
        if isinstance(dim, FlexibleDim) and dim.name not in symbols:
            symbols[dim.name] = toolkit.mil().get_new_symbol()
    return tuple(dim if isinstance(dim, int) else symbols[dim.name] for dim in shape)


def _given(scope: Scope, value: ir.Value, variable: Any) -> Any:
    """Return what stands for an input: a scalar is fed as a tensor of one element, since Core ML has no other."""
    if value.shape is None or value.shape.rank():
        return variable
    return scope.mb.squeeze(x=variable, axes=[0], name=scope.name(value.name or "", "scalar"))


def _type(value: ir.Value) -> Any:
    """Return the MIL type of a graph input."""
    kind = value.dtype or ir.DataType.FLOAT
    return getattr(toolkit.mil().types, TYPES[kind.name])


def _output(scope: Scope, value: ir.Value) -> Any:
    """Return the variable of a graph output, under its name where MIL allows it.

    Raises:
        CannotLower: It has more axes than MIL's tensors, or no elements.
    """
    variable = scope.variable(value)
    if 0 in variable.shape:
        raise CannotLower("it has no elements: MIL has no empty tensors")
    return scope.mb.identity(x=variable, name=identifier(value.name or ""))


def save(
    program: Any,
    deployment: int,
    goal: Path,
    *,
    half: bool,
    metadata: Mapping[str, str] | None = None,
    images: Sequence[ImageInput] = (),
    class_labels: Sequence[str] = (),
    shapes: Mapping[str, Shape] | None = None,
) -> Path:
    """Write a program as ``.mlpackage``; no dates and no random identifiers are in it.

    Args:
        program: The MIL program.
        deployment: The number in the deployment target.
        goal: The package's folder, which must not exist.
        half: Whether floats are computed in float16.
        metadata: The model's own entries; author, license, version and description where Xcode shows them.
        images: Inputs that are images.
        class_labels: The classes, in the order of the first output's last axis; none: no classifier.
        shapes: The shapes of inputs with open dimensions.

    Raises:
        InputError: An image input or the labels do not fit the program.
    """
    ct = toolkit.coremltools()
    function = program.functions["main"]
    pictures = {each.name: each.core_ml(function.inputs.get(each.name)) for each in images}
    extra: dict[str, Any] = {}
    if pictures or shapes:
        extra["inputs"] = [
            pictures.get(name) or tensor_type(name, (shapes or {}).get(name) or tuple(variable.shape))
            for name, variable in function.inputs.items()
        ]
    if class_labels:
        check_labels(class_labels, function.outputs)
        extra["classifier_config"] = ct.ClassifierConfig(list(class_labels))
    precision = ct.precision.FLOAT16 if half else ct.precision.FLOAT32
    passes = ct.PassPipeline()
    if not half:
        passes.remove_passes(TYPED_WRONGLY)
    with toolkit.quiet():
        made = ct.convert(
            program,
            source="milinternal",
            convert_to="mlprogram",
            minimum_deployment_target=getattr(ct.target, f"iOS{deployment}"),
            compute_precision=precision,
            pass_pipeline=passes,
            skip_model_load=True,
            **extra,
        )
    for key in VOLATILE:
        made.user_defined_metadata.pop(key, None)
    for key, text in (metadata or {}).items():
        if key in DESCRIBING:
            setattr(made, DESCRIBING[key], text)
        else:
            made.user_defined_metadata[key] = text
    made.save(str(goal))
    _settle(goal)
    return goal


def _settle(package: Path) -> None:
    """Replace the package's random identifiers by ones that follow from what they stand for."""
    path = package / "Manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    names = {old: _identifier(entry["path"]) for old, entry in manifest["itemInfoEntries"].items()}
    manifest["itemInfoEntries"] = {names[old]: entry for old, entry in manifest["itemInfoEntries"].items()}
    manifest["rootModelIdentifier"] = names[manifest["rootModelIdentifier"]]
    path.write_text(json.dumps(manifest, indent=4, sort_keys=True) + "\n", encoding="utf-8")


def _identifier(path: str) -> str:
    digest = hashlib.sha256(path.encode()).hexdigest()
    return "-".join((digest[:8], digest[8:12], digest[12:16], digest[16:20], digest[20:32]))
