"""onnxruntime.transformers.float16: weights and activations in half precision, inputs and outputs left as they are."""

from __future__ import annotations

import onnx
from onnxruntime.transformers.float16 import convert_float_to_float16
from samples import read_job

job = read_job()
onnx.save(convert_float_to_float16(onnx.load(job.model), keep_io_types=True), job.output)
