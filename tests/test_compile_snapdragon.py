"""Real models, end to end, to context binaries that Qualcomm's emulator runs."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest

import optkit
from optkit.model.loading import save
from optkit_targets.qnn import runtime
from real_models import REAL_MODELS, STATIC_DIMS
from transformer_models import decoder_step, encoder

NPU = "snapdragon-8gen3-npu"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.emulator,
    pytest.mark.skipif(bool(runtime.missing()), reason="needs onnxruntime-qnn, the extra [qnn]"),
]


@pytest.mark.parametrize(("name", "samples"), [("resnet20_cifar10", 100), ("mobilenet_v1_075", 40)])
def test_a_network_runs_whole_on_the_npu_and_stays_accurate(
    shared: Path, tmp_path: Path, name: str, samples: int
) -> None:
    model = REAL_MODELS[name]
    data = model.evaluation_data
    report = optkit.compile(
        model.path,
        target=NPU,
        dims=STATIC_DIMS[name],
        calibration=f"{model.calibration_data.partition('[')[0]}[:32]",
        evaluation=f"{data.partition('[')[0]}[100:{100 + samples}]",
        preprocess=model.spec,
        output=tmp_path / name,
    )
    assert [(each.device, each.macs_share) for each in report.placement.devices] == [("npu", 1.0)]
    assert report.placement.compared > 0
    assert not report.placement.disagreements
    emulated = next(run for run in report.executions if run.kind == "emulated")
    assert emulated.accuracy[0].n == samples
    assert abs(emulated.accuracy[0].drop) <= 0.05  # a few samples: the benchmark measures with hundreds
    assert emulated.fidelity.sqnr_db > 20
    assert report.deployment.between is not None
    assert report.deployment.between.sqnr_db > 20


@pytest.mark.parametrize("precision", ["fp16", "w8a16"])
@pytest.mark.parametrize("build", [decoder_step, encoder])
def test_transformers_run_whole_on_the_npu(tmp_path: Path, build: object, precision: str) -> None:
    model = build()  # type: ignore[operator]  # one of the two functions above
    assert isinstance(model, ir.Model)
    save(model, tmp_path / "model.onnx")
    report = optkit.compile(
        tmp_path / "model.onnx",
        target=NPU,
        precision=precision,
        calibration="random",
        output=tmp_path / "out",
    )
    assert [(each.device, each.macs_share) for each in report.placement.devices] == [("npu", 1.0)]
    assert report.executions[0].fidelity.sqnr_db > 30
