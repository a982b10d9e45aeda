"""The README of a package for Snapdragon, and the configuration files that Qualcomm's own tools want for the same SoC.

The lines that load the package follow docs/execution_providers/QNN-ExecutionProvider.md of onnxruntime-qnn, those of
Qualcomm's tools its QNN SDK; the HTP's configuration is what libQnnHtpNetRunExtensions of SDK 2.51 validates.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

CPP_TYPES = {
    "bool": "bool",
    "float16": "Ort::Float16_t",
    "bfloat16": "Ort::BFloat16_t",
    "float32": "float",
    "float64": "double",
    **{f"{sign}int{bits}": f"{sign}int{bits}_t" for sign in ("", "u") for bits in (8, 16, 32, 64)},
}
EXTENSIONS = "libQnnHtpNetRunExtensions.so"


@dataclass(frozen=True)
class ContextFiles:
    """What a package holds for one SoC.

    Attributes:
        target: The target's name in optkit (``snapdragon-8gen3-npu``).
        chip: The SoC in words (``Snapdragon 8 Gen 3 (SM8650)``), or empty.
        soc_model: Qualcomm's number of it.
        htp_arch: Version of its Hexagon (75 is v75).
        load: The ONNX file that onnxruntime loads: the wrapper of a context binary, or the model itself.
        binaries: The context binaries beside a wrapper, which it refers to; none where the device compiles the model.
        whole: Whether the NPU runs the whole model; else onnxruntime runs the rest on the CPU.
    """

    target: str
    soc_model: int
    htp_arch: int
    load: str
    binaries: tuple[str, ...] = ()
    chip: str = ""
    whole: bool = True


@dataclass(frozen=True)
class PackageFiles:
    """What the README describes; every path is relative to the package.

    Attributes:
        name: What to call the model.
        contexts: What there is for each SoC; at least one.
        model: The quantized ONNX model that they were compiled from, for every other chip.
        interface: The model's inputs and outputs, from `optkit_targets.qnn.interface.interface`.
        sdk: Version of the QNN SDK that compiled (``2.51.0``), or empty.
    """

    name: str
    contexts: tuple[ContextFiles, ...]
    model: str
    interface: Mapping[str, Any]
    sdk: str = ""


def readme(package: PackageFiles) -> str:
    """Return the package's README in Markdown; the same text for the same package."""
    environment = Environment(
        loader=PackageLoader("optkit_targets.qnn", "templates"),
        autoescape=False,  # the output is Markdown: what comes from a model goes through `code` or a literal
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    environment.filters.update(
        code=code,
        literal=literal,
        shell=shlex.quote,
        cell=_cell,
        shape=_shape,
        grid=_grid,
        base=lambda path: PurePosixPath(path).name,
    )
    edges = package.interface["inputs"]
    return environment.get_template("README.md.j2").render(
        package=package,
        first=package.contexts[0],
        compiled=any(context.binaries for context in package.contexts),
        newer=f" ({package.sdk} or newer)" if package.sdk else "",
        architectures=sorted({context.htp_arch for context in package.contexts}),
        python_feeds=[(edge["name"], _numpy_zeros(edge)) for edge in edges],
        cpp_feeds=[(edge["name"], _cpp_type(edge), _static(edge)) for edge in edges],
        input_list=" ".join(f"{_visible(edge['name'])}:=input_{index}.raw" for index, edge in enumerate(edges)),
        floats=all(edge["dtype"] == "float32" for edge in edges),  # qnn-throughput-net-run reads float32 files
        htp_config=htp_config,
        generator_config=generator_config,
        throughput_config=throughput_config,
    )


def htp_config(
    soc_model: int,
    htp_arch: int,
    *,
    graph_names: Sequence[str] = (),
    vtcm_mb: int | None = None,
    optimization_level: int | None = None,
) -> str:
    """Return the HTP back end's configuration file for an SoC, as JSON text.

    Args:
        soc_model: Qualcomm's number of the SoC.
        htp_arch: Version of its Hexagon.
        graph_names: The graphs that the two settings below are for; without one, neither is written.
        vtcm_mb: Tightly coupled memory to compile for.
        optimization_level: The compiler's effort, 1 to 3.
    """
    settings = {"O": optimization_level, "vtcm_mb": vtcm_mb}
    chosen = {key: value for key, value in settings.items() if value is not None}
    graphs = [{"graph_names": list(graph_names), **chosen}] if graph_names and chosen else []
    devices = [{"dsp_arch": f"v{htp_arch}", "soc_model": soc_model}]
    return _json({"devices": devices, **({"graphs": graphs} if graphs else {})})


def generator_config(htp_config_path: str) -> str:
    """Return what ``--config_file`` of Qualcomm's tools takes: the extension library and the file of `htp_config`."""
    return _json({"backend_extensions": {"config_file_path": htp_config_path, "shared_library_path": EXTENSIONS}})


def throughput_config(binary: str, input_list: str, *, seconds: int = 10) -> str:
    """Return the configuration of ``qnn-throughput-net-run`` that runs one context binary in a loop, as JSON text."""
    model = {
        "modelName": "model",
        "modelPath": binary,
        "loadFromCachedBinary": True,
        "inputPath": input_list,
        "inputDataType": "FLOAT",
        "outputPath": "throughput",
        "outputDataType": "FLOAT_ONLY",
        "saveOutput": "NONE",
    }
    backend = {
        "backendName": "htp",
        "backendPath": "libQnnHtp.so",
        "backendExtensions": EXTENSIONS,
        "perfProfile": "burst",
        "profilingLevel": "OFF",
    }
    thread = {"threadName": "first", "backend": "htp", "context": "context", "model": "model"}
    loop = {"interval": 0, "loopUnit": "second", "loop": seconds}
    return _json(
        {
            "backends": [backend],
            "models": [model],
            "contexts": [{"contextName": "context"}],
            "testCase": {"iteration": 1, "threads": [{**thread, **loop}]},
        }
    )


def code(text: object) -> str:
    """Return untrusted text as a code span that neither ends early nor leaves its table cell."""
    visible = _cell(text).replace("`", "'")
    return f"`{visible}`" if visible else "(no name)"


def literal(text: object) -> str:
    """Return text as a string literal that Python and C++ read alike."""
    return json.dumps(str(text))


def _visible(text: object) -> str:
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text))


def _cell(text: object) -> str:
    """Return text that does not leave its table cell."""
    return _visible(text).replace("|", "\\|")


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def _static(edge: Mapping[str, Any]) -> list[int]:
    """Return an edge's shape; 1 stands for what is not known."""
    return [dim if isinstance(dim, int) else 1 for dim in edge["shape"] or []]


def _shape(edge: Mapping[str, Any]) -> str:
    if edge["shape"] is None:
        return "unknown"
    return " x ".join("?" if dim is None else str(dim) for dim in edge["shape"]) or "scalar"


def _numpy_zeros(edge: Mapping[str, Any]) -> str:
    shape = _static(edge)
    size = f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"
    dtype = edge["dtype"] if edge["dtype"] in CPP_TYPES else "float32"
    return f"np.zeros({size}, np.{'bool_' if dtype == 'bool' else dtype})"


def _cpp_type(edge: Mapping[str, Any]) -> str:
    return CPP_TYPES.get(edge["dtype"], "float")


def _grid(edge: Mapping[str, Any]) -> str:
    """Return the integer grid that an edge's values end on, with the range that it holds."""
    grid = edge["quantization"]
    if grid is None:
        return "not quantized"
    bits = int("".join(filter(str.isdigit, grid["dtype"])) or 0)
    text = f"{grid['dtype']}, scale {grid['scale']!r}, zero point {grid['zero_point']}"
    if not grid["dtype"].lstrip("u").startswith("int") or not bits:
        return text
    lowest = 0 if grid["dtype"].startswith("u") else -(2 ** (bits - 1))
    low, high = ((q - grid["zero_point"]) * grid["scale"] for q in (lowest, lowest + 2**bits - 1))
    return f"{text}: {low:.4g} to {high:.4g}" if math.isfinite(low) and math.isfinite(high) else text
