"""Reports with every part that a report can have."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from optkit.evaluate.evaluation import Evaluation
from optkit.evaluate.fidelity import Fidelity
from optkit.pipeline import EXACT, LOSSY, Effect, Step
from optkit.report.contents import CostRow, CostSummary, Coverage, Execution, RemarkGroup, Report
from optkit.report.inspection import ModelFacts, TensorFacts

BITEQUAL = Fidelity(math.inf, 1.0, 0.0, 1.0, 4)


def facts(nodes: int, by_dtype: dict[str, int], opset: int) -> ModelFacts:
    image, scores = TensorFacts("image", "float", ("batch", 1, 8, 8)), TensorFacts("scores", "float", ("batch", 10))
    return ModelFacts(
        ir_version=8,
        opsets={"ai.onnx": opset},
        inputs=(image,),
        outputs=(scores,),
        dynamic_dims=("batch",),
        nodes=nodes,
        ops={"Conv": nodes},
        parameters=60_000,
        weight_bytes=sum(by_dtype.values()),
        bytes_by_dtype=by_dtype,
        tied={},
        custom_domains=(),
    )


def costs(count: int = 40, scale: float = 1.0, **changes: Any) -> CostSummary:
    bounds = ("compute", "memory", "overhead", "free")
    rows = tuple(
        CostRow(
            f"block{i}/conv",
            ("Conv", "Add", "Relu")[i % 3],
            "int8",
            1000 * i,
            10 * i,
            100,
            3.0,
            scale * 1e-6 * i,
            bounds[i % 4],
            "gemm",
        )
        for i in range(count)
    )
    seconds = sum(row.seconds or 0.0 for row in rows)
    summary = CostSummary(
        macs=sum(row.macs for row in rows),
        int8_macs=0,
        weight_bytes=60_000,
        activation_bytes=4000,
        seconds=seconds,
        low_seconds=0.75 * seconds,
        high_seconds=1.5 * seconds,
        joules=scale * 1e-3,
        peak_activation_bytes=int(4000 * scale),
        unpriced={},
        tag="predicted",
        band_source="a table of measurements",
        shapes={"image": (1, 1, 8, 8)},
        nodes=rows,
    )
    return dataclasses.replace(summary, **changes)


def accuracy(**changes: Any) -> Evaluation:
    top1 = Evaluation("top1", 359, 0.981, 0.979, 0.002, (-0.004, 0.008), False)
    return dataclasses.replace(top1, **changes)


def report(**changes: Any) -> Report:
    noisy = Fidelity(38.5, 0.9998, 0.05, 0.995, 359)
    whole = Report(
        optkit="0.1.0",
        model="digits.onnx",
        model_sha256="ab" * 32,
        target="my-board",
        target_summary="A board with four cores",
        precision="w8a8",
        package="digits-my-board",
        source=facts(50, {"float": 250_000}, 13),
        compiled=facts(90, {"float": 1000, "int8": 60_000}, 13),
        source_bytes=253_000,
        artifact_bytes=61_900,
        steps=(
            Step("clean", {}, EXACT, 3, 0, 50, 47, 0.0, BITEQUAL, 12.75),
            Step("fold", {"limit": 8}, Effect.reassociate(1e-5), 9, 1, 47, 38, 2e-6, BITEQUAL, 12.75),
            Step("round", {}, LOSSY, 20, 2, 38, 90, 0.02, noisy, 12.75),
            Step("unrun", {}, EXACT, 0, 0, 90, 90, None, None, 12.75),
        ),
        remarks=(
            RemarkGroup("fold", "applied", "folded into the node before it", 9, ("block1", "block2")),
            RemarkGroup("round", "missed", "the operator has no integer kernel", 2, ("softmax",)),
        ),
        coverage=Coverage(0.98, 0.995),
        executions=(Execution("runtime 1.0 on this machine", "simulated", noisy, (accuracy(),)),),
        accuracy=(accuracy(),),
        cost_before=costs(scale=3.0),
        cost=costs(),
        calibration="calibration.npz",
    )
    return dataclasses.replace(whole, **changes)
