"""The forms in which a user gives data, each read into samples that are fetched one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from optkit.dataset.arrays import Spool, load_npy, load_npz
from optkit.dataset.images import IMAGE_SUFFIXES, Preprocess, as_images, read_preprocess
from optkit.dataset.labels import LABEL_NAMES, check_count, folder_labels, read_labels
from optkit.dataset.samples import Labels, Lazy, Sample, Samples, fit
from optkit.errors import InputError, did_you_mean

LENGTHS = "lengths"  # array that says how much of each padded sequence is real
PREPROCESS = "preprocess.toml"


@dataclass(frozen=True)
class Reader:
    """Reads data for one model; every method returns samples and raises InputError.

    Attributes:
        inputs: The model's inputs by name.
        source: What the user named, for errors and reports.
        preprocess_file: The ``preprocess.toml`` that the user named, or None for the one in the data's folder.
        labels: Where the user says that the labels are, or None.
        inputs_only: Read no file of labels.
    """

    inputs: Mapping[str, ir.Value]
    source: str
    preprocess_file: Path | None
    labels: str | None
    inputs_only: bool = False

    def array_file(self, file: Path) -> Samples:
        """Read an ``.npz`` file, or an ``.npy`` file for a model with one input."""
        arrays = load_npz(file) if file.suffix == ".npz" else {file.stem: load_npy(file)}
        return self.arrays(arrays, file.parent)

    def arrays(self, arrays: Mapping[str, np.ndarray], folder: Path | None = None) -> Samples:
        """Take arrays by input name whose leading axis is the samples; arrays without axes are the same for all."""
        if objects := [name for name, array in arrays.items() if array.dtype.hasobject]:
            what = f"the array '{objects[0]}' holds Python objects; sequences of different lengths are padded"
            raise InputError(what, where=self.source, hint=f"give their lengths as the array '{LENGTHS}'")
        preprocess = self._preprocess(folder)
        label_name = self._label_name(arrays)
        taken = {label_name, LENGTHS} - self.inputs.keys()
        given = {name: array for name, array in arrays.items() if name not in taken}
        chosen, note = self._choose(given, preprocess)
        image = self._image_input(preprocess) if preprocess else ""
        if preprocess and chosen[image].dtype == np.uint8:
            chosen[image] = as_images(chosen[image], preprocess.array_layout, f"{self.source}: images for '{image}'")
        elif self.preprocess_file is not None:
            what = f"{PREPROCESS} applies to uint8 images, and the data for '{image}' is {chosen[image].dtype}"
            raise InputError(what, where=self.source)
        else:
            preprocess = None  # what merely lies in the same folder speaks about other data
        counts = {name: len(array) for name, array in chosen.items() if array.ndim}
        count = max(counts.values(), default=1)
        if min(counts.values(), default=count) != count:
            listed = ", ".join(f"'{name}' {number}" for name, number in counts.items())
            raise InputError(f"the arrays hold different numbers of samples: {listed}", where=self.source)
        lengths = None if LENGTHS in self.inputs else self._lengths(arrays.get(LENGTHS), chosen, count)
        labels = check_count(arrays[label_name], count, self.source) if label_name else None
        if labels is None:
            labels = self._label_file(preprocess, folder, None, count)

        def read(index: int) -> Sample:
            rows = {}
            for name, array in chosen.items():
                value = self.inputs[name]
                row = array[index : index + 1] if array.ndim and value.shape is None else array
                row = array[index] if array.ndim and value.shape is not None else row
                if preprocess and name == image:
                    row = preprocess.convert(row, _dtype(value), f"{self.source}: sample {index}")
                elif lengths is not None and _is_sequence(array, value):
                    row = row[: lengths[index]]
                rows[name] = row
            return fit(rows, self.inputs, f"{self.source}: sample {index}")

        trimmed: Labels | None = labels
        if labels is not None and labels.ndim > 1 and lengths is not None:
            trimmed = [row[:length] for row, length in zip(labels, lengths, strict=True)]
        return Samples(Lazy(count, read), self.source + note, trimmed)

    def folder(self, folder: Path) -> Samples:
        """Read a folder of images, or of ``.npy`` files, one sample each, in sub-folders by input where it has many."""
        files = sorted(item for item in folder.rglob("*") if item.is_file())
        images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
        arrays = [file for file in files if file.suffix == ".npy" and file.stem not in LABEL_NAMES]
        preprocess = self._preprocess(folder)
        if images:
            if preprocess is None:
                what = f"a folder of images needs a {PREPROCESS} that says how they become the model's input"
                raise InputError(what, where=str(folder), hint="put one there, or give --preprocess FILE")
            name = self._image_input(preprocess)
            dtype = _dtype(self.inputs[name])
            samples = self._files({name: images}, lambda file, _: preprocess.read(file, dtype))
            labels = self._label_file(preprocess, folder, images, len(images))
            return Samples(samples, self.source, folder_labels(folder, images) if labels is None else labels)
        if not arrays:
            raise InputError("the folder holds neither images nor .npy files", where=str(folder))
        by_input = self._by_input(folder, arrays)
        count = len(next(iter(by_input.values())))
        image = self._image_input(preprocess) if preprocess else None

        def read(file: Path, name: str) -> np.ndarray:
            array = load_npy(file)
            if preprocess is None or name != image or array.dtype != np.uint8:
                return array
            layout = preprocess.array_layout or ("HWC" if array.ndim == 3 else None)
            return preprocess.convert(as_images(array, layout, str(file))[0], _dtype(self.inputs[name]), str(file))

        samples = self._files(by_input, read)
        return Samples(samples, self.source, self._label_file(preprocess, folder, next(iter(by_input.values())), count))

    def dictionaries(self, items: Iterable[Mapping[str, Any]], reach: int | None) -> Samples:
        """Read at most ``reach`` dictionaries of arrays, kept in a temporary file where they are large."""
        spool, labels = Spool(), list[np.ndarray]()
        for number, item in enumerate(islice(items, reach)):
            where = f"{self.source}: sample {number}"
            if not isinstance(item, Mapping):
                what = f"{type(item).__name__} where a dictionary of arrays by input name is expected"
                raise InputError(what, where=where)
            label_name = self._label_name(item)
            spool.append(fit(item, self.inputs, where))
            if label_name:
                labels.append(np.asarray(item[label_name]))
            if labels and len(labels) != number + 1:
                raise InputError("some samples have labels and some have none", where=where)
        if labels:
            alike = len({(label.shape, label.dtype) for label in labels}) == 1
            return Samples(spool, self.source, np.stack(labels) if alike else labels)
        return Samples(spool, self.source, self._label_file(None, None, None, len(spool)))

    def _files(self, by_input: Mapping[str, Sequence[Path]], load: Callable[[Path, str], np.ndarray]) -> Lazy:
        def read(index: int) -> Sample:
            files = {name: files[index] for name, files in by_input.items()}
            where = str(next(iter(files.values())))
            return fit({name: load(file, name) for name, file in files.items()}, self.inputs, where)

        return Lazy(len(next(iter(by_input.values()))), read)

    def _by_input(self, folder: Path, arrays: Sequence[Path]) -> dict[str, list[Path]]:
        by_input = {name: [file for file in arrays if file.parent == folder / name] for name in self.inputs}
        if len(self.inputs) == 1 and not any(by_input.values()):
            return {next(iter(self.inputs)): [file for file in arrays if file.parent == folder] or list(arrays)}
        names = {name: [file.name for file in files] for name, files in by_input.items()}
        first = next(iter(names))
        for name, found in names.items():
            if not found:
                known = sorted({file.parent.name for file in arrays if file.parent != folder})
                hint = did_you_mean(name, known) or "a model with several inputs takes one sub-folder for each"
                raise InputError(f"no sub-folder '{name}' with .npy files", where=str(folder), hint=hint)
            if found != names[first]:
                odd = sorted(set(found) ^ set(names[first]))[0]
                raise InputError(f"'{odd}' is not in both '{first}' and '{name}'", where=str(folder))
        return by_input

    def _choose(
        self, given: Mapping[str, np.ndarray], preprocess: Preprocess | None
    ) -> tuple[dict[str, np.ndarray], str]:
        """Return the array for each input: named by ``preprocess.toml``, named alike, or the only one there is."""
        numeric = [name for name, array in given.items() if array.dtype.kind in "fiub"]
        keys = {name: name for name in self.inputs}
        if len(keys) == len(numeric) == 1:
            keys = dict.fromkeys(keys, numeric[0])
        if preprocess and preprocess.array:
            keys[self._image_input(preprocess)] = preprocess.array
        for name, key in keys.items():
            if key not in given:
                what = f"no array '{key}'" + (f" for the model's input '{name}'" if key != name else "")
                raise InputError(what, where=self.source, hint=did_you_mean(key, given) or "it holds no array")
        note = "".join(f" ('{key}' as input '{name}')" for name, key in keys.items() if key != name)
        return {name: given[key] for name, key in keys.items()}, note

    def _image_input(self, preprocess: Preprocess) -> str:
        """Return the input that takes images."""
        name = preprocess.input
        if name is None and len(self.inputs) == 1:
            return next(iter(self.inputs))
        if name is None:
            raise InputError("the key 'input' is missing", where=PREPROCESS, hint=did_you_mean("", self.inputs))
        if name not in self.inputs:
            what = f"'{name}' is none of the model's inputs"
            raise InputError(what, where=PREPROCESS, hint=did_you_mean(name, self.inputs))
        return name

    def _preprocess(self, folder: Path | None) -> Preprocess | None:
        file = self.preprocess_file or (folder / PREPROCESS if folder else None)
        if file is None or (file is not self.preprocess_file and not file.is_file()):
            return None
        return read_preprocess(file)

    def _label_name(self, keys: Mapping[str, Any]) -> str:
        """Return the key of the labels, or nothing."""
        if self.labels is None:
            return next((name for name in LABEL_NAMES if name in keys and name not in self.inputs), "")
        if self.labels in keys:
            return self.labels
        if not _names_file(self.labels):
            raise InputError(f"no labels '{self.labels}'", where=self.source, hint=did_you_mean(self.labels, keys))
        return ""

    def _label_file(
        self, preprocess: Preprocess | None, folder: Path | None, files: Sequence[Path] | None, count: int
    ) -> np.ndarray | None:
        """Read the labels that the user, ``preprocess.toml`` or a file in the data's folder name."""
        if self.inputs_only:
            return None
        if self.labels is not None:
            return read_labels(self.labels, folders=[], files=files, count=count)
        if preprocess and preprocess.labels:
            folders = [item for item in (folder, self.preprocess_file and self.preprocess_file.parent) if item]
            column = f":{preprocess.label_column}" if preprocess.label_column else ""
            return read_labels(preprocess.labels + column, folders=folders, files=files, count=count)
        if folder is None or files is None:
            return None
        found = next((name for name in ("labels.csv", "labels.npy") if (folder / name).is_file()), None)
        return read_labels(found, folders=[folder], files=files, count=count) if found else None

    def _lengths(self, lengths: np.ndarray | None, chosen: Mapping[str, np.ndarray], count: int) -> np.ndarray | None:
        padded = [array.shape[1] for name, array in chosen.items() if _is_sequence(array, self.inputs[name])]
        if lengths is None or not padded:
            return None
        if lengths.shape != (count,) or lengths.dtype.kind not in "iu" or not count:
            what = f"'{LENGTHS}' is {lengths.dtype} {list(lengths.shape)} where one integer per sample is expected"
            raise InputError(what, where=self.source)
        if lengths.min() < 1 or lengths.max() > min(padded):
            what = f"'{LENGTHS}' goes from {lengths.min()} to {lengths.max()} for sequences of {min(padded)}"
            raise InputError(what, where=self.source)
        return lengths


def _dtype(value: ir.Value) -> np.dtype[Any]:
    return (value.dtype or ir.DataType.FLOAT).numpy()


def _names_file(labels: str) -> bool:
    return labels.endswith((".csv", ".npy")) or ".csv:" in labels


def _is_sequence(array: np.ndarray, value: ir.Value) -> bool:
    """Whether the array's second axis, behind that of the samples, is one the model leaves open."""
    shape = value.shape
    if shape is None or array.ndim < 2:
        return False
    axis = 1 - (array.ndim - len(shape))
    return 0 <= axis < len(shape) and not isinstance(shape[axis], int)
