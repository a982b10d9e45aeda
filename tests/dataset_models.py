"""Models and files for the tests of data sets."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from optkit.model.loading import load_text


def model_of(*inputs: str):
    """A model that passes its inputs through, as ``float[N,4] x`` and so on."""
    names = [declared.split()[-1] for declared in inputs]
    outputs = [declared.replace(f" {name}", f" {name}_out") for declared, name in zip(inputs, names, strict=True)]
    body = " ".join(f"{name}_out = Identity({name})" for name in names)
    return load_text(
        f'<ir_version: 10, opset_import: ["": 21]> main ({", ".join(inputs)}) => ({", ".join(outputs)}) {{ {body} }}'
    )


VECTOR = model_of("float[N,4] x")
TOKENS = model_of("int64[N,T] ids")
PAIR = model_of("float[N,4] x", "int64[N] kind")


def rows(count: int) -> np.ndarray:
    return np.arange(count * 4, dtype=np.float32).reshape(count, 4)


def save(folder: Path, name: str = "x.npz", **arrays: np.ndarray) -> str:
    np.savez(folder / name, **arrays)
    return str(folder / name)
