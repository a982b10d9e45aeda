"""onnx-neural-compressor's weight-only quantizer: 4 bits in blocks of 32.

Options: ``algorithm=rtn|gptq|awq``; ``symmetric=1``.
"""

from __future__ import annotations

import onnx
from onnx_neural_compressor import data_reader
from onnx_neural_compressor.quantization import matmul_nbits_quantizer as nbits
from samples import Reader, read_job


class DataReader(Reader, data_reader.CalibrationDataReader):
    """`Reader` as the class that the tool asks for."""

    __iter__ = data_reader.CalibrationDataReader.__iter__


job = read_job()
algorithm = job.options.get("algorithm", "rtn")
if algorithm == "rtn":
    chosen = nbits.RTNWeightOnlyQuantConfig()
elif algorithm == "gptq":
    chosen = nbits.GPTQWeightOnlyQuantConfig(DataReader(job.calibration))
else:
    chosen = nbits.AWQWeightOnlyQuantConfig(DataReader(job.calibration))
quantizer = nbits.MatMulNBitsQuantizer(
    job.model, block_size=32, is_symmetric=job.flag("symmetric"), n_bits=4, algo_config=chosen
)
quantizer.process()
quantized = quantizer.model
onnx.save(getattr(quantized, "model", quantized), job.output)
