"""Targets: frozen data read from TOML, every number with its source; read by passes, cost and packagers."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from optkit.errors import InputError, did_you_mean
from optkit.plugins import target_files
from optkit.precision import Precision, check_table, choose, substitute, values_for


class Frozen(BaseModel):
    """A table of the TOML file: unknown keys are refused, values do not change."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Quantity(Frozen):
    """A number and where it comes from.

    ``status`` is ``verified`` (read in the author's own text), ``secondary`` (read in someone else's), ``derived``
    (arithmetic on such), ``unverified`` (from memory or a rule of thumb) or ``user`` (set on the command line).
    """

    value: float
    source: str = Field(min_length=1)
    status: Literal["verified", "secondary", "derived", "unverified", "user"] = "verified"


class MemoryLevel(Frozen):
    """One level of the memory hierarchy; ``bytes`` is its size, ``bytes_per_second`` its read bandwidth, all cores."""

    bytes: Quantity | None = None
    bytes_per_second: Quantity | None = None


class Peak(Frozen):
    """A row of the table of peaks: what a core with this ISA flag does in one cycle, by dtype."""

    isa: str
    macs_per_cycle: Mapping[str, Quantity]


class IntegerFormat(Frozen):
    """How the target's runtime takes integers of one width.

    Attributes:
        dtype: The ONNX element type, ``int8`` or ``uint8`` and so on.
        symmetric: Zero point fixed at 0 (signed) or at the middle (unsigned).
        granularity: What one scale may cover, best first.
        block_size: Accepted block sizes, for ``block`` granularity, best first.
        operators: The forms in which the runtime takes constants of this format, best first: ``MatMulNBits``,
            ``GatherBlockQuantized``, ``DequantizeLinear`` (one per block), ``QDQ`` (one per tensor or channel).
        accuracy_level: How far MatMulNBits may round activations: 4 computes in int8, 0 in the activations' own type.
        accuracy_level_needs_isa: That level is worth it only where the ISA has one of these; elsewhere it is 0.
        reduced_range: Give up range, one bit at most, because kernels add two products in int16 (x86 without VNNI).
        reduced_range_unless_isa: The reduced range is not needed where the ISA has one of these.
    """

    dtype: str
    symmetric: bool
    granularity: tuple[Literal["tensor", "channel", "block"], ...] = ("tensor",)
    block_size: tuple[int, ...] = ()
    operators: tuple[Literal["MatMulNBits", "GatherBlockQuantized", "DequantizeLinear", "QDQ"], ...] = ("QDQ",)
    accuracy_level: int = Field(default=0, ge=0, le=4)
    accuracy_level_needs_isa: tuple[str, ...] = ()
    reduced_range: bool = False
    reduced_range_unless_isa: tuple[str, ...] = ()


class Kernel(Frozen):
    """A row of the kernel table: the first row that matches a piece of work prices it.

    ``efficiency`` is the share of the roofline that the kernel reaches, ``overhead_seconds`` the cost of one call.
    """

    name: str
    op: tuple[str, ...] = ()
    kind: tuple[str, ...] = ()
    dtype: str | None = None
    max_m: int | None = None
    min_k: int | None = None
    efficiency: Quantity
    overhead_seconds: Quantity | None = None


class Energy(Frozen):
    """Energy of the device: power above idle while all cores work, and energy per byte from DRAM."""

    active_watts: Quantity | None = None
    dram_joules_per_byte: Quantity | None = None


class ErrorBand(Frozen):
    """Measured / predicted time over public measurements that the model was not fitted to: 10th, 50th, 90th centile."""

    low: float
    median: float
    high: float
    samples: int
    source: str = Field(min_length=1)


class Opset(Frozen):
    """The range of ai.onnx opsets that the runtime loads; passes that raise the opset say so."""

    min: int = 7
    max: int


class PassSpec(Frozen):
    """A pass by name, with its options, as a recipe lists it."""

    pass_: str = Field(alias="pass")
    options: Mapping[str, Any] = {}

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class Target(Frozen):
    """A device and its runtime, as data.

    Attributes:
        macs_per_cycle: Peak multiply-accumulates per cycle and core, by dtype.
        peak: Peaks that depend on the ISA; the first row whose flag the target has replaces ``macs_per_cycle``.
        memory: Memory levels, innermost first; the last is main memory.
        kernel: The kernel table; first match wins.
        launch_seconds: What one run costs besides its nodes: the call into an accelerator.
        weights: Accepted weight formats by width (``int8``).
        reads_palettes: Whether palettized weights are read as stored; other runtimes expand them on loading a model.
        activations: Accepted activation formats by width; ``dynamic``: those whose ranges are found at run time.
        precisions: Passes that end the pipeline, by the base name of a precision; options may hold placeholders (see
            `optkit.precision.values_for`).
        cleanup: Passes that begin every pipeline.
        default_precision: The precision compiled when the user names none.
        executor: What the packager needs to run the artifact here (its own keys).
        options: Further settings of the packager.
    """

    name: str
    summary: str
    packager: str
    aliases: tuple[str, ...] = ()
    isa: tuple[str, ...] = ()
    detect: bool = False
    cores: Quantity
    clock_hz: Quantity
    macs_per_cycle: Mapping[str, Quantity]
    peak: tuple[Peak, ...] = ()
    memory: Mapping[str, MemoryLevel]
    flash_bytes_per_second: Quantity | None = None
    energy: Energy = Energy()
    dtypes: tuple[str, ...]
    static_shapes: bool = False
    opset: Opset
    weights: Mapping[str, IntegerFormat] = {}
    reads_palettes: bool = False
    activations: Mapping[str, IntegerFormat] = {}
    kernel: tuple[Kernel, ...] = ()
    launch_seconds: Quantity | None = None
    error_band: ErrorBand | None = None
    cleanup: tuple[PassSpec, ...] = ()
    precisions: Mapping[str, tuple[PassSpec, ...]]
    default_precision: str
    executor: Mapping[str, Any] = {}
    options: Mapping[str, Any] = {}

    @cached_property
    def main_memory(self) -> MemoryLevel:
        """The outermost memory level."""
        return list(self.memory.values())[-1]

    @field_validator("precisions")
    @classmethod
    def _base_names(cls, tables: Mapping[str, tuple[PassSpec, ...]]) -> Mapping[str, tuple[PassSpec, ...]]:
        check_table(tables)
        return tables

    def precision(self, name: str | None) -> Precision:
        """Return a precision by name (None: the target's default), checked against what the target takes.

        Raises:
            InputError: The name is malformed, no table has it, or its block size or granularity is not taken.
        """
        return choose(name or self.default_precision, self)

    def recipe_for(self, precision: str | Precision | None) -> tuple[PassSpec, ...]:
        """Return the default pipeline for a precision (None: the target's default), placeholders filled in.

        Raises:
            InputError: The target has no such precision.
        """
        found = precision if isinstance(precision, Precision) else self.precision(precision)
        values = values_for(found, self)
        specs = (s.model_copy(update={"options": substitute(s.options, values)}) for s in self.precisions[found.base])
        return (*self.cleanup, *specs)

    def needs_reduced_range(self, weights: IntegerFormat) -> bool:
        """Whether weights of this format must give up one bit on this target's ISA."""
        return weights.reduced_range and not set(weights.reduced_range_unless_isa) & set(self.isa)


def load_target(spec: str) -> Target:
    """Load a target by name (``cortex-a53``), by file (``./mine.toml``), with overrides (``name:cores=2,...``).

    Raises:
        InputError: No such target or file, an invalid file, a number without a source, or an unknown override.
    """
    name, _, overrides = _split(spec)
    table, where = _resolve(name, ())
    for assignment in filter(None, overrides.split(",")):
        _override(table, assignment, name)
    if table.pop("abstract", False):
        raise InputError(f"'{name}' is a base for other targets, not a device", where=where)
    try:
        target = Target.model_validate(table)
    except ValidationError as error:
        raise InputError(_sentence(error), where=where) from error
    return _choose_levels(_choose_peak(_detect(target) if target.detect else target))


def _choose_levels(target: Target) -> Target:
    """Set the accuracy level of formats to 0 where the ISA lacks what their level needs."""
    fitted = {
        name: format_.model_copy(update={"accuracy_level": 0})
        for name, format_ in target.weights.items()
        if format_.accuracy_level_needs_isa and not set(format_.accuracy_level_needs_isa) & set(target.isa)
    }
    return target.model_copy(update={"weights": {**target.weights, **fitted}}) if fitted else target


def _choose_peak(target: Target) -> Target:
    """Apply the first row of peaks that the ISA allows; what the user set on the command line stays."""
    row = next((row for row in target.peak if row.isa in target.isa), None)
    if row is None:
        return target
    users = {dtype: peak for dtype, peak in target.macs_per_cycle.items() if peak.status == "user"}
    return target.model_copy(update={"macs_per_cycle": {**target.macs_per_cycle, **row.macs_per_cycle, **users}})


def target_names() -> dict[str, str]:
    """Return every installed target's name and summary, bases left out."""
    tables = {name: _read(path) for name, path in sorted(target_files().items())}
    return {name: str(table.get("summary", "")) for name, table in tables.items() if not table.get("abstract")}


def _split(spec: str) -> tuple[str, str, str]:
    if spec.endswith(".toml"):
        return spec, "", ""
    head, colon, tail = spec.rpartition(":")
    return (head, colon, tail) if colon and "=" in tail else (spec, "", "")


def _resolve(name: str, seen: tuple[str, ...]) -> tuple[dict[str, Any], str]:
    """Read a target's table with everything it inherits merged in."""
    if name in seen:
        raise InputError(f"targets inherit from each other in a circle: {' -> '.join([*seen, name])}")
    files = target_files()
    if name.endswith(".toml"):
        path = Path(name)
        if not path.is_file():
            raise InputError("no such target file", where=name)
    elif name in files:
        path = files[name]
    else:
        alias = {alias: n for n, p in files.items() for alias in _read(p).get("aliases", ())}
        if name not in alias:
            raise InputError(f"no target '{name}'", hint=did_you_mean(name, [*target_names(), *alias]))
        path = files[alias[name]]
    table = _read(path)
    parent = table.pop("inherits", None)
    if parent is not None:
        relative = path.parent / str(parent)
        base, _ = _resolve(str(relative) if str(parent).endswith(".toml") else str(parent), (*seen, name))
        base.pop("abstract", None)
        base.pop("aliases", None)
        table = _merge(base, table)
    table.setdefault("name", path.stem)
    return table, str(path) if name.endswith(".toml") else f"target '{name}'"


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"not a readable TOML file: {error}", where=str(path)) from error


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Merge tables key by key; a number with a source and a list are replaced whole."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        tables = isinstance(value, Mapping) and isinstance(old, dict) and "value" not in value
        merged[key] = _merge(old, value) if tables and isinstance(old, dict) else value
    return merged


def _override(table: dict[str, Any], assignment: str, name: str) -> None:
    """Apply ``a.b=value`` to the table; numbers are marked as set by the user."""
    path, _, text = assignment.partition("=")
    *parents, key = path.strip().split(".")
    place: Any = table
    for parent in parents:
        place = place.get(parent) if isinstance(place, dict) else None
    known = list(place) if isinstance(place, dict) else list(table)
    if not isinstance(place, dict) or key not in place:
        raise InputError(f"target '{name}' has no key '{path}'", hint=did_you_mean(key, known))
    try:
        value: Any = tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        value = text
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        quantity = isinstance(place[key], dict) and "value" in place[key]
        place[key] = {"value": value, "source": "--target", "status": "user"} if quantity else value
    else:
        place[key] = value


def _sentence(error: ValidationError) -> str:
    """Say the first thing wrong with a target's table."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    number = isinstance(first["input"], (int, float)) and not isinstance(first["input"], bool)
    if key.endswith("source") or (first["type"] in ("model_type", "model_attributes_type") and number):
        number_key = key.removesuffix(".source")
        return f"the number '{number_key}' has no source; write {number_key} = {{ value = ..., source = \"...\" }}"
    if first["type"] == "missing":
        return f"the key '{key}' is missing"
    if first["type"] == "extra_forbidden":
        return f"unknown key '{key}'"
    return f"'{key}': {first['msg'].lower()}"


def _detect(target: Target) -> Target:
    """Fill in ISA and cores of the machine optkit runs on (``detect = true``)."""
    import os
    import platform

    flags: set[str] = set()
    cpu = Path("/proc/cpuinfo")
    if cpu.is_file():
        for line in cpu.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.split(":")[0].strip() in ("flags", "Features"):
                flags.update(line.partition(":")[2].split())
                break
    isa = (*target.isa, platform.machine(), *sorted(flags))
    if target.cores.status == "user":
        return target.model_copy(update={"isa": isa})
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = Quantity(value=usable, source="the cores this process may use", status="derived")
    return target.model_copy(update={"isa": isa, "cores": cores})
