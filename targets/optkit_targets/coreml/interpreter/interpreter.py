"""Runs a saved package, operation by operation, on the arithmetic that its types declare.

It shares no code with what writes packages: the manifest, the specification and the weight file are read from disk, and
compressed weights are expanded from the bytes there. An operation on float16 reads float16, computes in float32, and
rounds its result to float16, once; an overflow is infinite, and is counted.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

import numpy as np

from optkit.errors import InputError
from optkit_targets.coreml.interpreter.features import Feature, arrays, inputs_of, outputs_of
from optkit_targets.coreml.interpreter.halves import overflowed
from optkit_targets.coreml.interpreter.plan import Plan, Step, execute, matched, plan, settled, value_of
from optkit_targets.coreml.interpreter.program import Function, Operation, read_program
from optkit_targets.coreml.interpreter.weights import Weight, weights_of

State = MutableMapping[str, np.ndarray]


def load(package: Path, function: str = "") -> Interpreter:
    """Return an interpreter of a package.

    Args:
        package: An ``.mlpackage`` that holds an ML Program.
        function: The function to run; by default the one the package names, or ``main``.

    Raises:
        InputError: The package is missing or damaged, or has operators that are not executed here, all of them named.
        MissingDependencyError: coremltools is not installed.
    """
    try:
        return Interpreter(read_program(Path(package), function))
    except InputError as error:
        raise InputError(error.what, where=error.where or str(package), hint=error.hint) from error


class Interpreter:
    """A package that runs here.

    Attributes:
        inputs: What it takes.
        outputs: What it returns.
        overflows: Variables of the last run that finite numbers overflowed in when they were rounded to float16.
    """

    def __init__(self, function: Function) -> None:
        self._function = function
        with np.errstate(all="ignore"):
            self._plan = plan(function)
        self.inputs: tuple[Feature, ...] = inputs_of(function)
        self.outputs: tuple[Feature, ...] = outputs_of(function)
        self.overflows: tuple[str, ...] = ()

    def weights(self) -> tuple[Weight, ...]:
        """Return every weight with its form and what it takes."""
        return weights_of(self._function.block)

    def new_state(self) -> dict[str, np.ndarray]:
        """Return the package's states as they are before the first run: zeros."""
        return {name: np.zeros(type_.sizes, type_.element.dtype) for name, type_ in self._function.states.items()}

    def run(self, inputs: Mapping[str, Any], state: State | None = None) -> dict[str, np.ndarray]:
        """Return the outputs of one sample by name.

        Args:
            inputs: Arrays by the names of the package's inputs, other names are ignored. Where it takes an image, an
                array [height, width, 3], red first, or [height, width], does as well as the tensor.
            state: The states, which the run changes; new ones by default.

        Raises:
            InputError: An input is missing or does not fit, or an operation cannot be computed.
        """
        run = _Run(self._function.deployment, self.new_state() if state is None else state)
        with np.errstate(all="ignore"):
            results = run.block(self._plan, arrays(self.inputs, inputs))
        self.overflows = tuple(run.overflows)
        # Copies: what a caller writes to must be neither a constant nor its own input.
        return {name: np.array(result) for name, result in zip(self._plan.outputs, results, strict=True)}


class _Run:
    """One run: its states, and what overflowed."""

    def __init__(self, deployment: int, state: State) -> None:
        self._deployment = deployment
        self._state = state
        self.overflows: dict[str, None] = {}

    def block(self, plan: Plan, variables: dict[str, Any]) -> tuple[Any, ...]:
        """Return the outputs of a block that sees ``variables``."""
        variables = {**variables, **plan.constants}
        for step in plan.steps:
            made = matched(step.operation, self._step(step, variables, plan))
            for index, output in enumerate(step.operation.outputs):
                variables[output.name] = self._settled(step.operation, index, made[index])
            for name in step.releases:
                del variables[name]
        return tuple(value_of(name, variables) for name in plan.outputs)

    def _step(self, step: Step, variables: dict[str, Any], plan: Plan) -> tuple[Any, ...]:
        operation = step.operation
        if step.kernel is not None:
            reads = plan.widened if step.kernel.widen else value_of
            return execute(operation, step.kernel, lambda binding: reads(binding, variables), self._deployment)
        control = {
            "cond": self._cond,
            "while_loop": self._while_loop,
            "read_state": self._read_state,
            "write_state": self._write_state,
        }
        return control[operation.type](step, variables)

    def _settled(self, operation: Operation, index: int, value: Any) -> Any:
        result = settled(operation, index, value)
        rounded = isinstance(result, np.ndarray) and result.dtype == np.float16 and result is not value
        if rounded and overflowed(result, np.asarray(value)):
            self.overflows[operation.outputs[index].name] = None
        return result

    def _cond(self, step: Step, variables: dict[str, Any]) -> tuple[Any, ...]:
        holds = bool(value_of(step.operation.inputs["pred"][0], variables))
        return self.block(step.plans[0 if holds else 1], variables)

    def _while_loop(self, step: Step, variables: dict[str, Any]) -> tuple[Any, ...]:
        condition, body = step.plans
        carried = tuple(value_of(binding, variables) for binding in step.operation.inputs["loop_vars"])
        while self.block(condition, {**variables, **dict(zip(condition.inputs, carried, strict=True))})[0]:
            carried = self.block(body, {**variables, **dict(zip(body.inputs, carried, strict=True))})
        return carried

    def _read_state(self, step: Step, variables: dict[str, Any]) -> tuple[Any, ...]:
        return (self._state[str(step.operation.inputs["input"][0])].copy(),)

    def _write_state(self, step: Step, variables: dict[str, Any]) -> tuple[Any, ...]:
        self._state[str(step.operation.inputs["input"][0])] = value_of(step.operation.inputs["data"][0], variables)
        return ()
