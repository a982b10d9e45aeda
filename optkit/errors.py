"""The errors a user can meet: what happened, where, and what to do; each class is one exit code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar


class OptkitError(Exception):
    """A sentence for the user.

    Args:
        what: What happened, as a sentence without a trailing period.
        where: The file, node or tensor it happened at.
        hint: What to do about it.
    """

    exit_code: ClassVar[int] = 2

    def __init__(self, what: str, *, where: str = "", hint: str = "") -> None:
        self.what, self.where, self.hint = what, where, hint
        super().__init__(what, where, hint)

    def __str__(self) -> str:
        located = f"{self.where}: {self.what}" if self.where else self.what
        return f"{located}; {self.hint}" if self.hint else located

    def to_dict(self) -> dict[str, object]:
        """Return the error as the object that ``--json`` prints."""
        return {"error": self.what, "where": self.where, "hint": self.hint, "exit_code": self.exit_code}


class InputError(OptkitError):
    """A model, data set, recipe, target or option that cannot be used as given (exit code 2)."""


class GateError(OptkitError):
    """The work was done, and a gate that the user set was not met (exit code 1)."""

    exit_code = 1


class BudgetError(OptkitError):
    """No configuration meets the budgets (exit code 3)."""

    exit_code = 3


class VerificationError(OptkitError):
    """A result does not agree with the original; nothing was written (exit code 4)."""

    exit_code = 4


class MissingDependencyError(OptkitError):
    """Something optional is not installed (exit code 5)."""

    exit_code = 5


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``"did you mean 'x'?"`` for the closest known words, else the list of what is known."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(f"'{name}'" for name in close) + "?"
    return "known: " + ", ".join(known) if known else ""
