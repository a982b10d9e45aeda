"""What a generation of the Neural Engine holds, as its target's file says it: every number with its source."""

from __future__ import annotations

from pydantic import ValidationError

from optkit.errors import InputError
from optkit.target import Frozen, Quantity, Target


class Limits(Frozen):
    """The table ``[options.limits]`` of a target.

    Attributes:
        generation: Of the engine, as Apple's compiler counts: 13 is that of A14 and M1.
        max_rank: Dimensions of a tensor.
        max_matmul_rank: Dimensions of an operand of a matrix product.
        max_dimension: Length of an axis of a tensor, channels and batch apart.
        max_channels: Length of the axis of channels.
        max_batch: Length of the first of four axes.
        max_kernel_width: Taps of a convolution along the last axis, in fp16.
        max_kernel_height: Taps along the axis before it.
        max_pool_window: Elements along an axis of a pooling window.
    """

    generation: Quantity
    max_rank: Quantity
    max_matmul_rank: Quantity
    max_dimension: Quantity
    max_channels: Quantity
    max_batch: Quantity
    max_kernel_width: Quantity
    max_kernel_height: Quantity
    max_pool_window: Quantity


def limits_of(target: Target) -> Limits:
    """Return a target's limits.

    Raises:
        InputError: The target has none, or one without a source.
    """
    try:
        return Limits.model_validate(target.options.get("limits", {}))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in ("options", "limits", *first["loc"]))
        raise InputError(
            f"target '{target.name}' does not say what its Neural Engine holds: '{key}': {first['msg'].lower()}",
            hint='inherit one of ane-h13 to ane-h16, or write max_rank = { value = ..., source = "..." }',
        ) from error
