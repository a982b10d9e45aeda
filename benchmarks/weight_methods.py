"""Compares the methods of quantize-weights on real models: SQNR of the outputs, size of the file, seconds.

    python benchmarks/weight_methods.py --bits 4
    python benchmarks/weight_methods.py --bits 2 --models relu_lm --methods rtn gptq

Models and data are those of the folder ``shared`` beside the checkout. Nodes run as written, so that differences are
those of the weights alone; calibration and evaluation samples are disjoint where a model has enough.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from optkit.dataset.samples import read_samples
from optkit.evaluate.fidelity import compare
from optkit.model.loading import load, save
from optkit.pipeline import Context, Pipeline
from optkit.plugins import pass_class
from optkit.session import run_samples
from optkit.target import load_target
from optkit_passes.quantization.quantize_weights import QuantizeWeights
from real_models import REAL_MODELS

MODELS = ["ad_autoencoder", "magika_v3_3", "sst2_relu_encoder", "stories260k", "relu_lm"]
METHODS = ["minmax", "rtn", "hqq", "awq", "gptq"]


def main() -> None:
    """Print one row for each model and method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    arguments = parser.parse_args()
    print(f"{'model':18} {'method':7} {'SQNR dB':>8} {'bytes':>9} {'seconds':>8}")
    for name in arguments.models:
        real = REAL_MODELS[name]
        model = load(real.path)
        cleanup = [pass_class(spec.pass_).model_validate(dict(spec.options)) for spec in load_target("host").cleanup]
        Pipeline(cleanup).run(model, Context())
        calibration = read_samples(real.calibration_data, model, preprocess=real.spec)
        samples = list(real.samples(1000))
        expected = run_samples(model, samples)
        for method in arguments.methods:
            quantized = model.clone()
            pass_ = QuantizeWeights(bits=arguments.bits, block_size=arguments.block_size, method=method)
            start = time.perf_counter()
            pass_.run(quantized, Context(calibration=calibration if method in ("awq", "gptq") else None))
            seconds = time.perf_counter() - start
            error = compare(expected, run_samples(quantized, samples)).sqnr_db
            with tempfile.TemporaryDirectory() as folder:
                size = sum(path.stat().st_size for path in save(quantized, Path(folder) / "model.onnx"))
            print(f"{name:18} {method:7} {error:8.2f} {size:9} {seconds:8.1f}", flush=True)


if __name__ == "__main__":
    main()
