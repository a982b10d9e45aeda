"""Formulas of several MIL operations that stand for one ONNX node."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from optkit_targets.coreml import toolkit
from optkit_targets.coreml.lowering.forms import dtype, known
from optkit_targets.coreml.lowering.scope import CannotLower, Scope

FLOATS: dict[str, type[np.floating[Any]]] = {"fp16": np.float16, "fp32": np.float32}


class Writer:
    """Writes a node's operations as ``writer.mul(x=x, y=0.5)``.

    The first operation is named like the node, the others after it and what they do. A Python float takes the type of
    the first variable that holds floats: MIL promotes nothing.
    """

    def __init__(self, scope: Scope, node: ir.Node) -> None:
        self.scope = scope
        self.node = node
        self._first = True

    def __getattr__(self, operation: str) -> Callable[..., Any]:
        function = getattr(self.scope.mb, operation)

        def write(**inputs: Any) -> Any:
            name = self.scope.name(self.node.name or self.node.op_type, "" if self._first else operation)
            self._first = False
            return function(**_typed(inputs), name=name)

        return write

    def cast(self, variable: Any, to: str) -> Any:
        """Return a variable in the type called ``to``: fp32, fp16, int32, bool, int8 or uint8."""
        return variable if dtype(variable) == to else self.__getattr__("cast")(x=variable, dtype=to)


def _typed(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the inputs of an operation with Python floats in the type of its variables."""
    variables = [value for value in inputs.values() if isinstance(value, toolkit.mil().Var)]
    kinds = [FLOATS[kind] for kind in map(dtype, variables) if kind in FLOATS]
    number = kinds[0] if kinds else np.float32
    return {name: number(value) if type(value) is float else value for name, value in inputs.items()}


def number_type(variable: Any) -> type[np.floating[Any]]:
    """Return the numpy type of a variable that holds floats.

    Raises:
        CannotLower: It holds none.
    """
    found = FLOATS.get(dtype(variable))
    if found is None:
        raise CannotLower(f"MIL has this operation for floats alone, not for {dtype(variable)}")
    return found


def parameter(scope: Scope, node: ir.Node, index: int, like: Any) -> np.ndarray | None:
    """Return a node's constant input in the float type of a variable; None where it is computed or left out."""
    array = known(scope, node, index)
    return None if array is None else array.astype(number_type(like))


def read_outputs(node: ir.Node) -> list[int]:
    """Return the positions of the outputs that something reads."""
    return [
        index for index, value in enumerate(node.outputs) if value.name and (value.uses() or value.is_graph_output())
    ]


def refuse_outputs(node: ir.Node, first: int, what: str) -> None:
    """Refuse a node whose outputs from ``first`` on are read.

    Raises:
        CannotLower: Says what they hold.
    """
    if any(index >= first for index in read_outputs(node)):
        raise CannotLower(f"its output of {what} is read, and MIL computes none")
