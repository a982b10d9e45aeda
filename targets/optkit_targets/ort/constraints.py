"""What ONNX Runtime's CPU provider asks of a node. The docstring of each constraint is the sentence the user reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir

from optkit.errors import InputError
from optkit.target import Target
from optkit_targets.ort.kernels import missing_kernel

Constraint = Callable[[ir.Node, ir.Model, Target], str]


def constraint_opset(node: ir.Node, model: ir.Model, target: Target) -> str:
    """The operator's opset must be one that the target's runtime loads."""
    opset = model.opset_imports.get("", 0)
    if node.domain or target.opset.min <= opset <= target.opset.max:
        return ""
    return f"opset {opset}, the target loads {target.opset.min} to {target.opset.max}"


def constraint_kernel(node: ir.Node, model: ir.Model, target: Target) -> str:
    """ONNX Runtime's CPU provider must have a kernel for the operator, its opset and its element types."""
    return missing_kernel(node, model)


CONSTRAINTS: tuple[Constraint, ...] = (constraint_opset, constraint_kernel)


def violation(node: ir.Node, model: ir.Model, target: Target, constraints: Sequence[Constraint] = CONSTRAINTS) -> str:
    """Return the sentence of the first constraint that the node violates, with what it has instead; empty if none."""
    for constraint in constraints:
        if found := constraint(node, model, target):
            return f"{(constraint.__doc__ or '').rstrip('.')} ({found})"
    return ""


def check_opset(model: ir.Model, target: Target) -> None:
    """Refuse a model whose opset the target's runtime does not load.

    Raises:
        InputError: It is newer or older.
    """
    opset = model.opset_imports.get("")
    if opset is not None and opset > target.opset.max:
        raise InputError(
            f"the model uses opset {opset}, and target '{target.name}' loads none above {target.opset.max}",
            hint=f"export it with an older opset, or pass --target {target.name}:opset.max={opset} "
            "if the runtime on the device is newer",
        )
    if opset is not None and opset < target.opset.min:
        raise InputError(
            f"the model uses opset {opset}, and target '{target.name}' loads none below {target.opset.min}",
            hint="raise it with the pass 'raise-opset'",
        )
