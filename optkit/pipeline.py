"""Passes, remarks, and the pipeline that runs passes and checks each one against the model before it."""

from __future__ import annotations

import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import numpy as np
import onnx_ir as ir
from pydantic import BaseModel, ConfigDict

from optkit.errors import OptkitError, VerificationError

if TYPE_CHECKING:
    from optkit.dataset.samples import Samples
    from optkit.evaluate.fidelity import Fidelity
    from optkit.target import Target

T = TypeVar("T")
Inputs = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Effect:
    """How far a pass may move the outputs.

    ``exact``: bit-equal. ``reassociate``: the same real function, rounded differently, so that
    ``max|a - b| <= rtol * max|a|`` for every output, but never less than 32 units of the coarsest type that
    the model computes in. ``lossy``: the error is recorded, not bounded.
    """

    kind: Literal["exact", "reassociate", "lossy"]
    rtol: float = 0.0

    @staticmethod
    def reassociate(rtol: float = 1e-5) -> Effect:
        """Return the effect of a pass that only changes the order of rounding."""
        return Effect("reassociate", rtol)


STANDARD_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "ai.onnx.training", "ai.onnx.preview.training"})

EXACT = Effect("exact")
LOSSY = Effect("lossy")


@dataclass(frozen=True)
class Remark:
    """What a pass did, or why it did not, at one node. The only record of change."""

    kind: Literal["applied", "missed"]
    pass_name: str
    node: str
    op_type: str
    message: str


def _no_progress(items: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
    return items


@dataclass
class Context:
    """What a pass may read (target, calibration samples), and where it reports what it did.

    Attributes:
        target: The device the model is compiled for, or None.
        calibration: Calibration samples, or None when none were given.
        remarks: Every remark so far, in order.
        track: Wraps an iterable in a progress display: ``track(items, description, total)``.
    """

    target: Target | None = None
    calibration: Samples | None = None
    remarks: list[Remark] = field(default_factory=list)
    track: Callable[..., Any] = _no_progress
    pass_name: str = ""

    def applied(self, where: ir.Node | ir.Value | str, message: str) -> None:
        """Record that the current pass changed the model at ``where``."""
        self._remark("applied", where, message)

    def missed(self, where: ir.Node | ir.Value | str, message: str) -> None:
        """Record that the current pass left ``where`` alone, and why."""
        self._remark("missed", where, message)

    def _remark(self, kind: Literal["applied", "missed"], where: ir.Node | ir.Value | str, message: str) -> None:
        name = where if isinstance(where, str) else where.name or ""
        op_type = where.op_type if isinstance(where, ir.Node) else ""
        self.remarks.append(Remark(kind, self.pass_name, name, op_type, message))


class Pass(BaseModel, ABC):
    """Rewrites a model in place: its fields are its options, its docstring is its help, ``run`` is the work.

    A pass reports every change with ``context.applied`` and every refusal with ``context.missed``, and declares in
    ``effect`` how far it may move the outputs.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    effect: ClassVar[Effect] = EXACT

    @classmethod
    def name(cls) -> str:
        """Return the name used in recipes and on the command line: ``FuseGelu`` is ``fuse-gelu``."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", cls.__name__).lower()

    @abstractmethod
    def run(self, model: ir.Model, context: Context) -> None:
        """Rewrite ``model`` in place and remark on what was done and what was not."""


@dataclass(frozen=True)
class Step:
    """One pass as it ran.

    Attributes:
        pass_name: The pass.
        options: Its options, defaults included.
        effect: Its declared effect.
        applied: Number of ``applied`` remarks.
        missed: Number of ``missed`` remarks.
        nodes_before: Nodes in the model, bodies included, before the pass.
        nodes_after: The same after it.
        change: Largest relative error of any output against the model before the pass; None if it was not run.
        fidelity: Outputs against the original model, after this pass; None if it was not run.
        seconds: Wall time of the pass itself, without its verification. Never written into a package.
    """

    pass_name: str
    options: dict[str, Any]
    effect: Effect
    applied: int
    missed: int
    nodes_before: int
    nodes_after: int
    change: float | None
    fidelity: Fidelity | None
    seconds: float


@dataclass(frozen=True)
class PipelineResult:
    """The steps that ran, and why the model could not be executed for verification, if it could not."""

    steps: tuple[Step, ...]
    unverified: str = ""


class Pipeline:
    """Runs passes in order and checks each one numerically on sample inputs within its declared effect.

    Args:
        passes: The passes, in the order in which they run.
        strict: Also compare the model before and after each pass, and fail on a change without a remark.
    """

    def __init__(self, passes: Sequence[Pass], *, strict: bool = False) -> None:
        self.passes = tuple(passes)
        self.strict = strict

    def run(self, model: ir.Model, context: Context, samples: Sequence[Inputs] = ()) -> PipelineResult:
        """Run every pass on ``model`` in place.

        Args:
            model: The model; changed in place.
            context: Target and calibration data; receives the remarks.
            samples: Inputs to verify on; each maps input names to arrays. Empty: nothing is executed.

        Raises:
            VerificationError: A pass failed, moved the outputs further than it declared, changed the model's
                inputs or outputs, or (strict) changed something without a remark.
        """
        from optkit.pass_check import OutputCheck, check_interface, fingerprint, interface

        steps: list[Step] = []
        outputs = OutputCheck(model, samples)
        signature = interface(model)
        for pass_ in self.passes:
            context.pass_name = pass_.name()
            before = None if outputs.unverified else model.clone()
            digest = fingerprint(model) if self.strict else ""
            mark, nodes_before = len(context.remarks), count_nodes(model)
            start = time.perf_counter()
            self._run_pass(pass_, model, context, steps)
            seconds = time.perf_counter() - start
            applied = sum(remark.kind == "applied" for remark in context.remarks[mark:])
            check_interface(pass_, signature, interface(model))
            if self.strict and not applied and fingerprint(model) != digest:
                raise VerificationError(
                    f"pass '{pass_.name()}' changed the model without an 'applied' remark",
                    hint="this is a defect of the pass: leave it out of the recipe and report it",
                )
            change, fidelity = (
                outputs.check(pass_, before, model, applied=applied > 0) if before is not None else (None, None)
            )
            steps.append(
                Step(
                    pass_.name(),
                    pass_.model_dump(mode="json"),
                    pass_.effect,
                    applied,
                    len(context.remarks) - mark - applied,
                    nodes_before,
                    count_nodes(model),
                    change,
                    fidelity,
                    seconds,
                )
            )
        outputs.finish(model)
        return PipelineResult(tuple(steps), outputs.unverified)

    def _run_pass(self, pass_: Pass, model: ir.Model, context: Context, steps: Sequence[Step]) -> None:
        try:
            pass_.run(model, context)
        except OptkitError:
            raise
        except Exception as error:
            ran = ", ".join(step.pass_name for step in steps) or "nothing"
            raise VerificationError(
                f"pass '{pass_.name()}' failed with {type(error).__name__}: {error} (ran before it: {ran})",
                hint="leave it out of the recipe, or run with --debug for the traceback",
            ) from error


def remark_custom(model: ir.Model, context: Context) -> None:
    """Remark on every operator of a domain that ONNX does not define: no pass knows it, so none touches it."""
    context.pass_name = "load"
    for node in model.graph.all_nodes():
        if node.domain not in STANDARD_DOMAINS:
            context.missed(node, f"an operator of the custom domain '{node.domain}': kept as it is")


def count_nodes(model: ir.Model) -> int:
    """Return the number of nodes in the model, If/Loop/Scan bodies included."""
    return sum(1 for _ in model.graph.all_nodes())
