"""What a package takes and returns: the features that its description names, and images as arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from optkit.errors import InputError, did_you_mean
from optkit_targets.coreml import toolkit
from optkit_targets.coreml.interpreter.constants import TensorType, fits, shown
from optkit_targets.coreml.interpreter.program import Function

GRAY, COLOURS = 1, 3  # channels
CLASSIFIED = ("str", "float32")  # of a classifier: the best class, and the probability of each


@dataclass(frozen=True)
class Image:
    """How an image becomes a tensor [1, channels, height, width]; scale and bias are operations of the program.

    Attributes:
        layout: ``RGB``, ``BGR`` or ``GRAYSCALE``: the order of the tensor's channels.
        height: Rows.
        width: Columns.
    """

    layout: str
    height: int
    width: int

    def tensor(self, picture: np.ndarray) -> np.ndarray:
        """Return an array [height, width, 3], red first, or [height, width], as the tensor that the program takes."""
        channels = GRAY if self.layout.startswith("GRAY") else COLOURS
        expected = (self.height, self.width) if channels == GRAY else (self.height, self.width, COLOURS)
        if picture.shape != expected:
            raise ValueError(f"it takes an image {list(expected)}, not {list(picture.shape)}")
        if channels == GRAY:
            return picture[None, None]
        ordered = picture[..., ::-1] if self.layout == "BGR" else picture
        return np.moveaxis(ordered, -1, 0)[None]


@dataclass(frozen=True)
class Feature:
    """An input or an output.

    Attributes:
        name: Its name.
        dtype: Its elements, as NumPy calls them.
        shape: Its shape, None where a dimension is open, or how many there are.
        image: How an image becomes this tensor, where the package takes one.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...] | None
    image: Image | None = None

    def array(self, given: Any) -> np.ndarray:
        """Return what a user gives for this input as the tensor that the program takes.

        Raises:
            InputError: Its shape or its elements do not fit.
        """
        value = np.asarray(given)
        try:
            if self.image is not None and value.ndim < len(self.shape or ()):
                value = self.image.tensor(value)
        except ValueError as error:
            raise InputError(f"the input '{self.name}' does not fit: {error}") from error
        if self.shape == () and value.shape == (1,):
            value = value.reshape(())  # Core ML has no scalars: it takes one element for them
        if not fits(value.shape, self.shape):
            what = f"the input '{self.name}' has shape {list(value.shape)}, and the package takes {shown(self.shape)}"
            raise InputError(what)
        wanted = np.dtype(self.dtype)
        if value.dtype.kind not in "fiub" or (value.dtype.kind == "f" and wanted.kind in "iu"):
            what = f"the input '{self.name}' has elements of type {value.dtype}, and the package takes {wanted}"
            raise InputError(what)
        return value.astype(wanted, copy=False)


def inputs_of(function: Function) -> tuple[Feature, ...]:
    """Return the inputs of a package's function."""
    described = {each.name: each for each in function.description.input}
    return tuple(
        _feature(name, type_, _image(described[name]) if name in described else None)
        for name, type_ in function.inputs.items()
    )


def outputs_of(function: Function) -> tuple[Feature, ...]:
    """Return the outputs of a package's function, in the program's order."""
    types = {output.name: output.type for operation in function.block.operations for output in operation.outputs}
    types.update(function.inputs)
    classes = [operation.outputs for operation in function.block.operations if operation.type == "classify"]
    classified = {each.name: dtype for outputs in classes for each, dtype in zip(outputs, CLASSIFIED, strict=False)}
    found = []
    for name in function.block.outputs:
        type_ = types.get(name)
        if type_ is None and name in classified:
            found.append(Feature(name, classified[name], None))
            continue
        if type_ is None:
            raise InputError(f"the output '{name}' is computed by nothing, or is no tensor")
        found.append(_feature(name, type_, None))
    return tuple(found)


def arrays(features: tuple[Feature, ...], given: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the arrays of every input; other names are ignored.

    Raises:
        InputError: One is missing or does not fit.
    """
    found = {}
    for feature in features:
        if feature.name not in given:
            hint = did_you_mean(feature.name, given) if given else ""
            raise InputError(f"the input '{feature.name}' is missing", hint=hint)
        found[feature.name] = feature.array(given[feature.name])
    return found


def _feature(name: str, type_: TensorType, image: Image | None) -> Feature:
    return Feature(name, type_.element.dtype.name, type_.shape, image)


def _image(description: Any) -> Image | None:
    if description.type.WhichOneof("Type") != "imageType":
        return None
    image = description.type.imageType
    spaces = toolkit.proto().FeatureTypes__pb2.ImageFeatureType.ColorSpace
    return Image(str(spaces.Name(image.colorSpace)), int(image.height), int(image.width))
