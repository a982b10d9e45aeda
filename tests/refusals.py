"""Errors that tests expect, by their sentence."""

from __future__ import annotations

import re

import pytest

from optkit.errors import InputError


def refused(sentence: str):
    """Expect an `InputError` whose sentence holds this one."""
    return pytest.raises(InputError, match=re.escape(sentence))
