"""onnx-neural-compressor, static and dynamic, one scale per channel, 7-bit weights where it recommends them.

Option: ``algorithm=static|smoothquant|dynamic``.
"""

from __future__ import annotations

from onnx_neural_compressor import data_reader, utility
from onnx_neural_compressor.quantization import QuantFormat, config, quantize
from samples import Reader, read_job


class DataReader(Reader, data_reader.CalibrationDataReader):
    """`Reader` as the class that the tool asks for."""

    __iter__ = data_reader.CalibrationDataReader.__iter__


job = read_job()
algorithm = job.options.get("algorithm", "static")
common = {"per_channel": True, "reduce_range": not utility.CpuInfo().vnni}
if algorithm == "dynamic":
    chosen = config.DynamicQuantConfig(**common)
else:
    chosen = config.StaticQuantConfig(
        DataReader(job.calibration),
        quant_format=QuantFormat.QDQ,
        calibration_sampling_size=sum(1 for _ in Reader(job.calibration)),
        extra_options={"SmoothQuant": algorithm == "smoothquant"},
        **common,
    )
quantize(job.model, job.output, chosen)
