"""The conformance kit: what every pass must hold to, tried on a zoo of small models.

Each check returns what is wrong, or nothing; the first line of its docstring is what it asks, as it is printed.
"""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from pydantic import ValidationError

from optkit.authoring.zoo import MARK, Trial, attempt, context_for, inputs_for, marked, run, zoo
from optkit.errors import InputError, VerificationError
from optkit.evaluate.fidelity import relative_error
from optkit.model.loading import load, save
from optkit.pass_check import fingerprint, interface, tolerance
from optkit.pipeline import Effect, Pass, Pipeline
from optkit.plugins import pass_class
from optkit.session import CannotRunError, run_samples

MOST_NAMED = 3  # models named in one problem
STANDARD_DOMAINS = ("", "ai.onnx")


@dataclass(frozen=True)
class Result:
    """One check: its name, what it asks or found, and what is wrong (empty: nothing)."""

    check: str
    detail: str
    problem: str = ""


def check_pass(name: str, *, processes: bool = True) -> list[Result]:
    """Run the kit on an installed pass.

    Args:
        name: Its registered name.
        processes: Whether to run it in two more processes as well, and compare what they write.

    Returns:
        One result per check; the pass conforms when none has a problem.

    Raises:
        InputError: There is no such pass, or its plugin does not load.
    """
    cls = pass_class(name)
    wrong = "" if cls.name() == name else f"it is registered as '{name}', and its class is named for '{cls.name()}'"
    results = [Result("name", "The registered name is the one that the class name gives", wrong), *check_class(cls)]
    if processes and not any(result.problem for result in results):
        asked = "Two processes with different hash seeds write the same bytes"
        results.append(Result("reproducible", asked, _reproducible(name)))
    return results


def check_class(cls: type[Pass]) -> list[Result]:
    """Run the kit on a pass that need not be installed: everything but its name and its second process."""
    results = [_result(documented, documented(cls)), _result(options, options(cls))]
    if results[-1].problem or not isinstance(cls.effect, Effect):
        return results  # nothing to run, or nothing to hold it to
    trials = [attempt(cls(), title, text) for title, text in zoo().items()]
    for check in CHECKS:
        asked = trials if check is runs else [trial for trial in trials if trial.outcome.ended_well]
        answers = [(trial.title, check(cls(), trial)) for trial in asked]
        found = [f"{title}: {problem}" for title, problem in answers if problem]
        more = [f"and {len(found) - MOST_NAMED} more models"] if len(found) > MOST_NAMED else []
        results.append(_result(check, "; ".join(found[:MOST_NAMED] + more)))
    ran = [trial for trial in trials if trial.outcome.ended_well]
    applied = (
        ", ".join(trial.title for trial in ran if trial.outcome.applied) or "none, so that its golden file decides"
    )
    problem = "" if ran else f"it takes none of the models: {trials[0].outcome.declined or trials[0].outcome.failure}"
    return [*results, Result("coverage", f"Took {len(ran)} of {len(trials)} models, applied on {applied}", problem)]


def _result(check: Callable[..., str], problem: str) -> Result:
    asked = (check.__doc__ or "").partition("\n")[0].rstrip(".")
    return Result(check.__name__.replace("_", "-"), asked, problem)


def documented(cls: type[Pass]) -> str:
    """The pass has a docstring of its own and declares an effect."""
    if not (cls.__dict__.get("__doc__") or "").strip():
        return "it has no docstring, which is its help"
    if not isinstance(cls.effect, Effect):
        return f"its effect is {cls.effect!r}; declare EXACT, Effect.reassociate(rtol) or LOSSY"
    if cls.effect.kind == "reassociate" and not 0 < cls.effect.rtol < 1:
        return f"it reassociates within {cls.effect.rtol:g}; declare a bound between 0 and 1"
    return ""


def options(cls: type[Pass]) -> str:
    """Every option has a default and a type that refuses nonsense, and survives a recipe."""
    required = [name for name, option in cls.model_fields.items() if option.is_required()]
    if required:
        return f"option '{required[0]}' has no default"
    try:
        pass_ = cls()
    except ValidationError as error:
        return f"its own defaults do not validate: {error.errors()[0]['msg']}"
    for name in (*cls.model_fields, "no_such_option"):
        try:
            cls.model_validate({name: object()})
        except ValidationError:
            continue
        return f"option '{name}' takes anything; give it a type" if name in cls.model_fields else "it takes any option"
    if cls.model_validate(pass_.model_dump(mode="json")) != pass_:
        return "its options come back from a recipe as others"
    return ""


def runs(pass_: Pass, trial: Trial) -> str:
    """Every model is taken without an exception, or refused in a sentence."""
    return trial.outcome.failure


def remarks_changes(pass_: Pass, trial: Trial) -> str:
    """Every change is remarked as applied, and nothing is that changed nothing."""
    applied = trial.outcome.applied
    if any(not remark.message.strip() or not remark.node for remark in trial.outcome.remarks):
        return "a remark lacks its message or the name of its node"
    if not applied and fingerprint(trial.after) != fingerprint(trial.before):
        return "it changed the model without an 'applied' remark"
    if applied and _bytes(trial.after) == _bytes(trial.before):
        return f"it gave {applied} 'applied' remarks and changed nothing"
    return ""


def keeps_interface(pass_: Pass, trial: Trial) -> str:
    """Names, types and order of inputs and outputs stay, inputs with a default included."""
    same = interface(trial.before) == interface(trial.after)
    return "" if same else "it changed the model's inputs or outputs"


def preserves_semantics(pass_: Pass, trial: Trial) -> str:
    """Outputs stay within the declared effect; those of a lossy pass keep their shapes and stay finite."""
    return "" if _has_bodies(trial.before) else _moved(pass_, trial)


def preserves_bodies(pass_: Pass, trial: Trial) -> str:
    """The same for models with If and Loop bodies, which see the values around them."""
    return _moved(pass_, trial) if _has_bodies(trial.before) else ""


def respects_defaults(pass_: Pass, trial: Trial) -> str:
    """An initializer that is also an input is only a default: a caller's own value has the same effect as before."""
    names = [value.name or "" for value in trial.before.graph.inputs if value.is_initializer()]
    if not names or (trial.before.ir_version or 0) < 4 or pass_.effect.kind == "lossy":
        return ""  # before IR version 4 every initializer had to be listed as an input
    old, new = trial.before.clone(), trial.after.clone()
    for model in (old, new):
        for name in names:
            value = model.graph.initializers.get(name)
            if value is not None and value.const_value is not None:
                value.const_value = ir.tensor(value.const_value.numpy() * 3, name=name)
    error = _difference(old, new)
    return "" if error <= tolerance(pass_.effect, old) else f"with another value fed, an output moves by {error:.2g}"


def idempotent(pass_: Pass, trial: Trial) -> str:
    """A second run applies nothing (not asked of a lossy pass)."""
    if pass_.effect.kind == "lossy":
        return ""
    applied = [remark for remark in run(pass_, trial.after.clone()).remarks if remark.kind == "applied"]
    return f"a second run applied '{applied[0].message}' at '{applied[0].node}'" if applied else ""


def deterministic(pass_: Pass, trial: Trial) -> str:
    """Two runs give the same bytes and the same remarks."""
    again = attempt(pass_, trial.title, trial.text)
    if _bytes(again.after) != _bytes(trial.after):
        return "two runs give different models"
    return "" if again.outcome == trial.outcome else "two runs give different remarks"


def keeps_custom_operators(pass_: Pass, trial: Trial) -> str:
    """Operators of other domains stay as they are: nobody knows what they do."""
    return "" if _custom(trial.before) == _custom(trial.after) else "it changed, merged or removed a custom operator"


def keeps_metadata(pass_: Pass, trial: Trial) -> str:
    """Metadata of the model, and of every node that stays, is kept."""
    old, new = trial.before, trial.after
    if {**new.metadata_props, **old.metadata_props} != new.metadata_props:
        return "it dropped the model's metadata_props"
    if (old.producer_name, old.doc_string, old.graph.name) != (new.producer_name, new.doc_string, new.graph.name):
        return "it changed the model's producer, documentation or graph name"
    lost = [node.name for node in trial.nodes if node.graph is not None and MARK not in node.metadata_props]
    return f"it dropped the metadata_props of node '{lost[0]}'" if lost else ""


def leaves_tensors(pass_: Pass, trial: Trial) -> str:
    """Weights are replaced, never written into: other models share the arrays."""
    written = [name for name, array, copy in trial.arrays if array.tobytes() != copy.tobytes()]
    return f"it wrote into the array of '{written[0]}'" if written else ""


def survives_saving(pass_: Pass, trial: Trial) -> str:
    """The result saves, passes the ONNX checker, loads, and computes the same."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            loaded = load(save(trial.after, Path(folder) / "model.onnx")[0])
        except InputError as error:
            return error.what
        if interface(loaded) != interface(trial.after):
            return "it comes back with other inputs or outputs"
        return "it computes something else when loaded" if _difference(trial.after, loaded) else ""


CHECKS: tuple[Callable[[Pass, Trial], str], ...] = (
    runs,
    remarks_changes,
    keeps_interface,
    preserves_semantics,
    preserves_bodies,
    respects_defaults,
    idempotent,
    deterministic,
    keeps_custom_operators,
    keeps_metadata,
    leaves_tensors,
    survives_saving,
)


def _moved(pass_: Pass, trial: Trial) -> str:
    """Run the pass in the pipeline, which verifies it, and return its objection."""
    model = marked(trial.text)
    try:
        result = Pipeline([pass_]).run(model, context_for(pass_, model), inputs_for(model))
    except VerificationError as error:
        return f"{error.what} ({error.where})" if error.where else error.what
    change = result.steps[0].change
    return "" if change is None or math.isfinite(change) else "outputs change their shape or are no longer finite"


def _difference(old: ir.Model, new: ir.Model) -> float:
    """Return the largest relative error of any output; 0 where a custom operator keeps the models from running."""
    samples = inputs_for(old)
    try:
        before = run_samples(old, samples)
    except CannotRunError:
        return 0.0
    try:
        after = run_samples(new, samples)
    except CannotRunError:
        return math.inf
    pairs = zip(before, after, strict=True)
    return max((relative_error(a[name], b[name]) if name in b else math.inf for a, b in pairs for name in a), default=0)


def _has_bodies(model: ir.Model) -> bool:
    return sum(1 for _ in model.graphs()) > 1


def _custom(model: ir.Model) -> list[tuple[object, ...]]:
    """Return what identifies each custom operator: its attributes, and which inputs and outputs it has."""
    return [
        (
            node.domain,
            node.op_type,
            str(list(node.attributes.values())),
            [v is None for v in node.inputs],
            len(node.outputs),
        )
        for node in model.graph.all_nodes()
        if node.domain not in STANDARD_DOMAINS
    ]


def _bytes(model: ir.Model) -> bytes:
    return bytes(ir.to_proto(model).SerializeToString(deterministic=True))


def digest(name: str) -> str:
    """Return a digest over what an installed pass makes of the zoo."""
    pass_, sha256 = pass_class(name)(), hashlib.sha256()
    for title, text in zoo().items():
        trial = attempt(pass_, title, text)
        sha256.update(_bytes(trial.after) + repr(trial.outcome).encode())
    return sha256.hexdigest()


def _reproducible(*names: str) -> str:
    """Return what two processes with different hash seeds write differently, of one pass or of several."""
    code = "import sys; from optkit.authoring.conformance import digest; print(*map(digest, sys.argv[1:]))"
    command = [sys.executable, "-c", code, *names]
    running = [
        subprocess.Popen(
            command,
            env={**os.environ, "PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "2")
    ]
    written = [process.communicate() for process in running]
    for process, (_, errors) in zip(running, written, strict=True):
        if process.returncode:
            return f"a second process fails: {(errors.strip().splitlines() or ['no message'])[-1]}"
    seen = [out.split() for out, _ in written]
    differ = [name for name, *digests in zip(names, *seen, strict=True) if len(set(digests)) > 1]
    return f"the result of {', '.join(differ)} depends on the order of a set or of hashes" if differ else ""
