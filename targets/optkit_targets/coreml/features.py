"""What the user may ask of a Core ML package's inputs: images, and sizes that are chosen on the device."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from optkit.errors import InputError
from optkit_targets.coreml import toolkit

LAYOUTS = ("RGB", "BGR", "G")
RANGE, LIST = re.compile(r"(\d+)\.\.(\d+)"), re.compile(r"\d+(?:,\d+)*")


@dataclass(frozen=True)
class ImageInput:
    """An input that takes an image: the model sees ``scale * pixel + bias``, pixels 0 to 255, in ``layout``."""

    name: str
    scale: float = 1.0
    bias: tuple[float, ...] = ()
    layout: str = "RGB"

    @staticmethod
    def parse(text: str) -> ImageInput:
        """Read ``input:scale,bias,RGB``; the bias is one number, or one for each channel joined by ``;``.

        Raises:
            InputError: The text has another form.
        """
        name, colon, rest = text.rpartition(":")
        parts = [part.strip() for part in rest.split(",")]
        try:
            if not colon or not name or len(parts) != 3 or parts[2].upper() not in LAYOUTS:
                raise ValueError
            bias = tuple(float(part) for part in parts[1].split(";"))
            return ImageInput(name, float(parts[0]), bias, parts[2].upper())
        except ValueError as error:
            hint = "for instance image:0.00392,0,RGB, or image:0.017,-2.1;-2.0;-1.8,BGR"
            raise InputError(f"--image takes NAME:SCALE,BIAS,{'|'.join(LAYOUTS)}, not '{text}'", hint=hint) from error

    def core_ml(self, variable: Any) -> Any:
        """Return coremltools' description of the input, a tensor of [1, channels, height, width].

        Raises:
            InputError: The program has no such input, or it is no image.
        """
        channels = 1 if self.layout == "G" else 3
        shape = () if variable is None else tuple(variable.shape)
        if len(shape) != 4 or shape[:2] != (1, channels):
            what = f"'{self.name}' is no input of shape [1, {channels}, height, width]"
            raise InputError(what, hint="name an image input in --image")
        ct = toolkit.coremltools()
        layout = {"RGB": ct.colorlayout.RGB, "BGR": ct.colorlayout.BGR, "G": ct.colorlayout.GRAYSCALE}[self.layout]
        if len(self.bias) not in (1, channels):
            raise InputError(f"--image gives {len(self.bias)} biases for {channels} channels of '{self.name}'")
        bias = list(self.bias) * (channels // len(self.bias))
        return ct.ImageType(
            name=self.name, shape=shape, scale=self.scale, bias=bias if channels > 1 else bias[0], color_layout=layout
        )


@dataclass(frozen=True)
class FlexibleDim:
    """A dimension whose size is chosen on the device: one of ``sizes``, or any from ``low`` to ``high``."""

    name: str
    low: int
    high: int
    sizes: tuple[int, ...] = ()

    @staticmethod
    def parse(text: str) -> FlexibleDim:
        """Read ``T=1..128`` or ``T=16,32,64``; the first size is the default.

        Raises:
            InputError: The text has another form.
        """
        name, _, rest = text.rpartition("=")
        span, listed = RANGE.fullmatch(rest), LIST.fullmatch(rest)
        sizes = tuple(int(size) for size in rest.split(",")) if listed else ()
        low, high = (int(span.group(1)), int(span.group(2))) if span else (min(sizes, default=0), max(sizes, default=0))
        if not name or not 0 < low <= high or len(set(sizes)) != len(sizes):
            raise InputError(f"--flexible takes NAME=LOW..HIGH or NAME=SIZE,SIZE,..., not '{text}'")
        return FlexibleDim(name, low, high, sizes)

    @property
    def default(self) -> int:
        """The size that Core ML assumes until an input says otherwise."""
        return self.sizes[0] if self.sizes else self.low

    def ranged(self) -> Any:
        """Return coremltools' description of a range of sizes."""
        return toolkit.coremltools().RangeDim(self.low, self.high, self.default)


Shape = tuple[int | FlexibleDim, ...]


def flexible_shape(value: ir.Value, dims: Sequence[FlexibleDim]) -> Shape:
    """Return an input's shape, its open dimensions replaced by those that the user has given sizes for.

    Raises:
        InputError: A dimension is open and the user has not named it.
    """
    known = {dim.name: dim for dim in dims}
    shape: list[int | FlexibleDim] = []
    for axis, dim in enumerate(value.shape or ()):
        if isinstance(dim, int):
            shape.append(dim)
            continue
        names = (dim.value or "", f"{value.name}.{axis}")
        found = next((known[name] for name in names if name in known), None)
        if found is None:
            hint = f"set --dim {names[0] or names[1]}=SIZE, or --flexible {names[0] or names[1]}=LOW..HIGH"
            raise InputError(f"dimension {axis} of input '{value.name}' is dynamic", hint=hint)
        shape.append(found)
    return tuple(shape)


def tensor_type(name: str, shape: Shape) -> Any:
    """Return coremltools' description of a tensor input.

    Raises:
        InputError: Listed sizes and ranges are mixed, or lists are of different lengths.
    """
    ct = toolkit.coremltools()
    open_dims = [dim for dim in shape if isinstance(dim, FlexibleDim)]
    listed = {len(dim.sizes) for dim in open_dims}
    if not any(listed):
        return ct.TensorType(name=name, shape=tuple(d if isinstance(d, int) else d.ranged() for d in shape))
    if len(listed) > 1:
        what = f"the flexible dimensions of input '{name}' must all be ranges, or lists of the same length"
        raise InputError(what, hint="Core ML enumerates whole shapes: the sizes of each belong together")
    count = listed.pop()
    shapes = [[d if isinstance(d, int) else d.sizes[number] for d in shape] for number in range(count)]
    return ct.TensorType(name=name, shape=ct.EnumeratedShapes(shapes=shapes, default=shapes[0]))


def check_labels(labels: Sequence[str], outputs: Sequence[Any]) -> None:
    """Refuse class labels that do not fit a classifier's output.

    Raises:
        InputError: There are more or fewer than values, or two are the same, or there are several outputs.
    """
    output, *others = outputs
    if others:
        names = ", ".join(f"'{each.name}'" for each in outputs)
        raise InputError(f"class labels are for a model with one output, and this one has {names}")
    classes = int(output.shape[-1]) if output.shape else 0
    if len(labels) != classes:
        raise InputError(f"{len(labels)} class labels are given, and '{output.name}' has {classes} values")
    if len(set(labels)) != len(labels):
        raise InputError("a class label is given twice")
