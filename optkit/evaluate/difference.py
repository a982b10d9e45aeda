"""Two models side by side: every tensor that both compute, run on the same inputs, worst first."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import onnx_ir as ir

from optkit.dataset.samples import Samples
from optkit.errors import InputError
from optkit.evaluate.fidelity import FidelityMeter
from optkit.session import Session, with_outputs

# A quantized model holds the tensor `t` under this name after the round trip (onnxruntime's naming).
DEQUANTIZED = "{}_DequantizeLinear_Output"


@dataclass(frozen=True)
class TensorDifference:
    """How far one tensor of model B is from the same tensor of model A.

    Attributes:
        name: The tensor in A.
        other: Its name in B.
        op_type: The operator that computes it in A.
        sqnr_db: ``10 log10(sum(a^2) / sum((a - b)^2))`` over all samples; inf when equal.
        cosine: Cosine similarity.
        max_error: Largest absolute difference.
    """

    name: str
    other: str
    op_type: str
    sqnr_db: float
    cosine: float
    max_error: float


def common_tensors(a: ir.Model, b: ir.Model) -> dict[str, str]:
    """Return the tensors that both main graphs compute, A's name to B's, in A's order of execution."""
    computed = {value.name for node in b.graph for value in node.outputs}
    pairs: dict[str, str] = {}
    for node in a.graph:
        for value in node.outputs:
            name = value.name or ""
            found = next((other for other in (DEQUANTIZED.format(name), name) if other in computed), None)
            if name and found and (value.type is None or isinstance(value.type, ir.TensorType)):
                pairs[name] = found
    return pairs


def diff_models(a: ir.Model, b: ir.Model, samples: Samples, *, limit: int = 8) -> list[TensorDifference]:
    """Run both models with optimizations off and compare every common tensor, worst SQNR first.

    Args:
        a: The reference.
        b: The other model.
        samples: Inputs for both.
        limit: How many of the samples to run.

    Raises:
        InputError: The models have no computed tensor in common, or do not run on the samples.
    """
    pairs = common_tensors(a, b)
    if not pairs:
        raise InputError("the two models have no computed tensor of the same name", hint="compare a model with its own")
    first, second = Session(with_outputs(a, pairs)), Session(with_outputs(b, pairs.values()))
    meters = {name: FidelityMeter() for name in pairs}
    for sample in islice(samples, limit):
        left, right = first.run(sample), second.run(sample)
        for name, other in pairs.items():
            meters[name].add({name: left[name]}, {name: right[other]})
    operators = {value.name: node.op_type for node in a.graph for value in node.outputs}
    rows = []
    for name, other in pairs.items():
        found = meters[name].result()
        rows.append(TensorDifference(name, other, operators[name], found.sqnr_db, found.cosine, found.max_error))
    return sorted(rows, key=lambda row: row.sqnr_db)
