"""A block of a program made ready to run: its constants expanded, and its steps with their kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from optkit.errors import InputError
from optkit_targets.coreml.interpreter import halves
from optkit_targets.coreml.interpreter.constants import Constant, fits, shown
from optkit_targets.coreml.interpreter.kernels.table import VARIADIC, Kernel, kernels
from optkit_targets.coreml.interpreter.program import Block, Function, Operation

CONSTANT, COMPRESSED = "const", "constexpr_"
CONTROL = {
    CONSTANT: ("val",),
    "cond": ("pred",),
    "while_loop": ("loop_vars",),
    "read_state": ("input",),
    "write_state": ("input", "data"),
}
"""Operators that the interpreter executes itself, and the parameters they need."""
Read = Callable[[str | Constant], Any]
BRANCHES = 2  # of a condition; a loop has its condition and its body
SOME = 5  # places that an error names


@dataclass(frozen=True)
class Step:
    """One operation that runs.

    Attributes:
        operation: The operation.
        kernel: What computes it; None for control flow and states.
        plans: Its bodies.
        releases: Variables that nothing after it reads.
    """

    operation: Operation
    kernel: Kernel | None
    plans: tuple[Plan, ...]
    releases: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """A block made ready: its inputs and outputs, constants by name, and steps in order.

    ``wide`` keeps the float16 constants that have been widened, so that it is done once and not in every run.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: dict[str, Any]
    steps: tuple[Step, ...]
    wide: dict[str, Any] = field(default_factory=dict)

    def widened(self, binding: str | Constant, variables: Mapping[str, Any]) -> Any:
        """Return what a parameter is bound to, float16 as float32."""
        if not isinstance(binding, str) or binding not in self.constants:
            return widened(value_of(binding, variables))
        if binding not in self.wide:
            self.wide[binding] = widened(self.constants[binding])
        return self.wide[binding]


def plan(function: Function) -> Plan:
    """Return a function's block made ready.

    Raises:
        InputError: Operators, parameters or states are not executed here; all of them are named.
    """
    require_kernels(function)
    return _plan(function.block, function, {})


def require_kernels(function: Function) -> None:
    """Refuse a program with operators, or parameters of them, that no kernel knows.

    Raises:
        InputError: Names the operators and what they compute.
    """
    lacking: dict[str, list[str]] = {}
    for operation in function.block.walk():
        for reason in _lacking(operation, function):
            lacking.setdefault(f"{operation.type} {reason}".rstrip(), []).append(operation.where)
    if lacking:
        parts = [
            f"{what} ({', '.join(places[:SOME])}{', ...' if len(places) > SOME else ''})"
            for what, places in lacking.items()
        ]
        raise InputError(f"these operators are not executed by the interpreter: {'; '.join(parts)}")


def _lacking(operation: Operation, function: Function) -> list[str]:
    """Return why an operation is not executed."""
    empty = [
        f"with nothing for '{name}'" for name, given in operation.inputs.items() if not given and name not in VARIADIC
    ]
    if operation.type in CONTROL:
        reasons = [f"without '{name}'" for name in CONTROL[operation.type] if name not in operation.inputs]
        reasons += [] if _bodies(operation) else ["without the bodies it needs"]
        state = operation.inputs.get("input", ("",))
        if operation.type.endswith("_state") and state and state[0] not in function.states:
            reasons.append("of a state that is no input of the function")
        return empty + reasons
    kernel = kernels().get(operation.type)
    if kernel is None:
        return [""]
    return empty + [f"with '{name}'" for name in operation.inputs if name not in kernel.parameters]


def _bodies(operation: Operation) -> bool:
    """Return whether an operation has the bodies that its operator needs, and what it carries suits them."""
    if operation.type == "cond":
        return len(operation.blocks) == BRANCHES
    if operation.type != "while_loop":
        return True
    carried = len(operation.inputs.get("loop_vars", ()))
    if len(operation.blocks) != BRANCHES or any(len(block.inputs) != carried for block in operation.blocks):
        return False
    condition, body = operation.blocks
    return len(condition.outputs) == 1 and len(body.outputs) == carried


def _plan(block: Block, function: Function, outer: Mapping[str, Any]) -> Plan:
    known = kernels()
    visible = dict(outer)
    constants: dict[str, Any] = {}
    running: list[Operation] = []
    for operation in block.operations:
        if operation.type == CONSTANT:
            made: tuple[Any, ...] = (value_of(operation.inputs["val"][0], {}),)
        elif operation.type.startswith(COMPRESSED):
            made = execute(operation, known[operation.type], partial(_read, visible), function.deployment)
            made = tuple(settled(operation, index, value) for index, value in enumerate(matched(operation, made)))
        else:
            running.append(operation)
            continue
        for output, value in zip(operation.outputs, matched(operation, made), strict=True):
            constants[output.name] = visible[output.name] = value
    steps = []
    needed = set(block.outputs) | set(constants)
    local = {output.name for operation in running for output in operation.outputs} | set(block.inputs)
    for operation in reversed(running):
        last = tuple(sorted((read_by(operation) & local) - needed))
        needed.update(last)
        plans = tuple(_plan(body, function, visible) for body in operation.blocks)
        steps.append(Step(operation, known.get(operation.type), plans, last))
    return Plan(block.inputs, block.outputs, constants, tuple(reversed(steps)))


def _read(variables: Mapping[str, Any], binding: str | Constant) -> Any:
    return widened(value_of(binding, variables))


def read_by(operation: Operation) -> set[str]:
    """Return the variables that an operation reads, those of its bodies included."""
    names = {binding for bindings in operation.inputs.values() for binding in bindings if isinstance(binding, str)}
    for block in operation.blocks:
        names.update(block.outputs)
        for inner in block.operations:
            names |= read_by(inner)
    return names


def value_of(binding: str | Constant, variables: Mapping[str, Any]) -> Any:
    """Return what a parameter is bound to.

    Raises:
        InputError: Nothing computes it.
    """
    if isinstance(binding, Constant):
        return binding.value
    if binding not in variables:
        raise InputError(f"the variable '{binding}' is read before anything computes it")
    return variables[binding]


def execute(operation: Operation, kernel: Kernel, read: Read, deployment: int) -> tuple[Any, ...]:
    """Return what a kernel computes of an operation, in the types that it computes in.

    Args:
        operation: The operation.
        kernel: Its kernel.
        read: Returns what a parameter is bound to.
        deployment: The number in the deployment target.

    Raises:
        InputError: The operation's inputs do not suit it.
    """
    arguments: dict[str, Any] = {"deployment": deployment} if kernel.versioned else {}
    for parameter, bindings in operation.inputs.items():
        found = tuple(read(binding) for binding in bindings)
        arguments[kernel.parameters[parameter]] = found if parameter in VARIADIC else found[0]
    try:
        made = kernel.function(**arguments)
    except (ValueError, LookupError, TypeError, ArithmeticError, MemoryError, InputError) as error:
        what = f"the operation '{operation.where}' ({operation.type}) cannot be computed: {error}"
        raise InputError(what) from error
    return made if isinstance(made, tuple) else (made,)


def matched(operation: Operation, made: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return what was computed.

    Raises:
        InputError: The program declares another number of results.
    """
    if len(made) != len(operation.outputs):
        what = f"'{operation.where}' ({operation.type}) computes {len(made)} results"
        raise InputError(f"{what}, and the program declares {len(operation.outputs)}")
    return made


def widened(value: Any) -> Any:
    """Return float16 as float32, in which kernels compute; everything else as it is."""
    return halves.widened(value) if isinstance(value, np.ndarray) and value.dtype == np.float16 else value


def settled(operation: Operation, index: int, value: Any) -> Any:
    """Return a result in the type that the program declares: a float rounded once, other types as they must be.

    Raises:
        InputError: The result is of another kind or shape.
    """
    type_ = operation.outputs[index].type
    if type_ is None:
        return value
    result = np.asarray(value)
    wanted = type_.element.dtype
    name = operation.outputs[index].name
    if not fits(result.shape, type_.shape):
        what = (
            f"'{name}' ({operation.type}) has shape {list(result.shape)}, and the program declares {shown(type_.shape)}"
        )
        raise InputError(what)
    if result.dtype == wanted:
        return result
    if result.dtype.kind != wanted.kind and not (result.dtype.kind in "iu" and wanted.kind in "iu"):
        what = f"'{name}' ({operation.type}) has elements of type {result.dtype}, and the program declares {wanted}"
        raise InputError(what)
    return halves.rounded(result) if wanted == np.float16 else result.astype(wanted)
