"""Which targets one package can serve: those of one toolchain that every pass treats alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from optkit import plugins
from optkit.errors import InputError
from optkit.precision import Precision
from optkit.target import Target, load_target

ALIKE = ("packager", "dtypes", "static_shapes", "opset", "weights", "activations", "cleanup", "precisions")


def load_targets(targets: Sequence[str | Target], packaging: Mapping[str, Any] | None = None) -> list[Target]:
    """Load targets.

    Args:
        targets: Names, files, or targets as they are.
        packaging: Options of the packager, for this compilation alone, as `optkit.package.contract.Packager.options`.

    Raises:
        InputError: A target cannot be loaded, or its packager has no such option; or there is no target at all.
    """
    devices = [each if isinstance(each, Target) else load_target(each) for each in targets]
    if not devices:
        raise InputError("no target is given", hint="pass --target NAME")
    if not packaging:
        return devices
    for device in devices:
        known = plugins.packager(device.packager).options
        for key in packaging:
            if key not in known:
                hint = f"it has {', '.join(sorted(known))}" if known else "leave it out"
                raise InputError(f"packages for target '{device.name}' have no option '{key}'", hint=hint)
    return [device.model_copy(update={"options": {**device.options, **packaging}}) for device in devices]


def shareable(a: Target, b: Target, precision: str | Precision | None = None) -> str:
    """Return why one package cannot serve both targets; empty if it can."""
    if not plugins.packager(a.packager).shares_packages:
        return f"packages of '{a.name}' serve one target only"
    different = [key for key in ALIKE if getattr(a, key) != getattr(b, key)]
    if different:
        return f"'{a.name}' and '{b.name}' differ in {', '.join(different)}"
    if precision is None and a.default_precision != b.default_precision:
        return f"'{a.name}' and '{b.name}' have different default precisions"
    return ""


def require_shareable(devices: Sequence[Target], precision: Precision) -> None:
    """Refuse targets that one package cannot serve.

    Raises:
        InputError: A target differs from the first, or is named twice.
    """
    first, *others = devices
    for number, other in enumerate(others, 1):
        if other.name in [device.name for device in devices[:number]]:
            raise InputError(f"target '{other.name}' is named twice")
        reason = shareable(first, other, precision)
        if reason:
            raise InputError(f"one package cannot serve these targets: {reason}", hint="compile them one by one")


def grouped(targets: Sequence[Target], precision: str | None) -> list[list[Target]]:
    """Return targets in groups that one package each can serve, in the order in which they were named."""
    groups: list[list[Target]] = []
    for target in targets:
        group = next((group for group in groups if not shareable(group[0], target, precision)), None)
        if group is None:
            groups.append([target])
        else:
            group.append(target)
    return groups
