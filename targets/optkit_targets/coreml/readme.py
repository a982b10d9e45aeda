"""The README of a Core ML package: its inputs and outputs, and the lines of Swift and Python that load it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import onnx_ir as ir
from jinja2 import Environment, PackageLoader, StrictUndefined

from optkit.model.loading import graph_inputs
from optkit_targets.coreml.lowering.scope import identifier

# Core ML's multi-arrays: element type in Swift and in NumPy.
ARRAYS = {"FLOAT": ("float32", "float32"), "FLOAT16": ("float16", "float16"), "DOUBLE": ("float32", "float32")}
INTEGERS = ("int32", "int32")
# What is said of the types in which floats are computed.
COMPUTING = {
    (): "It computes no floats.",
    ("float16",): "It computes floats in float16.",
    (
        "float32",
    ): "It computes floats in float32, which the Neural Engine does not: Core ML runs it on the CPU and the GPU.",
    ("float16", "float32"): "It computes floats in float16, but in float32 what float16 would spoil: the Neural Engine "
    "has no float32, so that this runs beside it.",
}


@dataclass(frozen=True)
class _Edge:
    """An input or output, under the package's name and the network's."""

    name: str
    original: str
    dims: tuple[int | str, ...]
    swift: str
    numpy: str
    image: bool

    @property
    def shape(self) -> str:
        return " x ".join(map(str, self.dims)) or "scalar"

    @property
    def type(self) -> str:
        return "image" if self.image else self.numpy

    @property
    def variable(self) -> str:
        return f"{self.name}Value"


def readme(
    model: ir.Model,
    *,
    chip: str,
    entry: str,
    deployment: int,
    macos: str,
    floats: Sequence[str],
    images: Collection[str] = (),
    labels: bool = False,
) -> str:
    """Return the README in Markdown; the same text for the same package.

    Args:
        model: The network.
        chip: The target in words.
        entry: The package's file name.
        deployment: The number of the iOS that it needs.
        macos: The macOS of the same year.
        floats: The types in which floats are computed: float16, float32, both or none.
        images: Inputs that take images.
        labels: Whether it is a classifier with labels.
    """
    environment = Environment(
        loader=PackageLoader("optkit_targets.coreml", "templates"),
        autoescape=False,  # the output is Markdown; names in it are Core ML's identifiers, or shown in code spans
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    inputs = [_edge(value, images, scalar=(1,)) for value in graph_inputs(model)]
    outputs = [_edge(value, ()) for value in model.graph.outputs]
    return environment.get_template("README.md.j2").render(
        chip=chip,
        entry=entry,
        deployment=deployment,
        macos=macos,
        computing=COMPUTING[tuple(floats)],
        engine="float16" in floats,
        inputs=inputs,
        outputs=outputs,
        labels=labels,
        renamed=any(edge.name != edge.original for edge in (*inputs, *outputs)),
    )


def _edge(value: ir.Value, images: Collection[str], scalar: tuple[int, ...] = ()) -> _Edge:
    original = value.name or ""
    swift, numpy = ARRAYS.get(value.dtype.name if value.dtype is not None else "FLOAT", INTEGERS)
    dims = tuple(dim if isinstance(dim, int) else 1 for dim in value.shape or ()) or scalar
    visible = "".join(c if c.isprintable() and c not in "`|" else "?" for c in original)
    name = identifier(original)
    return _Edge(name, visible if name != original else name, dims, swift, numpy, name in images)
