"""Running a Core ML package with optkit's own interpreter of MIL: not a device, and not Apple's software."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from optkit.cost.work import describe
from optkit.model.loading import graph_inputs, load
from optkit.package.contract import Artifact, Executor, Run
from optkit_targets.coreml.lowering.scope import identifier

SLOW_MACS = 2e9  # a run takes seconds
PROBABILITIES = "classLabel_probs"


class Interpreted(Executor):
    """The saved package is read from disk and executed operation by operation, float16 where the package says so."""

    kind = "simulated"
    name = "MIL interpreter (not a device)"

    def load(self, artifact: Artifact) -> Run:
        """Read the package; inputs and outputs go by the network's own names."""
        from optkit_targets.coreml.interpreter import load as interpret

        network = load(artifact.directory / artifact.plain)
        self.slow = sum(work.macs * work.count for work in describe(network)) > SLOW_MACS
        interpreter = interpret(artifact.directory / artifact.entry)
        inputs = {value.name or "": identifier(value.name or "") for value in graph_inputs(network)}

        def run(samples: Sequence[Mapping[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
            results = []
            for sample in samples:
                found = interpreter.run({new: np.atleast_1d(sample[old]) for old, new in inputs.items()})
                results.append({value.name or "": _typed(found, value) for value in network.graph.outputs})
            return results

        return run


def _typed(found: Mapping[str, np.ndarray], value: ir.Value) -> np.ndarray:
    """Return an output in the network's own type and shape: MIL has no 64-bit integers.

    A classifier returns its labels' probabilities in place of the output that they are.
    """
    array = found.get(identifier(value.name or ""), found.get(PROBABILITIES))
    assert array is not None
    array = (
        array.reshape([dim for dim in value.shape or () if isinstance(dim, int)]) if PROBABILITIES in found else array
    )
    return array if value.dtype is None else array.astype(value.dtype.numpy())
