"""Calibration and evaluation data: streamed samples of a model's inputs, with labels where there are some."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, overload

import numpy as np
import onnx_ir as ir

from optkit.errors import InputError, did_you_mean
from optkit.model.loading import graph_inputs

Sample = dict[str, np.ndarray]
Labels = np.ndarray | list[np.ndarray]

RANDOM_SAMPLES = 8  # drawn where no number is given


class Items(Protocol):
    """Anything that has a length and gives a sample by index, reading it only then."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Sample: ...


@dataclass(frozen=True)
class Lazy:
    """A number of samples, each read when it is asked for."""

    count: int
    read: Callable[[int], Sample]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return self.read(index)


@dataclass(frozen=True, eq=False)
class Samples(Sequence[Sample]):
    """Samples of a model's inputs, read one at a time; each maps input names to arrays the model takes as they are.

    Attributes:
        items: Where the samples come from: a list, or something that reads them.
        source: What the user named, for reports.
        labels: One label per sample, ``labels[i]``; a list where their shapes differ; None where there are none.
        random: Whether the values are random numbers, which makes every accuracy figure meaningless.
    """

    items: Items
    source: str = "memory"
    labels: Labels | None = None
    random: bool = False

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Samples: ...
    def __getitem__(self, index: int | slice) -> Sample | Samples:
        chosen = range(len(self))[index]
        if isinstance(chosen, int):
            return self.items[chosen]
        if chosen == range(len(self)):
            return self
        items = Lazy(len(chosen), lambda i: self.items[chosen[i]])
        return replace(self, items=items, labels=self.labels[index] if self.labels is not None else None)

    def __iter__(self) -> Iterator[Sample]:
        return (self.items[i] for i in range(len(self)))


def random_samples(model: ir.Model, count: int, seed: int = 0) -> Samples:
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
    return Samples(items, source="random", random=True)


def read_samples(
    data: str | Path | Mapping[str, Any] | Iterable[Mapping[str, Any]] | Samples,
    model: ir.Model,
    *,
    preprocess: str | Path | None = None,
    labels: str | None = None,
    limit: int | None = None,
    inputs_only: bool = False,
) -> Samples:
    """Read samples for a model in any form that ``--calibration`` and ``--eval`` take (docs/data.md).

    Args:
        data: ``x.npz``, ``x.npy``, a folder of ``.npy`` files or images, ``module:function``, ``file.py:function`` or
            ``random``, each with a slice at its end if wanted (``images[:100]``); in Python also a dictionary of
            arrays whose leading axis is the samples, or an iterable of dictionaries, one per sample.
        model: The model whose inputs the samples must fit.
        preprocess: A ``preprocess.toml``; by default the one in the data's folder.
        labels: Where the labels are: a key of the data, ``file.csv[:column]`` or ``file.npy``.
        limit: Read no more than this many samples.
        inputs_only: Look for no labels: data to calibrate with needs none, even where its description names some.

    Returns:
        The samples; the first one has been read and fits. Later ones are checked when they are read.

    Raises:
        InputError: The data cannot be read, does not fit the model's inputs, or holds no sample.
    """
    from optkit.dataset.sources import Reader  # reads images: what only draws random samples starts without
    from optkit.dataset.usercode import call

    if isinstance(data, Samples):
        return replace(data[:limit], labels=None) if inputs_only else data[:limit]
    spec = str(data) if isinstance(data, (str, Path)) else "memory"
    text, cut = _split_slice(spec)
    path, reach = Path(text), _reach(cut, limit)
    inputs = {value.name or "": value for value in graph_inputs(model)}
    reader = Reader(inputs, spec, Path(preprocess) if preprocess else None, labels, inputs_only)
    if isinstance(data, Mapping):
        samples = reader.arrays({name: np.asarray(array) for name, array in data.items()})
    elif not isinstance(data, (str, Path)):
        samples = reader.dictionaries(data, reach)
    elif text == "random":
        samples = random_samples(model, reach or RANDOM_SAMPLES)
    elif path.is_dir():
        samples = reader.folder(path)
    elif path.suffix in {".npz", ".npy"} and path.is_file():
        samples = reader.array_file(path)
    elif re.fullmatch(r"[\w.]+:\w+|.+\.py:\w+", text):
        samples = reader.dictionaries(call(text), reach)
    else:
        raise _unknown(path)
    samples = samples[cut][:limit]
    if not samples:
        raise InputError("there is no sample in it", where=samples.source)
    samples[0]  # a misfit is told before anything is run
    return replace(samples, labels=None) if inputs_only else samples


def _split_slice(text: str) -> tuple[str, slice]:
    """Split ``images[10:100:2]`` into the data and the slice."""
    match = re.fullmatch(r"(.+)\[(-?\d*):(-?\d*)(?::(-?\d*))?\]", text)
    if match is None or Path(text).exists():
        return text, slice(None)
    bounds = [int(part) if part else None for part in match.groups()[1:]]
    if bounds[2] == 0:
        raise InputError(f"the slice of '{text}' has step 0")
    return match[1], slice(*bounds)


def _reach(cut: slice, limit: int | None) -> int | None:
    """Return how many samples must be produced so that the slice and the limit are served; None: all of them."""
    start, stop, step = cut.start or 0, cut.stop, cut.step or 1
    if min(start, stop or 0, step) < 0:
        return None
    ends = [stop] if stop is not None else []
    return min(ends + ([start + limit * step] if limit is not None else []), default=None)


def _unknown(path: Path) -> InputError:
    if path.is_file():
        what = f"'{path.suffix or path.name}' is not a form of data that is read"
        return InputError(what, where=str(path), hint="give x.npz, a folder of .npy or images, or module:function")
    siblings = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
    hint = did_you_mean(path.name, siblings)
    hint = hint if hint.startswith("did") else "give x.npz, a folder of .npy or images, or module:function"
    return InputError("no such data", where=str(path), hint=hint)


def fit(arrays: Mapping[str, Any], inputs: Mapping[str, ir.Value], where: str) -> Sample:
    """Return one sample as the model takes it.

    An array with one axis less than the input gets a leading axis of 1; element types change only without loss, or
    from float to float. Names that the model does not have are left out.

    Raises:
        InputError: An input is missing, or has a type, a rank or a shape that the model does not take, or holds NaN.
    """
    sample = {}
    for name, value in inputs.items():
        if name not in arrays:
            given = did_you_mean(name, arrays) if arrays else "it is empty"
            raise InputError(f"the model's input '{name}' is missing", where=where, hint=given)
        sample[name] = _fit_array(np.asarray(arrays[name]), value, f"{where}: input '{name}'")
    return sample


def _fit_array(array: np.ndarray, value: ir.Value, where: str) -> np.ndarray:
    dtype = (value.dtype or ir.DataType.FLOAT).numpy()
    converted = _cast(array, dtype)
    if converted is None:
        wanted = f"{dtype} where the data holds {array.dtype}"
        extremes = f" from {array.min()} to {array.max()}" if array.dtype.kind in "iu" and array.size else ""
        raise InputError(
            f"the model takes {wanted}{extremes}", where=where, hint="convert the data; nothing is rounded"
        )
    if converted.dtype.kind == "f" and not np.isfinite(converted).all():
        raise InputError(f"the data holds NaN or infinity as {dtype}", where=where, hint="remove or repair that sample")
    if value.shape is None:
        return converted
    dims = [dim if isinstance(dim, int) else None for dim in value.shape]
    if converted.ndim == len(dims) - 1 and dims[0] in (None, 1):
        converted = converted[None]
    if converted.ndim != len(dims) or any(d not in (None, n) for d, n in zip(dims, converted.shape, strict=True)):
        expected = [dim if isinstance(dim, int) else (dim.value or "?") for dim in value.shape]
        what = f"one sample has shape {list(array.shape)} where the model takes [{', '.join(map(str, expected))}]"
        hint = "a sample is one run of the model; in an array of samples the leading axis counts them"
        raise InputError(what, where=where, hint=hint)
    return np.asarray(converted, order="C")


def _cast(array: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray | None:
    """Return the array as ``dtype``, or None where that could lose something other than digits of a float."""
    given, wanted = array.dtype.kind, dtype.kind
    if array.dtype == dtype or (wanted == "O" and given == "U"):  # ONNX strings
        return array
    if given == "f" and wanted in "fV":  # V: bfloat16
        with np.errstate(over="ignore"):  # an infinity is refused by the caller
            return array.astype(dtype)
    if given not in "iub" or wanted not in "iubf":
        return None
    low, high = _exact_integers(dtype)
    fits = not array.size or (low <= int(array.min()) and int(array.max()) <= high)
    return array.astype(dtype) if fits else None


def _exact_integers(dtype: np.dtype[Any]) -> tuple[int, int]:
    """Return the range in which every integer has a value of its own in ``dtype``."""
    if dtype.kind == "b":
        return 0, 1
    if dtype.kind == "f":
        limit = 2 ** (np.finfo(dtype).nmant + 1)
        return -limit, limit
    limits = np.iinfo(dtype)
    return int(limits.min), int(limits.max)
