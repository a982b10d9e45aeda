"""Loading and saving ONNX models: opset 7 and up, external data, functions, bodies; nothing is silently repaired."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx
import onnx.parser
import onnx_ir as ir
from onnx_ir.passes import common as ir_passes

from optkit.errors import InputError, did_you_mean
from optkit.model.check_graph import check_proto, find_cycle, innermost, run_checker
from optkit.model.check_tensor import proto_tensors
from optkit.model.file_format import recognize
from optkit.model.fixing import fix_inputs
from optkit.model.normalize import drop_listed_initializers, inline_functions, normalize_proto, read_small_tensors
from optkit.model.sequences import type_sequences

EXTERNAL_DATA_BYTES = 1_500_000_000  # larger models are saved with external data: protobuf ends at 2 GiB
PROTOBUF_BYTES = 1 << 31

logging.getLogger("onnx_ir").setLevel(logging.ERROR)


def load(path: str | Path, dims: Mapping[str, int] | None = None, fixed: Mapping[str, float] | None = None) -> ir.Model:
    """Load an ONNX model, check it, and normalize it for the passes.

    Weights in external data stay memory-mapped. Functions are inlined, nodes are put in topological order, every
    node gets a unique name, ``Constant`` nodes become initializers, and shapes are inferred. Up to IR version 4, where
    every initializer is also listed as an input (version 3 demanded it, and exporters kept the habit), they are
    constants and no longer inputs; elsewhere one that is an input may be overridden, and stays. No more changes.

    Args:
        path: The ONNX file, or a folder that holds exactly one.
        dims: Sizes for dynamic dimensions, by symbolic name (``batch``) or as ``input.axis`` (``images.0``).
        fixed: Values of inputs that are to be constants; every element of such an input has that value.

    Returns:
        The model.

    Raises:
        InputError: The file cannot be read as a valid model, or a name in ``dims`` is not a dynamic dimension, or one
            in ``fixed`` no input.
    """
    file = model_file(Path(path))
    return _normalize(_parse(file), file, dims or {}, fixed or {})


def load_text(text: str, dims: Mapping[str, int] | None = None) -> ir.Model:
    """Load a model written in ONNX's text format, checked and normalized like a file."""
    try:
        proto = onnx.parser.parse_model(text)
    except Exception as error:
        raise InputError(f"not valid ONNX text: {error}") from error
    return _normalize(proto, Path("<text>"), dims or {}, {})


def _normalize(proto: onnx.ModelProto, file: Path, dims: Mapping[str, int], fixed: Mapping[str, float]) -> ir.Model:
    check_proto(proto, file)
    normalize_proto(proto)
    try:
        model: ir.Model = ir.from_proto(proto)
    except Exception as error:
        raise InputError(f"the graph is not valid: {innermost(error)}", where=str(file)) from error
    for graph in [*model.graphs(), *(function.graph for function in model.functions.values())]:
        ir.external_data.set_base_dir(graph, file.parent.resolve())
        try:
            graph.sort()
        except ValueError as error:
            circle = find_cycle(proto)
            raise InputError(f"the nodes feed each other in a circle: {circle}", where=str(file)) from error
    inline_functions(model, file)
    drop_listed_initializers(model)
    ir_passes.LiftConstantsToInitializersPass(lift_all_constants=False, size_limit=0)(model)
    read_small_tensors(model)
    run_checker(storable(model), file)
    name_nodes(model)
    bind_dims(model, dims)
    fix_inputs(model, fixed)
    infer_shapes(model)
    return model


def model_file(path: Path) -> Path:
    """Return the ONNX file that ``path`` names: the file itself, or the only one in a folder."""
    if path.is_dir():
        found = sorted(path.glob("*.onnx"))
        if len(found) == 1:
            return found[0]
        count = f"{len(found)} .onnx files" if found else "no .onnx file"
        raise InputError(f"the folder holds {count}", where=str(path), hint="name one ONNX file")
    if not path.exists():
        known = [other.name for other in path.parent.glob("*.onnx")] if path.parent.is_dir() else []
        raise InputError("no such file", where=str(path), hint=did_you_mean(path.name, known) if known else "")
    return path


def source_files(path: Path) -> list[Path]:
    """Return the model's file and every external data file that it refers to, sorted."""
    file = model_file(path)
    locations = {
        entry.value
        for _, tensor in proto_tensors(_parse(file))
        if tensor.data_location == onnx.TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return [file, *sorted(file.parent / location for location in locations)]


def source_sha256(path: Path) -> str:
    """Return one digest over the model's file and its external data, in 1 MiB reads."""
    digest = hashlib.sha256()
    for file in source_files(path):
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _parse(file: Path) -> onnx.ModelProto:
    try:
        if file.stat().st_size >= PROTOBUF_BYTES:
            hint = "export it with external data"
            raise InputError("the file is larger than 2 GiB, which protobuf cannot read", where=str(file), hint=hint)
        proto = onnx.load(file, load_external_data=False)
    except OSError as error:
        raise InputError(f"cannot be read: {(error.strerror or str(error)).lower()}", where=str(file)) from error
    except InputError:
        raise
    except Exception as error:  # protobuf's DecodeError, or a text parser's own
        what, hint = recognize(file)
        raise InputError(what, where=str(file), hint=hint) from error
    if not proto.HasField("graph") or not proto.opset_import:
        what, hint = recognize(file)
        if "corrupt" in what:
            what, hint = "not an ONNX model: it has no graph or no opset", "download or export it again"
        raise InputError(what, where=str(file), hint=hint)
    return proto


def tensors(model: ir.Model) -> Iterator[tuple[str, ir.TensorProtocol]]:
    """Yield (name, tensor) of every initializer and tensor attribute, bodies included."""
    for graph in model.graphs():
        for name, value in graph.initializers.items():
            if value.const_value is not None:
                yield name, value.const_value
    for node in model.graph.all_nodes():
        for attribute in node.attributes.values():
            owner = (node.outputs[0].name if node.outputs else None) or str(node.name)
            if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
                yield owner, attribute.as_tensor()
            elif attribute.type == ir.AttributeType.TENSORS and not attribute.is_ref():
                yield from ((owner, tensor) for tensor in attribute.as_tensors())


def name_nodes(model: ir.Model) -> None:
    """Give every node, bodies included, a unique name: its own where that is free, else ``OpType_number``."""
    taken: set[str] = set()
    unnamed = []
    for node in model.graph.all_nodes():
        if node.name and node.name not in taken:
            taken.add(node.name)
        else:
            unnamed.append(node)
    number = 0
    for node in unnamed:
        while (name := f"{node.op_type}_{number}") in taken:
            number += 1
        node.name = name
        taken.add(name)


def graph_inputs(model: ir.Model) -> list[ir.Value]:
    """Return the inputs a caller must feed: those of the graph that have no initializer as default."""
    return [value for value in model.graph.inputs if not value.is_initializer()]


def dynamic_dims(model: ir.Model) -> dict[str, list[tuple[ir.Value, int]]]:
    """Return where each dynamic input dimension stands, by symbolic name, or ``input.axis`` where it has none."""
    found: dict[str, list[tuple[ir.Value, int]]] = {}
    for value in graph_inputs(model):
        for axis, dim in enumerate(value.shape or ()):
            if not isinstance(dim, int):
                found.setdefault(dim.value or f"{value.name}.{axis}", []).append((value, axis))
    return found


def bind_dims(model: ir.Model, dims: Mapping[str, int]) -> None:
    """Set dynamic dimensions of the inputs in place; intermediate shapes are left to be inferred again.

    Raises:
        InputError: A name is not a dynamic dimension of the model, or a size is not positive.
    """
    if not dims:
        return
    known = dynamic_dims(model)
    by_position = {f"{value.name}.{axis}": name for name, places in known.items() for value, axis in places}
    sizes: dict[str, int] = {}
    for name, size in dims.items():
        symbol = name if name in known else by_position.get(name)
        if symbol is None:
            what = f"the model has no dynamic dimension '{name}'"
            raise InputError(what, hint=did_you_mean(name, {*known, *by_position}) or "all its dimensions are fixed")
        if size < 1:
            raise InputError(f"dimension '{name}' cannot be {size}", hint="give a positive size")
        if sizes.setdefault(symbol, size) != size:
            raise InputError(f"dimension '{symbol}' cannot be both {sizes[symbol]} and {size}")
    for value in [*graph_inputs(model), *model.graph.outputs]:
        if value.shape is not None:
            names = [d if isinstance(d, int) else d.value or f"{value.name}.{i}" for i, d in enumerate(value.shape)]
            value.shape = ir.Shape([sizes.get(str(name), dim) for name, dim in zip(names, value.shape, strict=True)])
    for graph in model.graphs():
        for node in graph:
            for value in node.outputs:
                if not value.is_graph_output():
                    value.shape = None


def infer_shapes(model: ir.Model) -> None:
    """Fill in shapes and element types that ONNX can infer; what it cannot is left open."""
    type_sequences(model)
    ir_passes.ShapeInferencePass(check_type=False, strict_mode=False)(model)


def in_memory(model: ir.Model) -> ir.Model:
    """Return the model itself, or a copy with external tensors read into memory."""
    if not any(isinstance(tensor, ir.ExternalTensor) for _, tensor in tensors(model)):
        return model
    return ir.external_data.load_to_model(model.clone())


def weight_bytes(model: ir.Model) -> int:
    """Return the bytes of all initializers, a tensor under several names counted once."""
    values = [value for graph in model.graphs() for value in graph.initializers.values()]
    unique = {_storage(value.const_value): value.const_value for value in values if value.const_value is not None}
    return sum(tensor.nbytes for tensor in unique.values())


def _storage(tensor: ir.TensorProtocol) -> object:
    """Return what two tensors have in common when they are one: the same object, or the same bytes of a file."""
    if isinstance(tensor, ir.ExternalTensor):
        return tensor.path, tensor.offset, tensor.length, tensor.dtype, tuple(tensor.shape)
    return id(tensor)


def storable(model: ir.Model) -> ir.Model:
    """Return the model as its IR version wants it written; a copy that shares its tensors where that differs.

    Initializers that are one tensor under several names become one. In IR version 3 every initializer of the graph is
    also an input, and bodies have ``Constant`` nodes in place of initializers.
    """
    copy = model.clone()
    first: dict[object, ir.Value] = {}
    for name, value in list(copy.graph.initializers.items()):
        if value.const_value is not None and not value.is_graph_output():
            kept = first.setdefault(_storage(value.const_value), value)
            if kept is not value:
                value.replace_all_uses_with(kept)
                del copy.graph.initializers[name]
    if copy.ir_version >= 4:
        return copy
    for graph in copy.graphs():
        for name, value in list(graph.initializers.items()):
            if value.const_value is None:
                continue
            value.type, value.shape = ir.TensorType(value.const_value.dtype), ir.Shape(value.const_value.shape.numpy())
            if graph is copy.graph:
                graph.inputs.append(value)
            else:
                constant = ir.node("Constant", [], {"value": value.const_value}, num_outputs=1)
                graph.insert_before(graph[0], constant)
                value.replace_all_uses_with(constant.outputs[0], replace_graph_outputs=True)
                del graph.initializers[name]
                constant.outputs[0].name = name
    return copy


def save(model: ir.Model, path: str | Path) -> list[Path]:
    """Save the model, with external data beside it when the weights exceed 1.5 GB; opset and IR version are kept.

    Returns:
        The files written, the model first.

    Raises:
        InputError: The file cannot be written.
    """
    path = Path(path)
    model = storable(model)
    try:
        if weight_bytes(model) > EXTERNAL_DATA_BYTES:
            ir.save(model, path, format="protobuf", external_data=path.name + ".data")
            return [path, path.with_name(path.name + ".data")]
        path.write_bytes(ir.to_proto(in_memory(model)).SerializeToString(deterministic=True))
    except OSError as error:
        raise InputError(f"cannot be written: {(error.strerror or str(error)).lower()}", where=str(path)) from error
    return [path]
