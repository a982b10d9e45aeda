"""Every pass's golden file: both sides of each pair are executed, and a second run changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from optkit.plugins import pass_class
from optkit.testing import Golden, check_golden, read_golden

FILES = sorted((Path(__file__).parent / "passes").glob("*.txt"))
CASES = [pytest.param(path, case, id=f"{path.stem}: {case.title}") for path in FILES for case in read_golden(path)]


@pytest.mark.parametrize(("path", "case"), CASES)
def test_golden(path: Path, case: Golden) -> None:
    check_golden(case, pass_class(path.stem.replace("_", "-")))
