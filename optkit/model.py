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

EXTERNAL_DATA_BYTES = 1_500_000_000  # larger models are saved with external data: protobuf ends at 2 GiB
OLDEST_OPSET = 7

# Removed from ONNX before 1.5 but still run by onnxruntime and still found in old files (onnx Changelog, opset 10).
EXPERIMENTAL_OPS = frozenset({"ATen", "Affine", "Crop", "DynamicSlice", "GRUUnit", "GivenTensorFill", "ImageScaler"})
EXPERIMENTAL_OPS |= {"ParametricSoftplus", "Scale", "ScaledTanh"}

logging.getLogger("onnx_ir").setLevel(logging.ERROR)


def load(path: str | Path, dims: Mapping[str, int] | None = None) -> ir.Model:
    """Load an ONNX model, check it, and normalize it for the passes.

    Weights in external data stay memory-mapped. Functions are inlined, nodes are put in topological order, every
    node gets a unique name, ``Constant`` nodes become initializers, and shapes are inferred. IR version 3, where every
    initializer had to be an input, becomes 4, where those that are inputs may be overridden. Nothing else changes.

    Args:
        path: The ONNX file, or a folder that holds exactly one.
        dims: Sizes for dynamic dimensions, by symbolic name (``batch``) or as ``input.axis`` (``images.0``).

    Returns:
        The model.

    Raises:
        InputError: The file cannot be read as a valid model, or a name in ``dims`` is not a dynamic dimension.
    """
    file = model_file(Path(path))
    return _normalize(_parse(file), file, dims or {})


def load_text(text: str, dims: Mapping[str, int] | None = None) -> ir.Model:
    """Load a model written in ONNX's text format, checked and normalized like a file."""
    try:
        proto = onnx.parser.parse_model(text)
    except Exception as error:
        raise InputError(f"not valid ONNX text: {error}") from error
    return _normalize(proto, Path("<text>"), dims or {})


def _normalize(proto: onnx.ModelProto, file: Path, dims: Mapping[str, int]) -> ir.Model:
    try:
        model: ir.Model = ir.from_proto(proto)
    except Exception as error:
        raise InputError(f"the graph is not valid: {_innermost(error)}", where=str(file)) from error
    ir.external_data.set_base_dir(model.graph, file.parent.resolve())
    for graph in model.graphs():
        ir.external_data.set_base_dir(graph, file.parent.resolve())
    _check_opset(model, file)
    _check_tensors(model, file)
    try:
        model.graph.sort()
    except ValueError as error:
        raise InputError("the graph contains a cycle", where=str(file)) from error
    _check_graph(model, file)
    if model.functions:
        ir_passes.InlinePass()(model)
    if model.ir_version < 4:  # there every initializer had to be listed as an input, and was constant all the same
        ir_passes.RemoveInitializersFromInputsPass()(model)
        model.ir_version = 4
    ir_passes.LiftConstantsToInitializersPass(lift_all_constants=False, size_limit=0)(model)
    name_nodes(model)
    bind_dims(model, dims)
    infer_shapes(model)
    return model


def model_file(path: Path) -> Path:
    """Return the ONNX file that ``path`` names: the file itself, or the only one in a folder."""
    if path.is_dir():
        found = sorted(path.glob("*.onnx"))
        if len(found) == 1:
            return found[0]
        what = f"the folder holds {len(found)} .onnx files" if found else "the folder holds no .onnx file"
        raise InputError(what, where=str(path), hint="name one ONNX file")
    if not path.exists():
        known = [other.name for other in path.parent.glob("*.onnx")] if path.parent.is_dir() else []
        raise InputError("no such file", where=str(path), hint=did_you_mean(path.name, known) if known else "")
    return path


def source_files(path: Path) -> list[Path]:
    """Return the model's file and every external data file that it refers to, sorted."""
    file = model_file(path)
    model = ir.from_proto(_parse(file))
    locations = {str(tensor.location) for _, tensor in tensors(model) if isinstance(tensor, ir.ExternalTensor)}
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
        proto = onnx.load(file, load_external_data=False)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}", where=str(file)) from error
    except Exception as error:  # protobuf's DecodeError, or a text parser's own
        raise InputError(
            "not an ONNX model: the file is truncated, corrupt, or of another format", where=str(file)
        ) from error
    if not proto.opset_import or not proto.HasField("graph"):
        raise InputError("not an ONNX model: it has no graph or no opset", where=str(file))
    return proto


def _check_opset(model: ir.Model, file: Path) -> None:
    opset, newest = model.opset_imports.get(""), onnx.defs.onnx_opset_version()
    if opset is not None and opset < OLDEST_OPSET:
        raise InputError(
            f"opset {opset} is older than {OLDEST_OPSET}, the oldest that is read",
            where=str(file),
            hint="convert it with onnx.version_converter",
        )
    if opset is not None and opset > newest:
        raise InputError(
            f"opset {opset} is newer than onnx {onnx.__version__} knows ({newest})",
            where=str(file),
            hint="upgrade the onnx package",
        )


def tensors(model: ir.Model) -> Iterator[tuple[str, ir.TensorProtocol]]:
    """Yield (name, tensor) of every initializer and tensor attribute, bodies and functions included."""
    for graph in model.graphs():
        for name, value in graph.initializers.items():
            if value.const_value is not None:
                yield name, value.const_value
    graphs = [model.graph, *(function.graph for function in model.functions.values())]
    for node in (node for graph in graphs for node in graph.all_nodes()):
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.TENSOR:
                yield node.outputs[0].name or str(node.name), attribute.as_tensor()


def _check_tensors(model: ir.Model, file: Path) -> None:
    folder = file.parent.resolve()
    for name, tensor in tensors(model):
        where = f"{file}: tensor '{name}'"
        expected = tensor.nbytes
        if isinstance(tensor, ir.ExternalTensor):
            _check_external(tensor, folder, where)
        elif isinstance(tensor, ir.TensorProtoTensor) and tensor.dtype != ir.DataType.STRING:
            try:
                actual = len(tensor.tobytes())
                shaped = tensor.numpy().size == tensor.size
            except Exception as error:
                raise InputError(f"its bytes do not match its shape {list(tensor.shape)}", where=where) from error
            if actual != expected or not shaped:
                raise InputError(
                    f"it holds {actual} bytes where shape {list(tensor.shape)} of {tensor.dtype} takes {expected}",
                    where=where,
                )


def _check_external(tensor: ir.ExternalTensor, folder: Path, where: str) -> None:
    location = Path(str(tensor.location))
    if location.is_absolute() or ".." in location.parts:
        raise InputError(f"its external data '{location}' points outside the model's folder", where=where)
    path = folder / location
    if not path.is_file():
        raise InputError(f"its external data file '{location}' is missing", where=where)
    if not path.resolve().is_relative_to(folder):
        raise InputError(f"its external data '{location}' is a link that leaves the model's folder", where=where)
    available = path.stat().st_size - (tensor.offset or 0)
    length = tensor.length if tensor.length is not None else tensor.nbytes
    if length != tensor.nbytes:
        raise InputError(
            f"its external data holds {length} bytes where shape {list(tensor.shape)} of {tensor.dtype} "
            f"takes {tensor.nbytes}",
            where=where,
        )
    if available < length:
        raise InputError(f"its external data ends {length - available} bytes before the tensor does", where=where)


def _check_graph(model: ir.Model, file: Path) -> None:
    """Run the ONNX checker on the structure: weights are left out, so that any size is checked the same way."""
    clone = model.clone()
    for value in clone.graph.outputs:
        if value.type is not None and value.shape is None:
            value.shape = ir.Shape([])  # onnxruntime runs outputs of unknown rank, which the checker refuses
    for node in clone.graph.all_nodes():
        if node.domain == "" and node.op_type in EXPERIMENTAL_OPS:
            node.domain = "experimental"  # the checker has forgotten them
            clone.opset_imports["experimental"] = 1
    try:
        ir_passes.CheckerPass()(clone)
    except Exception as error:
        raise InputError(f"the ONNX checker refuses the graph: {_innermost(error)}", where=str(file)) from error


def _innermost(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")


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
        while f"{node.op_type}_{number}" in taken:
            number += 1
        node.name = f"{node.op_type}_{number}"
        taken.add(node.name)


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
    for name, size in dims.items():
        symbol = name if name in known else by_position.get(name)
        if symbol is None:
            what = f"the model has no dynamic dimension '{name}'"
            raise InputError(what, hint=did_you_mean(name, [*known, *by_position]) or "all its dimensions are fixed")
        if size < 1:
            raise InputError(f"dimension '{name}' cannot be {size}", hint="give a positive size")
    for value in [*graph_inputs(model), *model.graph.outputs]:
        for axis, dim in enumerate(value.shape or ()):
            if isinstance(dim, int) or value.shape is None:
                continue
            size = dims.get(dim.value or "", dims.get(f"{value.name}.{axis}", 0))
            if size:
                value.shape = ir.Shape([size if i == axis else d for i, d in enumerate(value.shape)])
    for graph in model.graphs():
        for node in graph:
            for value in node.outputs:
                if not value.is_graph_output():
                    value.shape = None


def infer_shapes(model: ir.Model) -> None:
    """Fill in shapes and element types that ONNX can infer; what it cannot is left open."""
    ir_passes.ShapeInferencePass(check_type=False, strict_mode=False)(model)


def in_memory(model: ir.Model) -> ir.Model:
    """Return the model itself, or a copy with external tensors read into memory."""
    if not any(isinstance(tensor, ir.ExternalTensor) for _, tensor in tensors(model)):
        return model
    return ir.external_data.load_to_model(model.clone())


def weight_bytes(model: ir.Model) -> int:
    """Return the bytes of all initializers, a tensor under several names counted once."""
    unique = {id(v.const_value): v.const_value for g in model.graphs() for v in g.initializers.values()}
    return sum(tensor.nbytes for tensor in unique.values() if tensor is not None)


def save(model: ir.Model, path: str | Path) -> list[Path]:
    """Save the model, with external data beside it when the weights exceed 1.5 GB; opset and IR version are kept.

    Returns:
        The files written, the model first.
    """
    path = Path(path)
    if weight_bytes(model) > EXTERNAL_DATA_BYTES:
        ir.save(model, path, external_data=path.name + ".data")
        return [path, path.with_name(path.name + ".data")]
    path.write_bytes(ir.to_proto(in_memory(model)).SerializeToString(deterministic=True))
    return [path]
