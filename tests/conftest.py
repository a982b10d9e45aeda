"""Fixtures that several test files share."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real models, labelled data and reference measurements, beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip("needs the folder 'shared' with real models and data beside the checkout")
    return SHARED
