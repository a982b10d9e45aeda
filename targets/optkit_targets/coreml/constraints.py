"""What the Neural Engine asks of every node. The docstring of each constraint is the sentence the user reads.

Apple documents none of it ("it changes based on device generation, operating system version, tensor sizes",
apple/coremltools#1780), and Core ML decides anew on each device. What stands here was measured or read out of Apple's
compiler by others; each constraint names them. Where they contradict each other, what was measured goes before what was
decoded, and what is newer before what is older; `REJECTED` names what is not held against a node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from optkit.graph import bodies, is_constant, is_unused, static_shape
from optkit_targets.coreml.limits import Limits

SOURCES = {
    "ane-guide 4": "sbryngelson/ane-guide, part-1-machine/04-capability-surface.md@b7565c53c18e (arXiv 2606.22283: one "
    "author's reverse engineering, not replicated; measured on M1, M2 and M5, decoded elsewhere)",
    "ane-guide 12": "the same, part-3-performance/12-cross-chip.md@9eb1afe95cdc",
    "ane-guide 19": "the same, part-5-practice/19-pitfalls-and-limits.md@b7565c53c18e",
    "ane-guide A": "the same, appendices/a-op-device-matrix.md@b7565c53c18e",
    "hollance": "hollance/neural-engine, docs/unsupported-layers.md@06a7632ebb14 (2019 to 2021, partly guesses)",
    "coremltools#1780": "an engineer of Apple in apple/coremltools, issue 1780: RNN and LSTM are not supported",
    "coremltools#1103": "apple/coremltools, issue 1103: gather takes as long on the CPU alone",
    "typed execution": "apple/coremltools, docs-guides/source/typed-execution-example.md@3efcfca79b88",
    "flexible inputs": "apple/coremltools, docs-guides/source/flexible-inputs.md@c9855b4ed22e: a hint for the loader "
    "can allow models with flexible shapes on the Neural Engine",
    "ane-transformers": "apple/ml-ane-transformers, README.md@2050f58a518f: of 606 operations the 4 of the embedding "
    "lookup are executed on the CPU",
}
REJECTED = {
    "dilated convolutions (hollance)": "they compile on the M1 (ane-guide 4)",
    "broadcasting and operators of any rank (hollance)": "said of the layers of 2019, not of ML programs; ane-guide A "
    "has the elementwise operators on every generation",
    "pooling windows above 13, strides above 2, upsampling by more than 2": "said before ane-guide A, which has "
    "windows of up to 29",
    "reductions and softmax over 192 elements or more (ane-guide A)": "they take another route, with the same result",
    "wider kernels in formats other than fp16 (ane-guide A: 29 and 32)": "no source says when Core ML uses them",
    "programs too small to be worth a dispatch": "Core ML leaves a product of 4 x 4 to the CPU (vx-lang/Vx#436); no "
    "source gives the size from which it does not",
}

INTEGERS = frozenset(
    {
        ir.DataType.INT16,
        ir.DataType.UINT16,
        ir.DataType.INT32,
        ir.DataType.UINT32,
        ir.DataType.INT64,
        ir.DataType.UINT64,
    }
)
# Their indices, read or returned, are held to constraints of their own.
INDEXED = frozenset({"Gather", "GatherND", "GatherElements", "TopK", "ArgMax", "ArgMin"})


@dataclass(frozen=True)
class Engine:
    """What a constraint sees besides the node.

    Attributes:
        limits: Of the target's generation.
        half: Whether the packager turns every float into fp16.
        main: The graph outside of all bodies.
    """

    limits: Limits
    half: bool
    main: ir.Graph

    @property
    def generation(self) -> int:
        """The engine's generation."""
        return int(self.limits.generation.value)


Check = Callable[[ir.Node, Engine], str]


@dataclass(frozen=True)
class Constraint:
    """A rule: a function that returns what a node has instead, or nothing, and who says that it holds."""

    check: Check
    sources: tuple[str, ...]

    @property
    def sentence(self) -> str:
        """What the rule asks for."""
        return " ".join((self.check.__doc__ or "").split()).rstrip(".")


def says(*sources: str) -> Callable[[Check], Constraint]:
    """Turn a function into a constraint with its sources, keys of `SOURCES`."""
    return lambda check: Constraint(check, sources)


@says("ane-guide A")
def body(node: ir.Node, engine: Engine) -> str:
    """Nodes with bodies, and the nodes in them, have no code on the engine."""
    if bodies(node):
        return f"{node.op_type} has a body"
    return "" if node.graph is engine.main else "in a body"


@says("typed execution", "ane-guide 4")
def float32(node: ir.Node, engine: Engine) -> str:
    """Floats must be computed in fp16: what is kept in float32 is for the CPU and GPU."""
    if engine.half or node.op_type == "Cast":
        return ""
    kept = next((value.name for value in activations(node) if value.dtype == ir.DataType.FLOAT), None)
    return "" if kept is None else f"'{kept}' is float32"


@says("ane-guide 4", "ane-guide 19", "flexible inputs")
def shapes(node: ir.Node, engine: Engine) -> str:
    """All dimensions must be known, and none may be 0."""
    for value in values(node):
        shape = static_shape(value)
        if shape is None:
            return f"'{value.name}' has an open shape"
        if 0 in shape and not is_constant(value):
            return f"'{value.name}' is empty"
    return ""


@says("ane-guide 4")
def types(node: ir.Node, engine: Engine) -> str:
    """What a run computes must be floats or flags: the engine has no arithmetic on integers, nor casts to them."""
    checked = [value for value in node.inputs[:1] if value is not None and not is_constant(value)]
    for value in checked if node.op_type in INDEXED else activations(node):
        if value.dtype in INTEGERS:
            return f"'{value.name}' is {value.dtype.name.lower()}"
    return ""


@says("ane-guide 4", "ane-guide A")
def rank(node: ir.Node, engine: Engine) -> str:
    """No tensor may have more dimensions than the engine has axes."""
    most = int(engine.limits.max_rank.value)
    for value in activations(node):
        shape = static_shape(value)
        if shape is not None and len(shape) > most:
            return f"'{value.name}' has {len(shape)} dimensions, at most {most}"
    return ""


@says("ane-guide 4", "ane-guide 12", "ane-guide A")
def dimensions(node: ir.Node, engine: Engine) -> str:
    """No axis may be longer than the engine addresses; that of channels, third from the end of four, may be longer."""
    for value in activations(node):
        if value.dtype in INTEGERS:
            continue
        for axis, length in enumerate(static_shape(value) or ()):
            most = _longest(axis, len(value.shape or ()), engine.limits)
            if length > most:
                return f"axis {axis} of '{value.name}' has {length} elements, at most {most}"
    return ""


def _longest(axis: int, axes: int, limits: Limits) -> int:
    """Return how long an axis may be; the compiler's order is batch, depth, channels, height, width."""
    if axes >= 4 and axis == axes - 3:
        return int(limits.max_channels.value)
    return int((limits.max_batch if axes >= 4 and axis == 0 else limits.max_dimension).value)


GENERAL: tuple[Constraint, ...] = (body, float32, shapes, types, rank, dimensions)


def violation(node: ir.Node, engine: Engine, constraints: Sequence[Constraint]) -> str:
    """Return the sentence of the first constraint that a node violates, what it has instead, and who says so."""
    for constraint in constraints:
        if found := constraint.check(node, engine):
            return f"{constraint.sentence} ({found}) [{', '.join(constraint.sources)}]"
    return ""


def values(node: ir.Node) -> Iterator[ir.Value]:
    """Return what a node reads, and what it writes that anything uses."""
    used = (value for value in node.outputs if not is_unused(value))
    return (value for value in (*node.inputs, *used) if value is not None and value.name)


def activations(node: ir.Node) -> Iterator[ir.Value]:
    """Return what a node reads and writes of what a run computes or is fed."""
    return (value for value in values(node) if not is_constant(value))
