"""optkit compiles a trained model for a device and says what it costs there and how accurate it still is.

The public names are loaded on first use, so that ``import optkit`` and ``optkit --help`` stay fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optkit.compiler import compile  # noqa: A004  # the public name of the main job
    from optkit.errors import (
        BudgetError,
        GateError,
        InputError,
        MissingDependencyError,
        OptkitError,
        VerificationError,
    )
    from optkit.evaluate.metrics import Metric
    from optkit.model.loading import load, save
    from optkit.pipeline import Context, Effect, Pass, Pipeline, Remark
    from optkit.report.contents import Report
    from optkit.target import Target, load_target

__version__ = "0.1.0"

_HOME = {
    "BudgetError": "errors",
    "Context": "pipeline",
    "Effect": "pipeline",
    "GateError": "errors",
    "InputError": "errors",
    "Metric": "evaluate.metrics",
    "MissingDependencyError": "errors",
    "OptkitError": "errors",
    "Pass": "pipeline",
    "Pipeline": "pipeline",
    "Remark": "pipeline",
    "Report": "report.contents",
    "Target": "target",
    "VerificationError": "errors",
    "compile": "compiler",
    "load": "model.loading",
    "load_target": "target",
    "save": "model.loading",
}

__all__ = [
    "BudgetError",
    "Context",
    "Effect",
    "GateError",
    "InputError",
    "Metric",
    "MissingDependencyError",
    "OptkitError",
    "Pass",
    "Pipeline",
    "Remark",
    "Report",
    "Target",
    "VerificationError",
    "__version__",
    "compile",
    "load",
    "load_target",
    "save",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"optkit.{_HOME[name]}"), name)
    raise AttributeError(f"module 'optkit' has no attribute {name!r}")
