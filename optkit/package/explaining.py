"""What the remarks of a package say about one node."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from optkit.errors import InputError, did_you_mean
from optkit.pipeline import Remark


def remarks_about(remarks: Sequence[Remark], node: str) -> list[Remark]:
    """Return the remarks whose node is ``node``, or matches it as a glob, in the order in which they were made.

    Raises:
        InputError: No remark is about such a node.
    """
    exact = [remark for remark in remarks if remark.node == node]
    found = exact or [remark for remark in remarks if fnmatch.fnmatchcase(remark.node, node)]
    if not found:
        names = {remark.node for remark in remarks if remark.node}
        close = did_you_mean(node, names)
        hint = close if close.startswith("did you mean") else "a glob such as '*' lists all of them"
        raise InputError(f"no remark is about a node '{node}'", hint=hint)
    return found
