"""The table of kernels: which function computes which operator of MIL.

A kernel takes the operator's parameters, by MIL's names, as NumPy arrays, strings, and tuples of arrays where a
parameter has several, and returns the result, or a tuple of results. It computes in float32 what the program computes
in float16: the interpreter widens what it reads and rounds what it returns to the type that the program declares, once
per operation.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

FAMILIES = (
    "activations",
    "arrangement",
    "attention",
    "compression",
    "convolution",
    "elementwise",
    "generation",
    "indexing",
    "lists",
    "normalization",
    "pooling",
    "products",
    "quantization",
    "recurrence",
    "reductions",
    "sampling",
    "selection",
    "spatial",
    "suppression",
    "warping",
)
VARIADIC = frozenset({"values", "ref_tensors", "begins", "ends", "end_masks", "loop_vars", "elem_shape"})
"""Parameters that take several arguments, and are a tuple even where there is one."""


@dataclass(frozen=True)
class Kernel:
    """A function that computes an operator.

    Attributes:
        function: The function.
        widen: Whether it computes: float16 is widened to float32 for it. What only moves elements needs no widening.
        versioned: Whether it wants to know the deployment target, because the operator means another thing there.
        parameters: The operator's parameters that it knows, and the function's names of them.
    """

    function: Callable[..., Any]
    widen: bool
    versioned: bool
    parameters: dict[str, str]


_TABLE: dict[str, Kernel] = {}


def executes(*operators: str, widen: bool = True) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enter a function into the table.

    A parameter ``input_`` stands for MIL's ``input``; one named ``deployment`` is given the deployment target.
    """

    def enter(function: Callable[..., Any]) -> Callable[..., Any]:
        names = [name for name in inspect.signature(function).parameters if name != "deployment"]
        parameters = {name.rstrip("_"): name for name in names}
        versioned = "deployment" in inspect.signature(function).parameters
        for operator in operators:
            if operator in _TABLE:
                raise ValueError(f"{operator} has two kernels")
            _TABLE[operator] = Kernel(function, widen, versioned, parameters)
        return function

    return enter


@cache
def kernels() -> dict[str, Kernel]:
    """Return every kernel by its operator."""
    for family in FAMILIES:
        import_module(f"optkit_targets.coreml.interpreter.kernels.{family}")
    return dict(sorted(_TABLE.items()))
