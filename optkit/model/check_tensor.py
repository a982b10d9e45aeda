"""What a stored tensor must satisfy: its bytes match its shape, and external data lies in the model's folder."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx
import onnx_ir as ir

from optkit.errors import InputError

# The TensorProto field that holds the values when raw_data does not; int32_data for every other type.
_FIELDS = {
    ir.DataType.FLOAT: "float_data",
    ir.DataType.COMPLEX64: "float_data",
    ir.DataType.DOUBLE: "double_data",
    ir.DataType.COMPLEX128: "double_data",
    ir.DataType.INT64: "int64_data",
    ir.DataType.UINT32: "uint64_data",
    ir.DataType.UINT64: "uint64_data",
    ir.DataType.STRING: "string_data",
}


def proto_tensors(proto: onnx.ModelProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    """Yield (name, tensor) of every initializer and tensor attribute, bodies and functions included."""
    yield from _graph_tensors(proto.graph)
    for function in proto.functions:
        yield from _node_tensors(function.node)


def _graph_tensors(graph: onnx.GraphProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    for tensor in graph.initializer:
        yield tensor.name, tensor
    yield from _node_tensors(graph.node)


def _node_tensors(nodes: Iterable[onnx.NodeProto]) -> Iterator[tuple[str, onnx.TensorProto]]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t.name or (node.output[0] if node.output else node.name), attribute.t
            for tensor in attribute.tensors:
                yield tensor.name or node.name, tensor
            for graph in bodies(attribute):
                yield from _graph_tensors(graph)


def bodies(attribute: onnx.AttributeProto) -> list[onnx.GraphProto]:
    """Return the graphs that an attribute holds: the bodies of If, Loop and Scan."""
    return [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]


def check_tensor(tensor: onnx.TensorProto, folder: Path, where: str) -> None:
    """Check that a tensor's type, shape and bytes agree; external data must lie in the model's ``folder``."""
    shape = list(tensor.dims)
    if any(dim < 0 for dim in shape):
        raise InputError(f"its shape {shape} has a negative dimension", where=where)
    try:
        dtype = ir.DataType(tensor.data_type)
    except ValueError:
        raise InputError(f"its element type {tensor.data_type} is unknown", where=where) from None
    if dtype == ir.DataType.UNDEFINED:
        raise InputError("it has no element type", where=where)
    elements = math.prod(shape)
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        if dtype == ir.DataType.STRING:
            raise InputError("it is a string tensor with external data, which ONNX does not allow", where=where)
        _check_external(tensor, math.ceil(elements * dtype.bitwidth / 8), folder, where)
    elif tensor.HasField("raw_data"):
        expected = math.ceil(elements * dtype.bitwidth / 8) if dtype != ir.DataType.STRING else 0
        if len(tensor.raw_data) != expected:
            what = f"it holds {len(tensor.raw_data)} bytes where shape {shape} of {dtype} takes {expected}"
            raise InputError(what, where=where)
    else:
        # Sub-byte types are packed, one byte of elements to an int32; complex numbers are two floats.
        packed = {2: 4, 4: 2}.get(dtype.bitwidth, 1) if dtype != ir.DataType.STRING else 1
        pairs = 2 if dtype in (ir.DataType.COMPLEX64, ir.DataType.COMPLEX128) else 1
        expected = math.ceil(elements / packed) * pairs
        given = len(getattr(tensor, _FIELDS.get(dtype, "int32_data")))
        if given != expected:
            what = f"it holds {given} values where shape {shape} of {dtype} takes {expected}"
            raise InputError(what, where=where)


def _check_external(tensor: onnx.TensorProto, expected: int, folder: Path, where: str) -> None:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = Path(entries.get("location", ""))
    if not location.name:
        raise InputError("it names no external data file", where=where)
    if location.is_absolute() or ".." in location.parts:
        raise InputError(f"its external data '{location}' points outside the model's folder", where=where)
    path = folder / location
    if not path.is_file():
        raise InputError(f"its external data file '{location}' is missing", where=where, hint=f"put it into {folder}")
    if not os.access(path, os.R_OK):
        raise InputError(f"its external data file '{location}' cannot be read: permission denied", where=where)
    if not path.resolve().is_relative_to(folder):
        what = f"its external data '{location}' is a link that leaves the model's folder"
        raise InputError(what, where=where, hint="copy the file into the folder")
    if path.stat().st_nlink > 1:
        what = f"its external data '{location}' is a hard link, which may name a file outside the model's folder"
        raise InputError(what, where=where, hint="copy the file")
    try:
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", expected))
    except ValueError:
        raise InputError("the offset or length of its external data is not a number", where=where) from None
    if length != expected:
        shape, dtype = list(tensor.dims), ir.DataType(tensor.data_type)
        what = f"its external data holds {length} bytes where shape {shape} of {dtype} takes {expected}"
        raise InputError(what, where=where)
    missing = offset + length - path.stat().st_size
    if offset < 0 or missing > 0:
        short = f"ends {missing} bytes before the tensor does" if missing > 0 else f"begins at byte {offset}"
        raise InputError(f"its external data {short}", where=where)
