"""Fixtures that several test files share."""

from __future__ import annotations

from pathlib import Path

import pytest

from optkit.target import Target, load_target
from optkit_targets.ort.packager import OrtPackager

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real models, labelled data and reference measurements, beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip("needs the folder 'shared' with real models and data beside the checkout")
    return SHARED


@pytest.fixture
def a53() -> Target:
    return load_target("cortex-a53")


@pytest.fixture
def packager() -> OrtPackager:
    return OrtPackager()
