"""What a QNN context binary says about itself, read through libQnnSystem, and what its compiler spent its time on.

Call `read_binary` in a child process: a library of another SDK may lay its structures out otherwise, and a wrong
pointer ends the process that follows it. Whatever carries a version that is not known here is left out, with a note.
"""

from __future__ import annotations

import csv
import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optkit.errors import InputError
from optkit_targets.qnn import binary_layout as layout

MOST_GRAPHS, MOST_EDGES, MOST_DIMS = 1024, 4096, 16  # more than that is a misread structure
MEGABYTE = 2**20


@dataclass(frozen=True)
class Edge:
    """An input or output of a graph in a context binary.

    Attributes:
        name: Its name.
        dtype: QNN's data type (``float32``; ``ufixed8`` is an unsigned byte with a scale).
        shape: Its dimensions.
        scale: Step of the quantization, where one scale holds for the whole tensor.
        zero_point: The integer that stands for zero, in ONNX's sense: real = scale * (q - zero_point).
    """

    name: str
    dtype: str | None
    shape: tuple[int, ...] | None
    scale: float | None = None
    zero_point: int | None = None


@dataclass(frozen=True)
class GraphFacts:
    """One graph in a context binary; what is None is not in it or not known how to read.

    Attributes:
        name: The graph's name.
        inputs: What an application writes.
        outputs: What it reads.
        vtcm_bytes: Tightly coupled memory that the graph was compiled for.
        spill_fill_bytes: Main memory for activations that do not fit into it; 0 where all fit.
        optimization_level: The compiler's effort, 1 to 3.
        hvx_threads: Vector threads asked for; 0 leaves it to the runtime.
        dlbc: Whether activations in main memory are compressed (deep learning bandwidth compression).
        io_bytes: Main memory for inputs and outputs.
        constant_bytes: Main memory for weights and other constants.
        op_data_bytes: Main memory for the operators' own records.
        ddr_tensor_bytes: Main memory for other tensors.
    """

    name: str
    inputs: tuple[Edge, ...]
    outputs: tuple[Edge, ...]
    vtcm_bytes: int | None = None
    spill_fill_bytes: int | None = None
    optimization_level: int | None = None
    hvx_threads: int | None = None
    dlbc: bool | None = None
    io_bytes: int | None = None
    constant_bytes: int | None = None
    op_data_bytes: int | None = None
    ddr_tensor_bytes: int | None = None


@dataclass(frozen=True)
class BinaryFacts:
    """A context binary's description of itself; the same for the same bytes.

    Attributes:
        sdk: Build of the QNN SDK that wrote it (``v2.51.0.260929181845``).
        core_api: Version of QNN's interface (``2.40.0``).
        backend_api: Version of the back end's own interface.
        backend: Number of the back end; 6 is the HTP.
        soc_model: Number of the SoC it was compiled for; 0 where none was named.
        dsp_arch: Version of that SoC's Hexagon (75 is v75).
        blob_bytes: Size of the compiled graphs, without this description.
        graphs: The graphs in it.
        notes: What could not be read, and why.
    """

    sdk: str | None
    core_api: str | None
    backend_api: str | None
    backend: int | None
    soc_model: int | None
    dsp_arch: int | None
    blob_bytes: int | None
    graphs: tuple[GraphFacts, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class CompileStage:
    """One stage of the HTP's compiler: its name, its wall time and the share of the whole."""

    name: str
    seconds: float
    share: float


def read_binary(library: Path, binary: Path) -> BinaryFacts:
    """Return what a context binary says about itself.

    Args:
        library: Qualcomm's ``libQnnSystem.so``.
        binary: The context binary.

    Raises:
        InputError: The library cannot be loaded or offers another interface, or refuses the file as a context binary.
    """
    try:
        content = binary.read_bytes()
        system = ctypes.CDLL(str(library))
        providers_of = system.QnnSystemInterface_getProviders
    except (OSError, AttributeError) as error:
        raise InputError(f"the context binary cannot be described: {error}", where=str(binary)) from error
    provider = _provider(providers_of, library)
    handle = ctypes.c_void_p()
    if provider.context_create(ctypes.byref(handle)):
        raise InputError("libQnnSystem creates no system context", where=str(library))
    try:
        described = ctypes.POINTER(layout.Binary)()
        status = provider.context_get_metadata(handle, content, len(content), ctypes.byref(described))
        if status or not described:
            raise InputError(
                f"the file is no context binary that this QNN SDK reads (error {status & 0xFFFF})", where=str(binary)
            )
        return facts(described.contents)  # copied out: the library owns what it points to
    finally:
        provider.context_free(handle)


def _provider(providers_of: Callable[..., int], library: Path) -> layout.Provider:
    """Return the library's table of functions.

    Raises:
        InputError: It offers none of the known major version.
    """
    found = ctypes.POINTER(ctypes.POINTER(layout.Provider))()
    count = ctypes.c_uint32()
    status = providers_of(ctypes.byref(found), ctypes.byref(count))
    offered: list[layout.Provider] = [found[i].contents for i in range(count.value)] if found and not status else []
    for provider in offered:
        complete = provider.context_create and provider.context_get_metadata and provider.context_free
        if provider.api.major == layout.SYSTEM_API_MAJOR and complete:
            return provider
    versions = ", ".join(str(provider.api) for provider in offered) or "none"
    raise InputError(
        f"libQnnSystem offers no interface of version {layout.SYSTEM_API_MAJOR}.x (it offers {versions})",
        where=str(library),
        hint="read the context binary with the onnxruntime-qnn that wrote it",
    )


def facts(binary: layout.Binary) -> BinaryFacts:
    """Return the facts in a structure that libQnnSystem filled in."""
    if binary.version != layout.BINARY_VERSION:
        note = f"the description has version {binary.version}; only version {layout.BINARY_VERSION} is read"
        return BinaryFacts(None, None, None, None, None, None, None, (), (note,))
    notes: list[str] = []
    backend = binary.backend & 0xFFFFFFFF
    htp = backend == layout.HTP_BACKEND
    if not htp:
        notes.append(f"back end {backend} is not the HTP: what it keeps about graphs is not read")
    context = _blob(layout.HtpContext, binary.metadata, binary.metadata_bytes, notes, "the context") if htp else None
    return BinaryFacts(
        sdk=_text(binary.build_id),
        core_api=str(binary.core_api),
        backend_api=str(binary.backend_api),
        backend=backend,
        soc_model=binary.soc_model,
        dsp_arch=context.dsp_arch if context else None,
        blob_bytes=binary.blob_bytes,
        graphs=tuple(_graphs(binary, htp, notes)),
        notes=tuple(notes),
    )


def _graphs(binary: layout.Binary, htp: bool, notes: list[str]) -> list[GraphFacts]:
    if not binary.graphs or binary.graph_count > MOST_GRAPHS:
        notes.append(f"no list of graphs ({binary.graph_count} are announced)")
        return []
    read = []
    for index in range(binary.graph_count):
        graph = binary.graphs[index]
        if graph.version != layout.GRAPH_VERSION:
            # Another version may have another size: the graphs behind it are out of reach too.
            notes.append(f"graph {index} has version {graph.version}; only version {layout.GRAPH_VERSION} is read")
            break
        name = _text(graph.name) or f"graph {index}"
        read.append(
            GraphFacts(
                name,
                _edges(graph.inputs, graph.input_count, notes, f"inputs of '{name}'"),
                _edges(graph.outputs, graph.output_count, notes, f"outputs of '{name}'"),
                **(_compiled(graph, name, notes) if htp else {}),
            )
        )
    return read


def _compiled(graph: layout.Graph, name: str, notes: list[str]) -> dict[str, Any]:
    """Return how the HTP compiled a graph, as fields of `GraphFacts`."""
    blob = _blob(layout.HtpGraph, graph.blob, graph.blob_bytes, notes, f"'{name}'")
    if blob is None:
        return {}
    compiled = {
        # No HTP has a kilobyte of VTCM or a gigabyte: a small number is in MB, as older SDKs wrote it.
        "vtcm_bytes": blob.vtcm * MEGABYTE if blob.vtcm < 1024 else blob.vtcm,
        "spill_fill_bytes": blob.spill_fill_bytes,
        "optimization_level": blob.optimization_level,
        "hvx_threads": blob.hvx_threads,
        "dlbc": bool(blob.dlbc),
    }
    behind = ctypes.sizeof(layout.HtpGraph)
    if graph.blob_bytes == behind + ctypes.sizeof(layout.HtpGraphMemory):
        memory = ctypes.cast(graph.blob + behind, ctypes.POINTER(layout.HtpGraphMemory)).contents
        if memory.version == layout.MEMORY_VERSION:
            fields = ("io_bytes", "constant_bytes", "op_data_bytes", "ddr_tensor_bytes")
            compiled.update({field: getattr(memory, field) for field in fields})
            return compiled
    if graph.blob_bytes > behind:
        notes.append(f"what the HTP keeps about the memory of '{name}' has an unknown form")
    return compiled


def _blob(structure: type[Any], address: int | None, size: int, notes: list[str], of: str) -> Any:
    """Return what the HTP keeps about a graph or context, or None where it is absent or of an unknown version."""
    if not address or size < ctypes.sizeof(structure):
        notes.append(f"the HTP keeps nothing about {of}")
        return None
    blob = ctypes.cast(address, ctypes.POINTER(structure)).contents
    if blob.version != layout.BLOB_VERSION:
        notes.append(f"what the HTP keeps about {of} has version {blob.version}; only {layout.BLOB_VERSION} is read")
        return None
    return blob


def _edges(tensors: Any, count: int, notes: list[str], of: str) -> tuple[Edge, ...]:
    if (count and not tensors) or count > MOST_EDGES:
        notes.append(f"no list of the {of} ({count} are announced)")
        return ()
    read = []
    for index in range(count):
        tensor = tensors[index]
        if tensor.version not in layout.TENSOR_VERSIONS:
            notes.append(f"tensor {index} of the {of} has version {tensor.version}, which is not read")
            break
        read.append(_edge(tensor, index))
    return tuple(read)


def _edge(tensor: layout.Tensor, index: int) -> Edge:
    readable = tensor.rank == 0 or (tensor.rank <= MOST_DIMS and bool(tensor.dimensions))
    shape = tuple(tensor.dimensions[axis] for axis in range(tensor.rank)) if readable else None
    name, dtype = _text(tensor.name) or f"tensor {index}", layout.DATA_TYPES.get(tensor.data_type)
    quantized = tensor.quantize_params
    if (quantized.definition, quantized.encoding) != (layout.DEFINED, layout.SCALE_OFFSET):
        return Edge(name, dtype, shape)
    encoding = quantized.of.scale_offset
    return Edge(name, dtype, shape, encoding.scale, -encoding.offset)  # QNN adds its offset


def _text(content: bytes | None) -> str | None:
    return content.decode("utf-8", errors="replace") if content else None


def compile_stages(profile_csv: Path) -> tuple[CompileStage, ...]:
    """Return what the HTP's compiler spent its time on, from the profile that the execution provider writes.

    The times are wall time of this machine: for a log, never for a package. Several graphs in one profile are summed.
    What the stages leave of the whole has no name in the profile.

    Returns:
        The stages in the compiler's order; none where the profile holds no compilation.

    Raises:
        InputError: The file cannot be read, or is no such profile.
    """
    try:
        with profile_csv.open(encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream))
        return _stages(rows)
    except (OSError, UnicodeDecodeError, csv.Error, KeyError, TypeError, ValueError) as error:
        raise InputError("the file is no profile of the QNN execution provider", where=str(profile_csv)) from error


def _stages(rows: Sequence[dict[str, str]]) -> tuple[CompileStage, ...]:
    whole, compiling, seconds = 0.0, False, dict[str, float]()
    for row in rows:
        if row["Event Level"] == "ROOT":
            compiling = row["Message"] == "FINALIZE"
        if not compiling or row["Unit of Measurement"] != "US":
            continue
        spent = int(row["Time"]) * 1e-6
        if row["Event Level"] == "ROOT":
            whole += spent
        else:
            seconds[row["Event Identifier"]] = seconds.get(row["Event Identifier"], 0.0) + spent
    return tuple(CompileStage(name, spent, spent / whole if whole else 0.0) for name, spent in seconds.items())
