"""Second moments of what layers read, by channel: how much an error in the weights of each channel costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from optkit.dataset.ahead import read_ahead
from optkit.errors import InputError
from optkit.model.loading import graph_inputs
from optkit.quant.walk import require_finite, require_samples
from optkit.session import CannotRunError, Session, with_outputs

Channels = tuple[str, int]  # a tensor's name, and the axis of its channels


def second_moments(
    model: ir.Model,
    wanted: Iterable[Channels],
    samples: Sequence[Mapping[str, np.ndarray]] | None,
    *,
    track: Callable[..., Any] | None = None,
    name: str = "quantization",
) -> dict[Channels, np.ndarray]:
    """Run the model over the samples and return E[x^2] for every channel of the named tensors.

    One sample is in flight at a time.

    Args:
        model: The model.
        wanted: Inputs and computed values of its main graph, each with the axis of its channels.
        samples: Calibration samples; each maps input names to arrays.
        track: Wraps the samples in a progress display: ``track(items, description, total)``.
        name: What needs the samples, for the error.

    Returns:
        float64 [channels] for every tensor that ever had elements.

    Raises:
        InputError: No samples, a sample the model does not take, or a tensor with NaN or infinite values.
    """
    samples = require_samples(samples, name)
    channels = list(dict.fromkeys(wanted))
    fed = {value.name for value in graph_inputs(model)}
    computed = list(dict.fromkeys(tensor for tensor, _ in channels if tensor not in fed))
    session = Session(with_outputs(model, computed), optimize=True) if computed else None
    sums: dict[Channels, tuple[np.ndarray | float, int]] = {}
    items = read_ahead(samples)
    for index, sample in enumerate(track(items, "Calibrating", len(samples)) if track else items):
        try:
            values = session.run(sample, computed) if session else {}
        except CannotRunError as error:
            raise InputError(str(error), where=f"calibration sample {index}", hint=error.hint) from error
        for tensor, axis in channels:
            value = sample.get(tensor) if tensor in fed else values[tensor]
            if value is None:
                raise InputError(f"it has no array for input '{tensor}'", where=f"calibration sample {index}")
            if not value.size:
                continue
            require_finite(value, tensor, index)
            rows = np.moveaxis(value, axis, -1).reshape(-1, value.shape[axis])
            total, count = sums.get((tensor, axis), (0.0, 0))
            squares = np.einsum("ij,ij->j", rows, rows, dtype=np.float64)
            sums[tensor, axis] = total + squares, count + len(rows)
    return {key: np.asarray(total / count) for key, (total, count) in sums.items()}
