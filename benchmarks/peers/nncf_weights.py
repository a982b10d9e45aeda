"""nncf.compress_weights in blocks of 32.

Options: ``mode=INT4_SYM|INT4_ASYM|INT8_ASYM|...``; ``awq=1``; ``scale_estimation=1``; ``all_layers=1``.
"""

from __future__ import annotations

import nncf
import onnx
from nncf.quantization.advanced_parameters import AdvancedCompressionParameters, GroupSizeFallbackMode
from samples import read_job, read_samples

job = read_job()
mode = nncf.CompressWeightsMode[job.options.get("mode", "INT4_ASYM")]
data_aware = job.flag("awq") or job.flag("scale_estimation")
choices = {}
if mode.name.startswith("INT4"):
    choices = {
        "group_size": 32,
        "all_layers": job.flag("all_layers"),
        "awq": job.flag("awq"),
        "scale_estimation": job.flag("scale_estimation"),
        # A smaller block where 32 does not divide the row; without it such a layer is an error.
        "advanced_parameters": AdvancedCompressionParameters(group_size_fallback_mode=GroupSizeFallbackMode.ADJUST),
    }
if data_aware:
    choices["dataset"] = nncf.Dataset(list(read_samples(job.calibration)))
onnx.save(nncf.compress_weights(onnx.load(job.model), mode=mode, **choices), job.output)
