"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from optkit.errors import InputError

ModelPath = Annotated[Path, typer.Argument(metavar="MODEL", help="An ONNX file, or a folder that holds one.")]
PackagePath = Annotated[Path, typer.Argument(metavar="PACKAGE", help="A folder that 'optkit compile' wrote.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Dims = Annotated[
    list[str] | None,
    typer.Option("--dim", metavar="NAME=SIZE", help="Fix a dynamic dimension, by name or as INPUT.AXIS; repeatable."),
]
Fixed = Annotated[
    list[str] | None,
    typer.Option("--fix", metavar="INPUT=VALUE", help="Make an input a constant with this value; repeatable."),
]
TargetSpec = Annotated[
    str, typer.Option("--target", "-t", metavar="TARGET", help="A name, a .toml file, or name:key=value,...")
]
Precision = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Bits of weights and activations (w8a8, w4a16) or fp32, fp16, bf16; then -b32 (block size), -c (per "
        "channel), -lut (palettes). 'optkit targets NAME' lists those of a target; its default otherwise.",
    ),
]
Preprocess = Annotated[
    Path | None,
    typer.Option("--preprocess", metavar="TOML", help="How images become inputs; else preprocess.toml in the data."),
]
Executor = Annotated[
    str | None,
    typer.Option("--executor", metavar="KIND", help="native, emulated or simulated; the closest to the target."),
]


def parse_dims(dims: list[str] | None) -> dict[str, int]:
    """Parse ``NAME=SIZE`` pairs.

    Raises:
        InputError: A pair has another form.
    """
    parsed = {}
    for pair in dims or []:
        name, equals, size = pair.rpartition("=")
        if not equals or not name or not size.isascii() or not size.isdigit():
            raise InputError(f"--dim takes NAME=SIZE, not '{pair}'", hint="for instance --dim batch=1")
        parsed[name] = int(size)
    return parsed


def parse_fixed(assignments: list[str] | None) -> dict[str, float]:
    """Parse ``INPUT=VALUE`` pairs.

    Raises:
        InputError: A pair has another form.
    """
    parsed = {}
    for pair in assignments or []:
        name, equals, text = pair.rpartition("=")
        try:
            if not equals or not name:
                raise ValueError
            parsed[name] = float(text)
        except ValueError as error:
            raise InputError(f"--fix takes INPUT=VALUE, not '{pair}'", hint="for instance --fix rate=16000") from error
    return parsed


def parse_set(assignments: list[str] | None) -> dict[str, object]:
    """Parse ``PASS.OPTION=VALUE``; the value is TOML (``3``, ``true``, ``[1, 2]``), or else text.

    Raises:
        InputError: An assignment has another form.
    """
    import tomllib

    parsed: dict[str, object] = {}
    for assignment in assignments or []:
        key, equals, text = assignment.partition("=")
        if not equals or "." not in key.strip("."):
            raise InputError(f"--set takes PASS.OPTION=VALUE, not '{assignment}'")
        try:
            parsed[key] = tomllib.loads(f"x = {text}")["x"]
        except tomllib.TOMLDecodeError:
            parsed[key] = text
    return parsed


def parse_bytes(text: str | None, option: str) -> int | None:
    """Parse a size such as ``8MB``, ``512 KiB`` or ``4096``; MB is 10^6 bytes, MiB is 2^20.

    Raises:
        InputError: The text is no size.
    """
    units = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
    return None if text is None else int(_number(text, units, option, "8MB"))


def parse_seconds(text: str | None, option: str) -> float | None:
    """Parse a duration such as ``30ms``, ``1.5s`` or ``200us``.

    Raises:
        InputError: The text is no duration.
    """
    return None if text is None else _number(text, {"s": 1, "ms": 1e-3, "us": 1e-6}, option, "30ms")


def parse_share(text: str | None, option: str) -> float | None:
    """Parse a share such as ``1%`` or ``0.01``.

    Raises:
        InputError: The text is no share.
    """
    return None if text is None else _number(text, {"": 1, "%": 1e-2}, option, "1%")


def _number(text: str, units: dict[str, float] | dict[str, int], option: str, example: str) -> float:
    digits = text.strip().rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ%")
    unit = text.strip()[len(digits) :].lower()
    try:
        value = float(digits)
    except ValueError:
        value = -1.0
    if unit not in units or not 0 <= value < float("inf"):
        raise InputError(f"{option} takes a value such as {example}, not '{text}'")
    return value * units[unit]
