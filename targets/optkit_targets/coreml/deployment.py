"""Deployment targets: which iOS a package is written for."""

from __future__ import annotations

import re

from optkit.errors import InputError
from optkit.target import Target

OLDEST, NEWEST = 15, 18  # iOS 15 brought ML Programs
MACOS = {15: "macOS 12", 16: "macOS 13", 17: "macOS 14", 18: "macOS 15"}  # of the same year


def deployments(target: Target) -> range:
    """Return the deployment targets to try, oldest first: one where the user names it.

    Raises:
        InputError: The name is none of iOS15 to iOS18.
    """
    wanted = target.options.get("deployment_target")
    if not wanted:
        return range(OLDEST, NEWEST + 1)
    found = re.fullmatch(r"(?:iOS)?(\d+)", str(wanted), re.IGNORECASE)
    number = int(found.group(1)) if found else 0
    if not OLDEST <= number <= NEWEST:
        known = ", ".join(f"iOS{number}" for number in range(OLDEST, NEWEST + 1))
        raise InputError(f"no deployment target '{wanted}'", hint=f"known: {known}")
    return range(number, number + 1)
