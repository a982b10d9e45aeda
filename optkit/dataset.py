"""Calibration and evaluation data: streamed samples of a model's inputs, with labels where there are some."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from optkit.model import graph_inputs


class Samples(Sequence[dict[str, np.ndarray]]):
    """Samples of a model's inputs, read one at a time; each maps input names to arrays the model takes as they are.

    Attributes:
        source: What the user named, for reports.
        labels: One label per sample, or None.
        random: Whether the values are random numbers, which makes every accuracy figure meaningless.
    """

    source: str
    labels: np.ndarray | None = None
    random: bool = False


@dataclass
class ArraySamples(Samples):
    """Samples held in memory."""

    items: list[dict[str, np.ndarray]]
    source: str = "memory"
    labels: np.ndarray | None = None
    random: bool = False

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:  # type: ignore[override]  # slices are not needed
        return self.items[index]

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return iter(self.items)


def random_samples(model: ir.Model, count: int, seed: int = 0) -> ArraySamples:
    """Return reproducible random samples: normal floats, and integers 0 or 1, which index any table.

    Dynamic dimensions become 1 on the first axis and 16 elsewhere.
    """
    generator = np.random.default_rng(seed)
    items = []
    for _ in range(count):
        sample = {}
        for value in graph_inputs(model):
            shape = [d if isinstance(d, int) else (1 if axis == 0 else 16) for axis, d in enumerate(value.shape or ())]
            dtype = (value.dtype or ir.DataType.FLOAT).numpy()
            if dtype.kind == "f":
                array = generator.standard_normal(shape).astype(dtype)
            else:
                array = generator.integers(0, 2, shape).astype(dtype)
            sample[value.name or ""] = np.asarray(array)
        items.append(sample)
    return ArraySamples(items, source="random", random=True)
