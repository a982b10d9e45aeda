"""From pixels to a model's input: the keys of ``preprocess.toml``, and the arithmetic behind them."""

from __future__ import annotations

import tomllib
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from PIL import Image
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from optkit.errors import InputError, did_you_mean

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp"})
RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def _number(value: Any) -> Any:
    """Read ``"1/255"`` as the quotient: a reciprocal has no exact decimal."""
    if not isinstance(value, str):
        return value
    above, slash, below = value.partition("/")
    try:
        return float(Fraction(above) / Fraction(below if slash else "1"))
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError("not a number or a quotient such as '1/255'") from error


def _per_channel(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else (value,)


def _pair(value: Any) -> Any:
    return (value, value) if isinstance(value, int) else value


Number = Annotated[float, BeforeValidator(_number)]
PerChannel = Annotated[tuple[Number, ...], BeforeValidator(_per_channel)]
Size = Annotated[tuple[PositiveInt, PositiveInt], BeforeValidator(_pair)]  # width, height; one number: a square


class Preprocess(BaseModel):
    """How an image becomes a model's input; the keys of ``preprocess.toml``, applied in this order.

    Geometry: at most one of the three ``resize`` keys, then ``crop`` from the centre. Values, per channel, computed in
    double precision and rounded once to the type of the model's input::

        y = (pixel * scale - mean) / std

    Attributes:
        input: The model's input; may be left out where it has only one.
        array: The array in the ``.npz`` file that holds the images; by default the one named like the input, or the
            only one beside the labels.
        array_layout: How arrays of images are laid out; by default NHWC for four axes and NHW for three.
        channels: What the model expects; images are read as RGB or grey (``L``), arrays are taken to be RGB or grey.
        resize_short: Length of the shorter side, aspect ratio kept.
        resize_long: Length of the longer side, aspect ratio kept.
        resize: Width and height, aspect ratio not kept.
        resample: Filter for resizing.
        crop: Width and height cut from the centre.
        pad: Pixel value around an image that is smaller than ``crop``; without it such an image is refused.
        layout: Order of the axes that the model expects.
        scale: Factor on the pixel value 0 to 255, a number or a quotient such as ``"1/255"``.
        mean: Subtracted after scaling; one number, or one per channel in the order of ``channels``.
        std: Divides at last; likewise.
        labels: A ``.csv`` file with labels, relative to the data's folder or to this file's.
        label_column: The column to read in it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    input: str | None = None
    array: str | None = None
    array_layout: Literal["NHWC", "NCHW", "NHW", "HWC", "CHW", "HW"] | None = None
    channels: Literal["RGB", "BGR", "L"] = "RGB"
    resize_short: PositiveInt | None = None
    resize_long: PositiveInt | None = None
    resize: Size | None = None
    resample: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bilinear"
    crop: Size | None = None
    pad: Annotated[int, Field(ge=0, le=255)] | None = None
    layout: Literal["NCHW", "NHWC", "NHW"] = "NCHW"
    scale: Number = 1.0
    mean: PerChannel = (0.0,)
    std: PerChannel = (1.0,)
    labels: str | None = None
    label_column: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Preprocess:
        depth = 1 if self.channels == "L" else 3
        for name in ("mean", "std"):
            if len(getattr(self, name)) not in (1, depth):
                raise ValueError(f"'{name}' has {len(getattr(self, name))} numbers for {depth} channels")
        if 0.0 in self.std:
            raise ValueError("'std' must not be 0")
        if sum(key is not None for key in (self.resize, self.resize_short, self.resize_long)) > 1:
            raise ValueError("give only one of 'resize', 'resize_short' and 'resize_long'")
        if self.pad is not None and self.crop is None:
            raise ValueError("'pad' surrounds images that are smaller than 'crop', which is not set")
        if self.layout == "NHW" and self.channels != "L":
            raise ValueError("layout 'NHW' needs channels = 'L'")
        return self

    def read(self, file: Path, dtype: np.dtype[Any]) -> np.ndarray:
        """Return an image file as one sample without its leading axis.

        Raises:
            InputError: The file is not a readable image, or does not suit ``crop``.
        """
        try:
            with Image.open(file) as image:
                if image.mode.startswith(("I", "F")):
                    raise InputError(f"pixels of mode '{image.mode}' are not 8-bit", where=str(file))
                resized = self._resized(image.convert("L" if self.channels == "L" else "RGB"), str(file))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise InputError(f"not a readable image: {error}", where=str(file)) from error
        return self._values(resized, dtype)

    def convert(self, pixels: np.ndarray, dtype: np.dtype[Any], where: str) -> np.ndarray:
        """Return uint8 pixels [height, width, channels] as one sample without its leading axis.

        Raises:
            InputError: The channels are not those that ``channels`` needs, or the size does not suit ``crop``.
        """
        depth = 1 if self.channels == "L" else 3
        if pixels.shape[-1] != depth:
            what = f"images have {pixels.shape[-1]} channels where channels = '{self.channels}' needs {depth}"
            raise InputError(what, where=where, hint="set 'array_layout' or 'channels' in preprocess.toml")
        image = Image.fromarray(np.ascontiguousarray(pixels[..., 0] if depth == 1 else pixels))
        return self._values(self._resized(image, where), dtype)

    def _resized(self, image: Image.Image, where: str) -> Image.Image:
        width, height = image.size
        side = self.resize_short or self.resize_long
        if side is not None:
            factor = Fraction(side, (min if self.resize_short else max)(width, height))
            width, height = (max(1, round(length * factor)) for length in image.size)
        elif self.resize is not None:
            width, height = self.resize
        if (width, height) != image.size:
            image = image.resize((width, height), RESAMPLING[self.resample])
        if self.crop is None:
            return image
        crop_width, crop_height = self.crop
        if (crop_width > width or crop_height > height) and self.pad is None:
            what = f"the image is {width}x{height}, smaller than the crop of {crop_width}x{crop_height}"
            raise InputError(what, where=where, hint="set 'resize_short', or 'pad' to fill the rest")
        left, top = (width - crop_width) // 2, (height - crop_height) // 2
        if left < 0 or top < 0:
            canvas = Image.new(image.mode, (max(width, crop_width), max(height, crop_height)), _grey(image, self.pad))
            canvas.paste(image, (max(-left, 0), max(-top, 0)))
            image, left, top = canvas, max(left, 0), max(top, 0)
        return image.crop((left, top, left + crop_width, top + crop_height))

    def _values(self, image: Image.Image, dtype: np.dtype[Any]) -> np.ndarray:
        """Look up y for each of the 256 pixel values: [H, W, C] uint8 -> ``layout`` without N, ``dtype``."""
        pixels = np.asarray(image).reshape(image.height, image.width, -1)
        if self.channels == "BGR":
            pixels = pixels[..., ::-1]
        tables = self._tables(pixels.shape[-1], dtype)
        planes = [table[pixels[..., channel]] for channel, table in enumerate(tables)]
        return planes[0] if self.layout == "NHW" else np.stack(planes, axis=0 if self.layout == "NCHW" else -1)

    def _tables(self, depth: int, dtype: np.dtype[Any]) -> np.ndarray:
        """Return y for each channel and pixel value, [C, 256]."""
        mean, std = (np.broadcast_to(np.array(v), depth)[:, None] for v in (self.mean, self.std))
        tables = (np.arange(256) * self.scale - mean) / std
        if dtype.kind not in "iu":
            return np.asarray(tables.astype(dtype))
        rounded = np.rint(tables)
        limits = np.iinfo(dtype)
        if np.abs(tables - rounded).max() > 1e-6 or rounded.min() < limits.min or rounded.max() > limits.max:
            what = f"'scale', 'mean' and 'std' give {tables.min():g} to {tables.max():g}, which {dtype} does not hold"
            raise InputError(what, where="preprocess.toml", hint="choose them so that every pixel value is an integer")
        return np.asarray(rounded.astype(dtype))


def as_images(array: np.ndarray, layout: str | None, where: str) -> np.ndarray:
    """Return an array of images as a view [n, height, width, channels].

    Args:
        array: Images, or one image.
        layout: Its axes; None: NHWC for four axes, NHW for three, HW for two.
        where: Named in errors.

    Raises:
        InputError: The array has another number of axes.
    """
    letters = layout or {2: "HW", 3: "NHW", 4: "NHWC"}.get(array.ndim, "NHWC")
    if len(letters) != array.ndim:
        what = f"shape {list(array.shape)} has {array.ndim} axes where array_layout '{letters}' has {len(letters)}"
        raise InputError(what, where=where, hint="set 'array_layout' in preprocess.toml")
    images = array.transpose([letters.index(axis) for axis in "NHWC" if axis in letters])
    images = images if "N" in letters else images[None]
    return images if "C" in letters else images[..., None]


def _grey(image: Image.Image, value: int | None) -> int | tuple[int, ...]:
    level = value or 0
    return level if image.mode == "L" else (level,) * 3


def read_preprocess(file: Path) -> Preprocess:
    """Read a ``preprocess.toml``.

    Raises:
        InputError: The file is missing, not TOML, or holds a key or a value that is not understood.
    """
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"not a readable TOML file: {error}", where=str(file)) from error
    try:
        return Preprocess.model_validate(table)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0]) if first["loc"] else ""
        if first["type"] == "extra_forbidden":
            raise InputError(
                f"no key '{key}'", where=str(file), hint=did_you_mean(key, Preprocess.model_fields)
            ) from error
        message = first["msg"].removeprefix("Value error, ")
        message = message[0].lower() + message[1:]
        what = f"'{key}' = {first['input']!r}: {message}" if key else message
        raise InputError(what, where=str(file)) from error
