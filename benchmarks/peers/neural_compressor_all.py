"""neural-compressor: static, SmoothQuant, dynamic; and weights in 4 bits and blocks of 32 by rtn, gptq, awq.

Options: ``algorithm=static|smoothquant|dynamic|rtn|gptq|awq``; ``symmetric=1``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from neural_compressor import PostTrainingQuantConfig, quantization
from neural_compressor.adaptor.ox_utils import weight_only
from samples import read_job, read_samples


class Loader:
    """The samples as the tool asks for them: pairs of inputs and labels."""

    batch_size = 1

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __iter__(self) -> Iterator[tuple[dict[str, np.ndarray], int]]:
        return ((sample, 0) for sample in read_samples(self.folder))


job = read_job()
algorithm = job.options.get("algorithm", "static")
loader, count = Loader(job.calibration), sum(1 for _ in read_samples(job.calibration))
blocks = {"num_bits": 4, "group_size": 32, "scheme": "sym" if job.flag("symmetric") else "asym"}
if algorithm == "rtn":  # its own fit() fails: KeyError 'bits' at the first product of two activations
    quantized = weight_only.rtn_quantize(job.model, **blocks)
elif algorithm == "gptq":
    quantized = weight_only.gptq_quantize(job.model, loader, n_samples=count, **blocks)
elif algorithm == "awq":
    quantized = weight_only.awq_quantize(job.model, loader, n_samples=count, **blocks)
else:
    chosen = PostTrainingQuantConfig(
        approach="dynamic" if algorithm == "dynamic" else "static",
        quant_format="default" if algorithm == "dynamic" else "QDQ",
        recipes={"smooth_quant": True} if algorithm == "smoothquant" else {},
        quant_level=1,  # quantize once, without a search
        calibration_sampling_size=[count],
    )
    quantized = quantization.fit(job.model, chosen, calib_dataloader=loader)
if quantized is None:
    sys.exit("RuntimeError: neural-compressor returned no model")
quantized.save(job.output)
