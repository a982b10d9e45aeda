"""How good a quantized file is: its error in float and as deployed, its metric, and what runs in integer kernels."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from comparison.models import Prepared
from optkit.evaluate.evaluation import next_tokens, paired_bootstrap
from optkit.evaluate.fidelity import Fidelity, Outputs, compare, holds_scores, score_rows
from optkit.evaluate.metrics import are_probabilities
from optkit.session import Session, session_options

INTEGER_KERNELS = frozenset(
    {
        "ConvInteger",
        "DynamicQuantizeMatMul",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "MatMulNBits",
        "QGemm",
        "QLinearConv",
        "QLinearConvTranspose",
        "QLinearMatMul",
    }
)
SMALLEST = 1e-12  # probability


@dataclass(frozen=True)
class Accuracy:
    """A metric of the quantized model, and by how much the float model is better, with its 95 % interval."""

    metric: str
    value: float
    reference: float
    drop: float
    low: float
    high: float


@dataclass(frozen=True)
class Score:
    """A quantized file against the float model.

    Attributes:
        bytes: Size of the file, and of those it refers to.
        simulated: Fidelity with onnxruntime's optimizations off: every value in float.
        deployed: Fidelity as it runs here.
        accuracy: The metric as it runs here; None without labels.
        kl: Mean Kullback-Leibler divergence of the scores as deployed, in nats; None where no output holds scores.
        integer_layers: How many nodes run in integer kernels.
    """

    bytes: int
    simulated: Fidelity
    deployed: Fidelity
    accuracy: Accuracy | None
    kl: float | None
    integer_layers: int


def score(file: Path, subject: Prepared) -> Score:
    """Run a quantized file on the subject's samples, in float and as deployed.

    Raises:
        OptkitError: It does not load or run, or lacks an output.
    """
    simulated = _run(file, subject, optimize=False)
    fidelity = compare(subject.outputs, simulated)
    del simulated
    deployed = _run(file, subject, optimize=True)
    return Score(
        sum(item.stat().st_size for item in file.parent.rglob("*") if item.is_file()),
        fidelity,
        compare(subject.outputs, deployed),
        _accuracy(subject, deployed),
        _divergence(subject.outputs, deployed),
        sum(count for name, count in kernels(file).items() if name in INTEGER_KERNELS),
    )


def kernels(file: Path) -> Counter[str]:
    """Return the operators that onnxruntime runs after its own optimizations, bodies of If and Loop included."""
    with tempfile.TemporaryDirectory() as folder:
        options = session_options(optimize=True)
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        return _operators(onnx.load(options.optimized_model_filepath, load_external_data=False).graph)


def _operators(graph: onnx.GraphProto) -> Counter[str]:
    found: Counter[str] = Counter(node.op_type for node in graph.node)
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        if attribute.HasField("g"):
            found += _operators(attribute.g)
    return found


def _run(file: Path, subject: Prepared, *, optimize: bool) -> list[Outputs]:
    session = Session(file, optimize=optimize)
    return [session.run(sample) for sample in subject.samples]


def _accuracy(subject: Prepared, outputs: Sequence[Outputs]) -> Accuracy | None:
    metric, labels = subject.metric, subject.samples.labels
    if metric is None:
        return None
    rows: list[tuple[np.ndarray, np.ndarray]] = []
    for number, (mine, theirs) in enumerate(zip(subject.outputs, outputs, strict=True)):
        if metric.next_token:
            label = next_tokens(subject.samples[number])
        else:
            label = np.asarray(labels[number]) if labels is not None else None
        rows.append((metric.statistics(mine, label), metric.statistics(theirs, label)))
    a, b = (np.stack(side).astype(np.float64) for side in zip(*rows, strict=True))
    difference, low, high = paired_bootstrap(a, b, metric.combine)
    if not metric.higher_is_better:
        difference, low, high = -difference, -high, -low
    value, reference = float(metric.combine(b.sum(0))), float(metric.combine(a.sum(0)))
    return Accuracy(metric.name, value, reference, difference, low, high)


def _divergence(reference: Sequence[Outputs], outputs: Sequence[Outputs]) -> float | None:
    """Return the mean over rows of sum p (log p - log q) of the first output that holds scores."""
    name = next((key for key, value in reference[0].items() if holds_scores(np.asarray(value))), None)
    if name is None:
        return None
    probabilities = all(are_probabilities(np.asarray(sample[name])) for sample in reference[:16])
    total = rows = 0.0
    for mine, theirs in zip(reference, outputs, strict=True):
        if mine[name].shape != theirs[name].shape:
            return float("inf")
        p, q = (_log_probabilities(side[name], probabilities) for side in (mine, theirs))
        total += float((np.exp(p) * (p - q)).sum())
        rows += len(p)
    return max(total / rows, 0.0)  # rounding may leave less than nothing


def _log_probabilities(scores: np.ndarray, probabilities: bool) -> np.ndarray:
    rows = score_rows(np.asarray(scores)).astype(np.float64)
    if probabilities:
        return np.log(np.maximum(rows, SMALLEST))
    shifted = rows - rows.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
