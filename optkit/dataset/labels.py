"""Labels from files: a column of a csv, an array in a ``.npy``, or the folder that a file lies in."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from optkit.dataset.arrays import load_npy
from optkit.errors import InputError, did_you_mean

LABEL_NAMES = ("labels", "label", "y")
COLUMN_NAMES = (*LABEL_NAMES, "class_index", "class", "target")
FILE_COLUMNS = ("file", "filename", "path", "image")


def read_labels(spec: str, *, folders: Sequence[Path], files: Sequence[Path] | None, count: int) -> np.ndarray:
    """Return one label per sample from a file.

    Args:
        spec: ``file.csv``, ``file.csv:column`` or ``file.npy``.
        folders: Where a relative file is looked for, before the current folder.
        files: The samples' files: a csv with a column of file names is joined on it. None: rows are in order.
        count: The number of samples.

    Raises:
        InputError: The file or the column does not exist, is not numeric, or lacks a label.
    """
    name, column = spec, ""
    if not spec.endswith((".csv", ".npy")):
        name, _, column = spec.rpartition(":")
    file = next((f for f in [*(folder / name for folder in folders), Path(name)] if f.is_file()), None)
    if file is None:
        raise InputError("no such labels file", where=name or spec, hint="give file.csv, file.csv:column or file.npy")
    if file.suffix == ".npy":
        return check_count(np.asarray(load_npy(file)), count, str(file))
    return _csv_labels(file, column, files, count)


def _csv_labels(file: Path, column: str, files: Sequence[Path] | None, count: int) -> np.ndarray:
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            rows = list(reader)
            columns = list(reader.fieldnames or ())
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"not a readable csv file: {error}", where=str(file)) from error
    if column and column not in columns:
        raise InputError(f"no column '{column}'", where=str(file), hint=did_you_mean(column, columns))
    chosen = column or next((name for name in COLUMN_NAMES if name in columns), "")
    if not chosen:
        hint = f"name one of {', '.join(columns)} as {file.name}:COLUMN"
        raise InputError("no column is named 'label'", where=str(file), hint=hint)
    key = next((name for name in FILE_COLUMNS if name in columns and name != chosen), None)
    if key is not None and files is not None:
        rows = _join(rows, key, files, file)
    return check_count(_numbers([row[chosen] or "" for row in rows], chosen, file), count, str(file))


def _join(rows: list[dict[str, str]], key: str, files: Sequence[Path], file: Path) -> list[dict[str, str]]:
    """Return the row of each file, found by path relative to the csv, else by a file name that occurs once."""
    by_path = {(file.parent / row[key]).resolve(): row for row in rows}
    names = [Path(row[key]).name for row in rows]
    by_name = {name: row for name, row in zip(names, rows, strict=True) if names.count(name) == 1}
    found = []
    for item in files:
        row = by_path.get(item.resolve()) or by_name.get(item.name)
        if row is None:
            raise InputError(f"no row for '{item.name}' in the column '{key}'", where=str(file))
        found.append(row)
    return found


def _numbers(texts: Sequence[str], column: str, file: Path) -> np.ndarray:
    """Parse integers where all are integers, else floats."""
    for parse in (int, float):
        try:
            return np.array([parse(text) for text in texts], np.int64 if parse is int else np.float64)
        except ValueError as error:
            problem = error
    hint = "name a column of class indices or values"
    raise InputError(f"the column '{column}' is not numeric: {problem}", where=str(file), hint=hint)


def check_count(labels: np.ndarray, count: int, where: str) -> np.ndarray:
    """Return the labels if there is one per sample.

    Raises:
        InputError: There are more or fewer, or they are not numbers.
    """
    if labels.dtype.kind not in "fiub":
        raise InputError(f"labels are numbers, not {labels.dtype}", where=where)
    if labels.ndim == 0 or len(labels) != count:
        raise InputError(f"{len(labels) if labels.ndim else 1} labels for {count} samples", where=where)
    return labels


def folder_labels(folder: Path, files: Sequence[Path]) -> np.ndarray | None:
    """Return the class of each file from the sub-folder it lies in, or None where there are fewer than two of those.

    A class is its folder's name where all are numbers, else the folder's line in ``classes.txt``, else its rank among
    the sorted names.

    Raises:
        InputError: A folder's name is not in ``classes.txt``.
    """
    owners = [file.relative_to(folder).parts[0] if file.parent != folder else "" for file in files]
    names = sorted(set(owners))
    if len(names) < 2 or "" in names:
        return None
    listing = folder / "classes.txt"
    if all(name.isascii() and name.isdigit() for name in names):
        index = {name: int(name) for name in names}
    elif listing.is_file():
        lines = [line.split() for line in listing.read_text(encoding="utf-8").splitlines()]
        index = {line[0]: number for number, line in enumerate(lines) if line}
        unknown = next((name for name in names if name not in index), None)
        if unknown is not None:
            raise InputError(f"no line begins with the class folder's name '{unknown}'", where=str(listing))
    else:
        index = {name: number for number, name in enumerate(names)}
    return np.array([index[owner] for owner in owners], np.int64)
