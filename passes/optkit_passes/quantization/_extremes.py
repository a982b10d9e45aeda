"""The smallest and largest values of tensors over calibration samples, infinities apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from optkit.dataset.ahead import read_ahead
from optkit.errors import InputError
from optkit.model.loading import graph_inputs
from optkit.session import CannotRunError, Session, with_outputs


@dataclass
class Extremes:
    """What was seen of one tensor.

    Attributes:
        low: Smallest finite value, at most 0.
        high: Largest finite value, at least 0.
        dims: Largest size of each axis.
        nan: Whether a value was not a number.
    """

    low: float = 0.0
    high: float = 0.0
    dims: tuple[int, ...] = ()
    nan: bool = False

    def add(self, values: np.ndarray) -> None:
        """Take one sample's values into account."""
        low, high = (float(limit) for limit in (values.min(initial=0.0), values.max(initial=0.0)))
        if not np.isfinite(low + high):
            self.nan = self.nan or bool(np.isnan(values).any())
            finite = values[np.isfinite(values)]  # masks are infinite on purpose
            low, high = float(finite.min(initial=0.0)), float(finite.max(initial=0.0))
        self.low, self.high = min(self.low, low), max(self.high, high)
        rank = max(len(self.dims), values.ndim)
        old, new = ((1,) * (rank - len(dims)) + tuple(dims) for dims in (self.dims, values.shape))
        self.dims = tuple(max(pair) for pair in zip(old, new, strict=True))


def observe_extremes(
    model: ir.Model,
    names: Iterable[str],
    samples: Sequence[Mapping[str, np.ndarray]],
    *,
    track: Callable[..., Any],
) -> dict[str, Extremes]:
    """Run the model over the samples, one in flight at a time, and return the extremes of every named tensor.

    Args:
        model: The model.
        names: Inputs and computed values of its main graph.
        samples: Calibration samples; each maps input names to arrays.
        track: Wraps the samples in a progress display: ``track(items, description, total)``.

    Raises:
        InputError: No samples, a sample the model does not take, or an input with values that are not numbers.
    """
    if not len(samples):
        raise InputError("the calibration data given holds no samples", hint="pass --calibration DATA, or none at all")
    found = {name: Extremes() for name in names}
    fed = {value.name or "" for value in graph_inputs(model)}
    computed = [name for name in found if name not in fed]
    session = Session(with_outputs(model, computed), optimize=True) if computed else None
    for index, sample in enumerate(track(read_ahead(samples), "Calibrating", len(samples))):
        where = f"calibration sample {index}"
        for name in fed & sample.keys():
            if sample[name].dtype.kind == "f" and np.isnan(sample[name]).any():
                raise InputError(f"input '{name}' has NaN values", where=where, hint="leave the sample out")
        try:
            values = session.run(sample, computed) if session else {}
        except CannotRunError as error:
            raise InputError(str(error), where=where) from error
        for name, extremes in found.items():
            value = values.pop(name, None) if name not in fed else sample.get(name)
            if value is None:
                raise InputError(f"it has no array for input '{name}'", where=where)
            extremes.add(value)
    return found
