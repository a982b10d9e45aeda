"""What the pipeline holds a pass to: the outputs within its effect, the interface untouched, no change in silence."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from optkit.errors import VerificationError
from optkit.evaluate.fidelity import Fidelity, Outputs, compare, relative_error
from optkit.model.check_graph import all_graphs, schema
from optkit.session import CannotRunError, run_samples, run_with_intermediates

if TYPE_CHECKING:
    from optkit.pipeline import Effect, Pass

Inputs = Mapping[str, np.ndarray]

# Rounding differently moves an output by some units in the last place, however small a tolerance is declared:
# 32 of them are 0.03 in float16 and 0.25 in bfloat16.
ROUNDINGS = 32


class OutputCheck:
    """Runs the model after each pass and compares its outputs with those before the pass and of the original.

    Args:
        model: The model before any pass.
        samples: Inputs to run it on; each maps input names to arrays.

    Attributes:
        unverified: Why nothing can be compared, or empty: no samples, the model does not run here, or two runs of it
            differ.
    """

    def __init__(self, model: ir.Model, samples: Sequence[Inputs]) -> None:
        self.samples = samples
        self.unverified = "" if samples else "no sample inputs"
        self._original: list[Outputs] = []
        self._silent: list[str] = []  # passes since the last run that remarked on no change
        if samples:
            try:
                self._original = run_samples(model, samples)
                self.unverified = _randomness(model, samples[0])
            except CannotRunError as error:
                self.unverified = str(error)
        self._latest = self._original

    def check(self, pass_: Pass, before: ir.Model, after: ir.Model, *, applied: bool) -> tuple[float, Fidelity]:
        """Return the largest relative error that a pass caused, and the fidelity against the original after it.

        A pass without an ``applied`` remark is taken at its word; the next run of the model would show otherwise.

        Raises:
            VerificationError: The pass, or a silent one before it, moved an output further than it declares.
        """
        if not applied:
            self._silent.append(pass_.name())
            return 0.0, compare(self._original, self._latest)
        try:
            outputs = run_samples(after, self.samples)
        except CannotRunError as error:
            raise VerificationError(f"the model no longer runs after pass '{pass_.name()}': {error}") from error
        errors = _errors(self._latest, outputs)
        change, allowed = max(errors, default=0.0), tolerance(pass_.effect, before)
        if pass_.effect.kind != "lossy" and not change <= allowed:
            if self._silent:
                self._compare_silent(before)
            raise VerificationError(
                f"pass '{pass_.name()}' moved an output by {change:.2g} relative, "
                f"more than its declared {allowed:g} ({pass_.effect.kind})",
                where=first_difference(before, after, self.samples[errors.index(change)], allowed),
                hint="this is a defect of the pass: leave it out of the recipe and report it",
            )
        self._latest, self._silent = outputs, []
        return change, compare(self._original, outputs)

    def finish(self, model: ir.Model) -> None:
        """Run the model once more where the last passes remarked on no change.

        Raises:
            VerificationError: The outputs moved all the same.
        """
        if self._silent and not self.unverified:
            self._compare_silent(model)

    def _compare_silent(self, model: ir.Model) -> None:
        names = ", ".join(f"'{name}'" for name in self._silent)
        try:
            change = max(_errors(self._latest, run_samples(model, self.samples)), default=0.0)
        except CannotRunError as error:
            raise VerificationError(f"the model no longer runs after {names}: {error}") from error
        if change:
            raise VerificationError(
                f"an output moved by {change:.2g} relative, but none of the passes that ran since the last "
                f"comparison remarked on a change: {names}",
                hint="this is a defect of one of them: a strict run names it",
            )


def _errors(a: Sequence[Outputs], b: Sequence[Outputs]) -> list[float]:
    """Return the largest relative error of each sample's outputs."""
    return [max((relative_error(x[name], y[name]) for name in x), default=0.0) for x, y in zip(a, b, strict=True)]


def _randomness(model: ir.Model, sample: Inputs) -> str:
    """Return which output differs between two runs of the model, as a sentence, or nothing.

    Only a model with an operator that ONNX calls non-deterministic, or of a domain that it does not know, is run again,
    in one session: there a generator moves on, while a new session may start it where the last one did.
    """
    opset = model.opset_imports.get("", 0)
    nodes = [node for node in model.graph.all_nodes() if node.domain or _may_be_random(node.op_type, opset)]
    if not nodes:
        return ""
    first, again = run_samples(model, [sample, sample])
    for name in first:
        if relative_error(first[name], again[name]):
            operators = ", ".join(sorted({node.op_type for node in nodes}))
            return f"two runs of the original differ at output '{name}' (it has {operators})"
    return ""


def _may_be_random(op_type: str, opset: int) -> bool:
    operator = schema(op_type, opset)
    return operator is None or bool(getattr(operator, "non_deterministic", True))


def tolerance(effect: Effect, model: ir.Model) -> float:
    """Return the largest relative change that an effect allows a model that computes in the types this one does."""
    if effect.kind == "lossy":
        return effect.rtol
    # exact ones too: onnxruntime runs float16 nodes without a kernel in float32, and rounds only where those end
    dtypes = {value.dtype for node in model.graph.all_nodes() for value in node.outputs if value.dtype is not None}
    units = {ir.DataType.FLOAT16: 2.0**-10, ir.DataType.BFLOAT16: 2.0**-7}
    return max([effect.rtol, *(ROUNDINGS * unit for dtype, unit in units.items() if dtype in dtypes)])


def interface(model: ir.Model) -> list[str]:
    """Return what a caller sees of the model and no pass may change: its inputs and outputs, each in words."""
    inputs = [
        f"input '{value.name}' ({value.dtype}{', with a default' if value.is_initializer() else ''})"
        for value in model.graph.inputs
    ]
    return inputs + [f"output '{value.name}' ({value.dtype})" for value in model.graph.outputs]


def check_interface(pass_: Pass, before: Sequence[str], after: Sequence[str]) -> None:
    """Compare two results of ``interface``.

    Raises:
        VerificationError: They differ.
    """
    gone = [f"{words} is gone" for words in before if words not in after]
    new = [f"{words} is new" for words in after if words not in before]
    if gone or new or list(before) != list(after):
        what = ", ".join([*gone, *new]) or "their order is another"
        raise VerificationError(
            f"pass '{pass_.name()}' changed the model's inputs or outputs: {what}",
            hint="this is a defect of the pass: leave it out of the recipe and report it",
        )


def fingerprint(model: ir.Model) -> str:
    """Return a digest of everything that a pass can change but inferred shapes, every tensor's bytes included."""
    digest = hashlib.sha256()
    shell = model.clone()
    for graph in shell.graphs():
        for name, value in graph.initializers.items():
            if value.const_value is not None:
                digest.update(f"{name} {value.const_value.dtype} {value.const_value.shape}".encode())
                digest.update(value.const_value.tobytes())
        graph.initializers.clear()
    proto = ir.to_proto(shell)
    for body in all_graphs(proto.graph):
        body.ClearField("value_info")
    digest.update(proto.SerializeToString(deterministic=True))
    return digest.hexdigest()


def first_difference(before: ir.Model, after: ir.Model, sample: Inputs, rtol: float) -> str:
    """Return the name of the first tensor, in execution order, whose value differs between two models.

    Only tensors that both models compute under the same name can be compared.
    """
    wanted = [value.name for node in before.graph for value in node.outputs if value.name]
    kept = {value.name for node in after.graph for value in node.outputs}
    names = [name for name in wanted if name in kept]
    try:
        old, new = (run_with_intermediates(model, sample, names) for model in (before, after))
    except CannotRunError:
        return "the first differing tensor cannot be told, since the intermediate values cannot be read"
    for name in names:
        error = relative_error(old[name], new[name]) if name in old and name in new else 0.0
        if not error <= rtol:
            return f"first differing tensor '{name}' (relative error {error:.2g})"
    return "no tensor known to both models differs"
