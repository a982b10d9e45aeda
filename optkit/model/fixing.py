"""Inputs fixed to a value: they become constants, so that what depends on them alone can be folded."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from optkit.errors import InputError, did_you_mean


def fix_inputs(model: ir.Model, values: Mapping[str, float]) -> None:
    """Turn inputs of the main graph into constants filled with one value, in place.

    Raises:
        InputError: The model has no such input, its shape is not static, or its type does not hold the value.
    """
    inputs = {value.name or "": value for value in model.graph.inputs}
    for name, number in values.items():
        if name not in inputs:
            raise InputError(f"the model has no input '{name}'", hint=did_you_mean(name, inputs))
        value = inputs[name]
        shape = value.shape
        if shape is None or not all(isinstance(dim, int) for dim in shape):
            raise InputError(f"the shape of input '{name}' is not static", hint="fix its dimensions with --dim first")
        if value.dtype is None or value.dtype == ir.DataType.STRING:
            raise InputError(f"input '{name}' takes no number")
        dims = shape.numpy()
        wanted = value.dtype.numpy()
        with np.errstate(all="ignore"):
            array = np.full(dims, number).astype(wanted)
        if not np.array_equal(array.astype(np.float64), np.full(dims, number, np.float64)) and wanted.kind in "iub":
            raise InputError(f"input '{name}' of type {wanted.name} does not hold {number:g}")
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(array, name=name)
        model.graph.initializers[name] = value
