"""Write paddings that HTP does not compute as slices and concatenations."""

from __future__ import annotations

import onnx_ir as ir

from optkit import Context, Pass
from optkit.graph import argument, constant, ints, prune
from optkit_targets.rewriting import RefusedError, Writer, apply


class LowerPads(Pass):
    """Write ``Pad`` with mode ``edge`` or ``wrap`` as ``Slice``, ``Tile`` and ``Concat``, and its axes into its pads.

    HTP takes ``edge`` and returns other numbers (onnxruntime-qnn 2.7: 86 dB of noise above the signal, in three and
    four dimensions); ``wrap``, and the input ``axes`` of opset 18, send the node to the CPU. ``constant`` and
    ``reflect`` are right.
    """

    def run(self, model: ir.Model, context: Context) -> None:
        """Rewrite pad by pad, bodies included."""
        apply({"Pad": _lower}, model, context)


def _lower(node: ir.Node, writer: Writer) -> str | None:
    x, mode = argument(node, 0), node.attributes.get_string("mode", "constant")
    has_axes = argument(node, 3) is not None
    if x is None or (mode not in ("edge", "wrap") and not has_axes):
        return None
    if x.shape is None:
        raise RefusedError("the rank of its input is not known")
    pads = _all_pads(node, len(x.shape))
    if mode in ("edge", "wrap"):
        return _concatenate(node, writer, x, pads, mode)
    old = [argument(node, 1), argument(node, 3)]
    node.replace_input_with(1, writer.ints("pads", [pad for side in zip(*pads, strict=True) for pad in side]))
    node.resize_inputs(3 if argument(node, 2) is not None else 2)
    prune(old)
    return "its axes are written into its pads"


def _all_pads(node: ir.Node, rank: int) -> list[tuple[int, int]]:
    """Return how much is added before and after on every axis."""
    given = ints(node, "pads", 1)
    axes = constant(argument(node, 3))
    if given is None or (axes is None and argument(node, 3) is not None):
        raise RefusedError("its pads are computed at run time")
    places = list(range(rank)) if axes is None else [int(axis) % rank for axis in axes.ravel()]
    found = [(0, 0)] * rank
    for place, before, after in zip(places, given[: len(places)], given[len(places) :], strict=True):
        found[place] = (before, after)
    return found


def _concatenate(node: ir.Node, writer: Writer, x: ir.Value, pads: list[tuple[int, int]], mode: str) -> str:
    assert x.shape is not None
    for axis, (before, after) in enumerate(pads):
        dim = x.shape[axis]
        if before < 0 or after < 0:
            raise RefusedError("negative pads crop it")
        if (before or after) and not isinstance(dim, int):
            raise RefusedError(f"axis {axis} has no fixed size")
        if mode == "wrap" and isinstance(dim, int) and max(before, after) > dim:
            raise RefusedError(f"it wraps around axis {axis} more than once")
    if not any(before or after for before, after in pads):
        return _same(node, writer, x)
    value = x
    for axis, (before, after) in enumerate(pads):
        dim = x.shape[axis]
        if isinstance(dim, int) and mode == "wrap":
            head = [_slice(writer, value, axis, dim - before, dim)] if before else []
            tail = [_slice(writer, value, axis, 0, after)] if after else []
        elif isinstance(dim, int):
            head = [_repeat(writer, _slice(writer, value, axis, 0, 1), axis, before, len(pads))] if before else []
            tail = [_repeat(writer, _slice(writer, value, axis, dim - 1, dim), axis, after, len(pads))] if after else []
        if before or after:
            value = writer.add("Concat", *head, value, *tail, axis=axis)
    writer.replace(value)
    return f"mode '{mode}' is written as slices and concatenations"


def _same(node: ir.Node, writer: Writer, x: ir.Value) -> str:
    writer.replace(writer.add("Identity", x))
    return "it adds nothing"


def _slice(writer: Writer, value: ir.Value, axis: int, start: int, end: int) -> ir.Value:
    bounds = [writer.ints(name, [number]) for name, number in (("start", start), ("end", end), ("axis", axis))]
    return writer.add("Slice", value, *bounds)


def _repeat(writer: Writer, value: ir.Value, axis: int, times: int, rank: int) -> ir.Value:
    if times == 1:
        return value
    return writer.add("Tile", value, writer.ints("repeats", [times if place == axis else 1 for place in range(rank)]))
