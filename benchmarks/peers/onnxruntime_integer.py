"""onnxruntime.quantization, static and dynamic, after its own pre-processing, one scale per channel.

Options: ``dynamic=1``; ``reduce_range=1`` (7-bit weights); ``layers=1`` (convolutions and matrix products only);
``weight=QInt8|QUInt8``; ``method=MinMax|Entropy|Percentile``.
"""

from __future__ import annotations

from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process
from samples import Reader, read_job

LAYERS = ["Conv", "ConvTranspose", "MatMul", "Gemm"]


class DataReader(Reader, CalibrationDataReader):
    """`Reader` as the class that onnxruntime asks for."""


job = read_job()
prepared = str(job.scratch / "prepared.onnx")
try:
    quant_pre_process(job.model, prepared)
except Exception:  # "Incomplete symbolic shape inference": its own advice is to leave that step out
    quant_pre_process(job.model, prepared, skip_symbolic_shape=True)
common = {
    "per_channel": job.options.get("weight") != "QUInt8",  # unsigned weights are its default of one scale
    "reduce_range": job.flag("reduce_range"),
    "weight_type": QuantType[job.options.get("weight", "QInt8")],
}
if job.flag("dynamic"):
    quantize_dynamic(prepared, job.output, **common)
else:
    quantize_static(
        prepared,
        job.output,
        DataReader(job.calibration),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        calibrate_method=CalibrationMethod[job.options.get("method", "MinMax")],
        op_types_to_quantize=LAYERS if job.flag("layers") else None,
        **common,
    )
