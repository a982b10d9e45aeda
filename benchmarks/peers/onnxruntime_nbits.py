"""onnxruntime's MatMulNBitsQuantizer: weights of matrix products in blocks of 32.

Options: ``method=default|rtn|hqq|gptq|k_quant``; ``bits=4``; ``symmetric=1``; ``gather=1`` (tables too).
"""

from __future__ import annotations

from onnxruntime.quantization import CalibrationDataReader
from onnxruntime.quantization import matmul_nbits_quantizer as nbits
from samples import Reader, read_job


class DataReader(Reader, CalibrationDataReader):
    """`Reader` as the class that onnxruntime asks for."""


job = read_job()
bits, symmetric, block = int(job.options.get("bits", "4")), job.flag("symmetric"), 32
operators = ("MatMul", "Gather") if job.flag("gather") else ("MatMul",)
method = job.options.get("method", "default")
if method == "default":
    config = nbits.DefaultWeightOnlyQuantConfig(
        block_size=block, is_symmetric=symmetric, bits=bits, op_types_to_quantize=operators
    )
elif method == "hqq":
    config = nbits.HQQWeightOnlyQuantConfig(block_size=block, bits=bits)
elif method == "gptq":
    config = nbits.GPTQWeightOnlyQuantConfig(DataReader(job.calibration))
elif method == "k_quant":
    config = nbits.KQuantWeightOnlyQuantConfig()
else:
    config = nbits.RTNWeightOnlyQuantConfig()
quantizer = nbits.MatMulNBitsQuantizer(
    job.model, bits=bits, block_size=block, is_symmetric=symmetric, algo_config=config
)
quantizer.process()
quantizer.model.save_model_to_file(job.output, use_external_data_format=False)
