"""How the artifact runs here, and how accurate it still is: on the executor closest to the device, and in float."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from optkit.dataset.samples import Samples
from optkit.errors import InputError, MissingDependencyError, VerificationError
from optkit.evaluate.evaluation import Evaluation, evaluate
from optkit.evaluate.fidelity import Outputs
from optkit.package.contract import Artifact, Executor, Run
from optkit.pipeline import Context
from optkit.report.contents import Deployment, Execution
from optkit.session import CannotRunError, Session

UNLABELLED_SAMPLES = 8  # compared where there is no evaluation data
SLOW_SAMPLES = 2  # run on an emulator, which takes seconds for each
DOUBTFUL_DB = 20.0  # below it a classifier's decisions begin to change
REMEMBERED_BYTES = 64_000_000  # outputs of the original kept for the second executor


@dataclass(frozen=True)
class Assessment:
    """How the artifact ran on each executor, and the accuracies measured, the one closest to the device first."""

    executions: tuple[Execution, ...]
    accuracy: tuple[Evaluation, ...]
    notices: tuple[str, ...]
    deployment: Deployment = field(default_factory=Deployment)


def choose_executors(executors: Sequence[Executor], wanted: str | None) -> list[Executor]:
    """Return the executors to use: all, or those of one kind.

    Raises:
        MissingDependencyError: No executor of that kind is available here.
    """
    if wanted is None:
        return list(executors)
    chosen = [executor for executor in executors if executor.kind == wanted]
    if not chosen:
        notice = next((executor.notice for executor in executors if executor.notice), "")
        known = ", ".join(executor.kind for executor in executors)
        raise MissingDependencyError(f"no {wanted} executor is available here (only {known})", hint=notice)
    return chosen


def assess(
    original: ir.Model,
    artifact: Artifact,
    executors: Sequence[Executor],
    samples: Samples,
    context: Context,
    metrics: Sequence[str] = (),
    *,
    repeatable: bool = True,
) -> Assessment:
    """Run the artifact on every executor and compare it with the original on the same samples.

    An executor that is slow runs the first few samples only, without a metric; where there are no labels a few suffice.

    Args:
        original: The model as loaded.
        artifact: What the device loads.
        executors: What to run it on, closest to the device first.
        samples: Evaluation data, or calibration data, or random samples.
        context: For the progress display.
        metrics: Metrics by name; the one that suits the labels by default.
        repeatable: Whether two runs of the original agree; where they do not, outputs that differ mean nothing.

    Raises:
        VerificationError: The artifact does not load or run.
        InputError: A metric is unknown or does not fit, or needs labels that are not there.
    """
    measured = samples.labels is not None or bool(metrics)
    if metrics and samples.random:
        raise InputError("a metric needs evaluation data", hint="pass --eval")
    try:
        reference = _remembering(_reference(original))
        reference([samples[0]])
    except CannotRunError as error:
        return Assessment((), (), (f"the package was not run: {error}",))
    executions: list[Execution] = []
    accuracy: list[Evaluation] = []
    loaded: dict[str, Run] = {}
    for executor in executors:
        try:
            candidate = _remembering(executor.load(artifact))
            loaded.setdefault(executor.kind, candidate)
            scored = measured and not executor.slow
            chosen = samples if scored else samples[: SLOW_SAMPLES if executor.slow else UNLABELLED_SAMPLES]
            unlabelled = chosen if scored else Samples(chosen.items, chosen.source, random=chosen.random)
            fidelity, evaluations = evaluate(
                reference, candidate, unlabelled, metrics if scored else (), track=context.track
            )
        except CannotRunError as error:
            raise VerificationError(f"the package does not run on {executor.name}: {error}") from error
        executions.append(Execution(executor.name, executor.kind, fidelity, tuple(evaluations)))
        accuracy = accuracy or list(evaluations)
    notices = [executor.notice for executor in executors if executor.notice]
    if not measured:
        notices.append("accuracy was not measured: no labelled data was given (--eval)")
        worst = min((execution.fidelity.sqnr_db for execution in executions), default=float("inf"))
        if worst == float("-inf") and repeatable:
            notices.append(
                "the outputs differ from the original's in shape, or in which numbers are NaN or infinite: see with "
                "'optkit diff' where this begins"
            )
        elif worst < DOUBTFUL_DB and repeatable:
            notices.append(
                f"the outputs are only {worst:.1f} dB from the original's: measure with --eval, see with 'optkit diff' "
                "which tensors suffer, and keep their nodes in float with a rule"
            )
    deployment = compare_deployed(executions, reference, loaded, samples)
    return Assessment(tuple(executions), tuple(accuracy), tuple(notices), deployment)


def compare_deployed(
    executions: Sequence[Execution], reference: Run, loaded: Mapping[str, Run], samples: Samples
) -> Deployment:
    """Return how the package is as deployed and as simulated, over the samples that the deployed one ran.

    Args:
        executions: What ran, closest to the device first.
        reference: Runs the original.
        loaded: What runs the package, by the executor's kind.
        samples: What the executors ran, from the first on.
    """
    deployed = next((each for each in executions if each.kind != "simulated"), None)
    float_ = next((each.fidelity for each in executions if each.kind == "simulated"), None)
    simulated = loaded.get("simulated")
    if deployed is None:
        return Deployment(simulated=float_)
    if float_ is not None and simulated is not None and float_.samples != deployed.fidelity.samples:
        same = samples[: deployed.fidelity.samples]
        float_, _ = evaluate(reference, simulated, Samples(same.items, same.source, random=same.random), ())
    difference = between = None
    if float_ is not None and simulated is not None:
        few = samples[: min(deployed.fidelity.samples, UNLABELLED_SAMPLES)]
        both = Samples(few.items, few.source, random=few.random)
        between, _ = evaluate(simulated, loaded[deployed.kind], both, ())
    if float_ is not None and np.isfinite([deployed.fidelity.sqnr_db, float_.sqnr_db]).all():
        difference = deployed.fidelity.sqnr_db - float_.sqnr_db
    return Deployment(deployed.kind, deployed.fidelity, float_, difference, between)


def _reference(original: ir.Model) -> Run:
    session = Session(original)
    return lambda samples: [session.run(sample) for sample in samples]


def _remembering(run: Run) -> Run:
    """Return ``run`` with a memory, up to a bound, for the outputs of samples it has seen; others run in one call."""
    seen: dict[bytes, Outputs] = {}
    held = 0

    def remembered(samples: Sequence[Mapping[str, np.ndarray]]) -> list[Outputs]:
        nonlocal held
        keys = [_digest(sample) for sample in samples]
        new = {key: sample for key, sample in zip(keys, samples, strict=True) if key not in seen}
        found = dict(zip(new, run(list(new.values())), strict=True)) if new else {}
        outputs = [found[key] if key in found else seen[key] for key in keys]
        for key, result in found.items():
            size = sum(_nbytes(value) for value in result.values())
            if held + size <= REMEMBERED_BYTES:
                seen[key] = result
                held += size
        return outputs

    return remembered


def _nbytes(value: object) -> int:
    """Return the bytes of an output: a tensor, or a sequence or map of them; none for what an optional lacks."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return sum(_nbytes(part) for part in value)
    return int(np.asarray(value).nbytes)


def _digest(sample: Mapping[str, np.ndarray]) -> bytes:
    import hashlib

    digest = hashlib.sha1(usedforsecurity=False)
    for name, array in sorted(sample.items()):
        digest.update(f"{name}{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.digest()
