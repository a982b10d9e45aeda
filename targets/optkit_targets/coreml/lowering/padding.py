"""Explicit pads: what ``pads``, ``auto_pad`` and ``ceil_mode`` come to for windows of known sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from optkit_targets.coreml.lowering.scope import CannotLower, Scope

SAME = ("SAME_UPPER", "SAME_LOWER")


@dataclass(frozen=True)
class Windows:
    """How windows move over the spatial axes of a tensor.

    Attributes:
        lengths: The tensor's spatial dimensions.
        kernel: Elements of a window along each axis.
        strides: The step from one window to the next.
        dilations: The step from one element to the next.
        begins: Elements of padding in front.
        ends: Elements of padding behind, as the node gives them.
        ceil: Whether a last window may reach beyond the padding.
    """

    lengths: tuple[int, ...]
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begins: tuple[int, ...]
    ends: tuple[int, ...]
    ceil: bool = False

    @property
    def spans(self) -> tuple[int, ...]:
        """Elements from a window's first to its last, along each axis."""
        return tuple((size - 1) * step + 1 for size, step in zip(self.kernel, self.dilations, strict=True))

    @property
    def counts(self) -> tuple[int, ...]:
        """The number of windows along each axis; with ``ceil``, one that would begin behind the tensor is none."""
        return tuple(self._count(axis) for axis in range(len(self.kernel)))

    def _count(self, axis: int) -> int:
        room = self.lengths[axis] + self.begins[axis] + self.ends[axis] - self.spans[axis]
        if not self.ceil:
            return room // self.strides[axis] + 1
        count = -(-room // self.strides[axis]) + 1
        return count - ((count - 1) * self.strides[axis] >= self.lengths[axis] + self.begins[axis])

    @property
    def reaches(self) -> tuple[int, ...]:
        """Elements of padding behind with which the count, rounded down, is ours: what the last window needs."""
        if not self.ceil:
            return self.ends
        lasts = [(count - 1) * step for count, step in zip(self.counts, self.strides, strict=True)]
        rooms = [begin + length for begin, length in zip(self.begins, self.lengths, strict=True)]
        return tuple(max(last + span - room, 0) for last, span, room in zip(lasts, self.spans, rooms, strict=True))

    @property
    def mil_pads(self) -> list[int]:
        """Pads as MIL orders them: begin and end of one axis after the other."""
        pairs = zip(self.begins, self.reaches, strict=True)
        return [amount for pair in pairs for amount in pair]


def windows(scope: Scope, node: ir.Node, lengths: tuple[int, ...], kernel: Sequence[int]) -> Windows:
    """Return how a convolution's or a pooling's windows move.

    Args:
        scope: The program being written.
        node: The node.
        lengths: The input's spatial dimensions.
        kernel: The window's size.

    Raises:
        CannotLower: A pad is negative.
    """
    axes = len(lengths)
    strides = scope.ints(node, "strides", [1] * axes) or []
    dilations = scope.ints(node, "dilations", [1] * axes) or []
    pads = scope.ints(node, "pads", [0] * 2 * axes) or []
    automatic = node.attributes.get_string("auto_pad", "NOTSET")
    if automatic in SAME:
        spans = [(size - 1) * step + 1 for size, step in zip(kernel, dilations, strict=True)]
        totals = [
            max((-(-length // step) - 1) * step + span - length, 0)
            for length, step, span in zip(lengths, strides, spans, strict=True)
        ]
        pads = split(totals, more_in_front=automatic == "SAME_LOWER")
    elif automatic == "VALID":
        pads = [0] * 2 * axes
    if min(pads, default=0) < 0:
        raise CannotLower("a pad is negative: it cuts the input")
    ceil = bool(node.attributes.get_int("ceil_mode", 0)) and automatic not in SAME
    begins, ends = tuple(pads[:axes]), tuple(pads[axes:])
    return Windows(lengths, tuple(kernel), tuple(strides), tuple(dilations), begins, ends, ceil)


def split(totals: Sequence[int], *, more_in_front: bool) -> list[int]:
    """Return pads, begins then ends, whose sums are given; of an odd one more than half is in front or behind."""
    fronts = [-(-total // 2) if more_in_front else total // 2 for total in totals]
    return [*fronts, *(total - front for total, front in zip(totals, fronts, strict=True))]
