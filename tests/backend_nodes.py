"""ONNX's own tests of every operator, lowered to Core ML, saved, and run by the interpreter of the saved package.

A case passes, is refused with a reason, or fails. What a case feeds is first lowered as inputs of the model; where that
is refused, all but the first are constants, as weights and settings of real models are. To be quick, cases of one
operator are saved and run as one package, side by side.
"""

from __future__ import annotations

import gc
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.compose
import onnx_ir as ir

from optkit.errors import GateError, InputError
from optkit.model.loading import load
from optkit.pipeline import Context, Pipeline
from optkit.plugins import pass_class
from optkit_targets.coreml.interpreter import load as open_package
from optkit_targets.coreml.lowering.scope import CannotLower, identifier
from optkit_targets.coreml.lowering.table import lacking, table
from optkit_targets.coreml.program import lower, save

DEPLOYMENT = 18
NUMBERS = "biuf"
EXPANDED = " as function"  # models in which an operator is written out by ONNX's definition
CLEANUP = ("fold-constants", "eliminate-dead-code")
TOGETHER = 16  # cases in one package: the time of a conversion grows faster than its program
HALF = {"rtol": 5e-3, "atol": 1e-3}  # of results in float16, whose order of sums is not ONNX's


@dataclass(frozen=True)
class Outcome:
    """How a case ended.

    Attributes:
        case: Its name in ONNX.
        verdict: passed, refused or failed.
        reason: Why it did not pass.
    """

    case: str
    verdict: str
    reason: str = ""


@dataclass(frozen=True)
class Ready:
    """A case that lowers.

    Attributes:
        case: ONNX's case.
        model: Its model, with constants if it needs them.
        fed: What is fed, by input.
        expected: What must come out, by output.
    """

    case: Any
    model: onnx.ModelProto
    fed: dict[str, np.ndarray]
    expected: dict[str, np.ndarray]

    @property
    def opsets(self) -> tuple[tuple[str, int], ...]:
        """Return the versions of the operators: cases with the same ones fit into one model."""
        return tuple(sorted((item.domain, item.version) for item in self.model.opset_import))


@cache
def cases() -> dict[str, list[Any]]:
    """Return ONNX's cases by operator."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.loader import load_model_tests

        found: dict[str, list[Any]] = {}
        operator = ""
        for case in load_model_tests(kind="node"):
            nodes = case.model.graph.node
            if EXPANDED_NAME not in case.name:
                operator = nodes[-1].op_type
            found.setdefault(operator + EXPANDED * (EXPANDED_NAME in case.name), []).append(case)
    gc.freeze()  # coremltools collects garbage at every conversion; these stay
    return found


EXPANDED_NAME = "_expanded"


def operators() -> list[str]:
    """Return the operators of the table."""
    return sorted(table())


def outcomes(operator: str) -> list[Outcome]:
    """Run every case of an operator, those that are written out by its definition too."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        found = [prepared(case) for key in (operator, operator + EXPANDED) for case in cases().get(key, [])]
        ready = [item for item in found if isinstance(item, Ready)]
        ends = [item for item in found if isinstance(item, Outcome)]
        for opsets in dict.fromkeys(item.opsets for item in ready):
            same = [item for item in ready if item.opsets == opsets]
            for first in range(0, len(same), TOGETHER):
                ends += run_together(same[first : first + TOGETHER])
    return ends


def prepared(case: Any, deployment: int = DEPLOYMENT) -> Ready | Outcome:
    """Return a case in the first form that lowers: what it feeds as inputs, or all but the first as constants.

    The latter comes first where one of them is a scalar: a setting.
    """
    inputs, expected = case.data_sets[0]
    if not all(isinstance(array, (np.ndarray, np.generic, onnx.TensorProto)) for array in (*inputs, *expected)):
        return Outcome(case.name, "refused", "its values are no tensors")
    arrays, results = ([_array(item) for item in items] for items in (inputs, expected))
    if any(array.dtype.kind not in NUMBERS for array in (*arrays, *results)):
        return Outcome(case.name, "refused", "its types are no numbers of Core ML")
    reason = "it has no inputs"
    names = [value.name for value in case.model.graph.output]
    counts = [len(arrays), min(len(arrays), 1)]
    for count in dict.fromkeys(counts[::-1] if any(not array.ndim for array in arrays[1:]) else counts):
        fed = {value.name: array for value, array in zip(case.model.graph.input[:count], arrays, strict=False)}
        if not count:
            continue
        model = with_constants(case.model, arrays, count)
        try:
            lowered(model, deployment)
        except (GateError, InputError, CannotLower) as error:
            reason = str(error)
        except Exception as error:
            return Outcome(case.name, "failed", described(error))
        else:
            return Ready(case, model, fed, dict(zip(names, results, strict=True)))
    return Outcome(case.name, "refused", reason)


def _array(value: np.ndarray | np.generic | onnx.TensorProto) -> np.ndarray:
    return onnx.numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.asarray(value)


def with_constants(model: onnx.ModelProto, arrays: Sequence[np.ndarray], count: int) -> onnx.ModelProto:
    """Return a model with all inputs but the first ``count`` as initializers."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    changed.ir_version = max(changed.ir_version, 4)
    for value, array in list(zip(model.graph.input, arrays, strict=True))[count:]:
        changed.graph.initializer.append(onnx.numpy_helper.from_array(array, value.name))
    del changed.graph.input[count:]
    return changed


def lowered(proto: onnx.ModelProto, deployment: int = DEPLOYMENT) -> Any:
    """Return a model's MIL program.

    Raises:
        InputError: The model is refused.
        CannotLower: One of its operators has no lowering.
    """
    with tempfile.TemporaryDirectory() as folder:
        onnx.save(proto, Path(folder) / "model.onnx")
        model: ir.Model = load(Path(folder) / "model.onnx")
    if len(model.graph) > len(proto.graph.output):
        Pipeline([pass_class(name)() for name in CLEANUP]).run(model, Context())
    missing = lacking(list(model.graph.all_nodes()))
    if missing:
        raise CannotLower(f"{missing[0].op_type} has no lowering")
    return lower(model, deployment)


def run_together(ready: list[Ready]) -> list[Outcome]:
    """Run cases as one package; where that fails, each alone."""
    if len(ready) == 1:
        model, names = ready[0].model, [{name: name for name in (*ready[0].fed, *ready[0].expected)}]
    else:
        model, names = merged([item.model for item in ready])
    fed = {
        identifier(own[name]): np.atleast_1d(item.fed[name])
        for item, own in zip(ready, names, strict=True)
        for name in item.fed
    }
    try:
        with tempfile.TemporaryDirectory() as folder:
            package = save(lowered(model), DEPLOYMENT, Path(folder) / "p.mlpackage", half=False, metadata={})
            found = open_package(package).run(fed)
    except Exception as error:
        if len(ready) > 1:
            return [outcome for item in ready for outcome in run_together([item])]
        return [Outcome(ready[0].case.name, "failed", described(error))]
    ends = []
    for item, own in zip(ready, names, strict=True):
        results = {name: found[identifier(own[name])] for name in item.expected}
        problem = difference(item, results)
        ends.append(Outcome(item.case.name, "failed" if problem else "passed", problem))
    return ends


def merged(models: list[onnx.ModelProto]) -> tuple[onnx.ModelProto, list[dict[str, str]]]:
    """Return models side by side as one, and the new names of each one's inputs and outputs.

    Bodies that read values around them are not renamed whole (onnx.compose): such a model fails, and runs alone.
    """
    whole, names = onnx.ModelProto(), []
    whole.CopyFrom(models[0])
    whole.ir_version = max(model.ir_version for model in models)
    whole.graph.Clear()
    whole.graph.name = "cases"
    for place, model in enumerate(models):
        graph = onnx.compose.add_prefix(model, f"c{place}_").graph
        for field in ("node", "input", "output", "initializer", "value_info"):
            getattr(whole.graph, field).extend(getattr(graph, field))
        values = (*model.graph.input, *model.graph.output)
        names.append({value.name: f"c{place}_{value.name}" for value in values})
    return whole, names


def difference(item: Ready, found: dict[str, np.ndarray]) -> str:
    """Return how results differ from what ONNX expects, or nothing."""
    for name, wanted in item.expected.items():
        got = found[name]
        if got.shape != wanted.shape:
            return f"{name} has shape {got.shape}, not {wanted.shape}"
        within = HALF if wanted.dtype == np.float16 else {"rtol": item.case.rtol, "atol": max(item.case.atol, 1e-6)}
        close = np.isclose(got.astype(np.float64), wanted.astype(np.float64), **within, equal_nan=True)
        if not close.all():
            return f"{name} differs in {int((~close).sum())} of {close.size} elements"
    return ""


def described(error: Exception) -> str:
    """Return an exception's kind and first line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
