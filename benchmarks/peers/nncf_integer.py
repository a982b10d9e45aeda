"""nncf.quantize with its defaults.

Options: ``folded=1`` (after onnxruntime's pre-processing, which folds batch norms); ``model_type=transformer``.
"""

from __future__ import annotations

import nncf
import onnx
from samples import read_job, read_samples

job = read_job()
source = job.model
if job.flag("folded"):
    from onnxruntime.quantization.shape_inference import quant_pre_process

    source = str(job.scratch / "prepared.onnx")
    quant_pre_process(job.model, source, skip_symbolic_shape=True)
samples = list(read_samples(job.calibration))
model_type = nncf.ModelType.TRANSFORMER if job.options.get("model_type") == "transformer" else None
quantized = nncf.quantize(onnx.load(source), nncf.Dataset(samples), subset_size=len(samples), model_type=model_type)
onnx.save(quantized, job.output)
