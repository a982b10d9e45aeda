"""Compares palettize-weights with coremltools' own k-means: SQNR of the outputs, and what packages take.

    python benchmarks/coreml_palettes.py
    python benchmarks/coreml_palettes.py --bits 2 --models relu_lm --samples 8
    python benchmarks/coreml_palettes.py --sizes --models resnet20_cifar10 relu_lm

The same float16 package goes both ways: coremltools' ``palettize_weights`` (mode ``kmeans``) compresses the constants
that palettize-weights chose, with as many bits and LUTs. Both packages are run by optkit's interpreter on samples that
palettize-weights was not calibrated on, and compared with the float32 network in onnxruntime. Models and data are those
of the folder ``shared`` beside the checkout.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from optkit.dataset.samples import Samples, read_samples
from optkit.evaluate.fidelity import compare
from optkit.graph import constant
from optkit.model.loading import graph_inputs, load
from optkit.pipeline import Context, Pipeline
from optkit.plugins import pass_class
from optkit.quant.palette import palette_of
from optkit.session import run_samples
from optkit.target import load_target
from optkit_targets.coreml import interpreter, packager, program, toolkit
from optkit_targets.coreml.deployment import NEWEST, OLDEST
from optkit_targets.coreml.lowering.scope import identifier
from real_models import REAL_MODELS, STATIC_DIMS, located

TARGET = "apple-a17-ane"
MODELS = ["mobilenet_v1_075", "squeezenet1_1", "resnet20_cifar10", "relu_lm", "sst2_relu_encoder", "stories260k"]
# Where a model's own samples have other sizes than its static form.
PADDED = {
    "sst2_relu_encoder": ("text_models.py:sst2_padded_calibration[:64]", "text_models.py:sst2_padded_eval[:64]"),
}
PRECISIONS = [
    "fp16", "w8a16", "w4a16", "w8a16-lut", "w6a16-lut", "w4a16-lut", "w3a16-lut", "w2a16-lut", "w1a16-lut", "w8a8",
]  # fmt: skip
CALIBRATION = 32  # samples


def read(name: str, count: int) -> tuple[ir.Model, Samples, list[dict[str, np.ndarray]]]:
    """Return a cleaned static model, calibration samples and others."""
    real, target = REAL_MODELS[name], load_target(TARGET)
    model = load(real.path, dims=STATIC_DIMS.get(name, {}))
    Pipeline([pass_class(spec.pass_).model_validate(dict(spec.options)) for spec in target.cleanup]).run(
        model, Context(target=target)
    )
    texts = (real.calibration_data, real.evaluation_data)
    if name in PADDED:
        texts = (located(PADDED[name][0]), located(PADDED[name][1]))
    free = load(real.path)
    calibration, others = (read_samples(text, free, preprocess=real.spec) for text in texts)
    shapes = {value.name or "": value.shape.numpy() for value in graph_inputs(model) if value.shape is not None}
    fitted = [[_cut(sample, shapes) for sample in samples] for samples in (calibration[:CALIBRATION], others[:count])]
    return model, Samples(fitted[0]), fitted[1]


def _cut(sample: Mapping[str, np.ndarray], shapes: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    """Return a sample without what is beyond the static sizes."""
    return {name: sample[name][tuple(slice(size) for size in shape)] for name, shape in shapes.items()}


def packaged(model: ir.Model, folder: Path, deployment: int | None = None) -> Path:
    """Return the saved package of a model, computed in float16."""
    tried = range(OLDEST, NEWEST + 1) if deployment is None else range(deployment, deployment + 1)
    number, made = packager.lowered(model, tried, ())
    return program.save(made, number, folder, half=True)


def outputs(package: Path, samples: Sequence[Mapping[str, np.ndarray]], model: ir.Model) -> list[dict[str, np.ndarray]]:
    """Return what the interpreter computes for each sample, by the network's own names."""
    run = interpreter.load(package).run
    found = [run({identifier(name): array for name, array in sample.items()}) for sample in samples]
    return [{value.name or "": each[identifier(value.name or "")] for value in model.graph.outputs} for each in found]


def key(array: np.ndarray) -> str:
    """Return what tells a constant from others, whatever the order of its axes."""
    return hashlib.sha256(np.sort(array.astype(np.float16), axis=None).tobytes()).hexdigest()


def palettized(model: ir.Model, calibration: Samples, bits: int, channels: int) -> tuple[ir.Model, set[str]]:
    """Return our palettized model, and the keys of the weights that it has LUTs for."""
    found = model.clone()
    before = {name: constant(value) for name, value in model.graph.initializers.items()}
    passes = [("raise-opset", {"opset": 21}), ("palettize-weights", {"bits": bits, "channels_per_lut": channels})]
    context = Context(target=load_target(TARGET), calibration=calibration)
    Pipeline([pass_class(name).model_validate(options) for name, options in passes]).run(found, context)
    assert any(palette_of(node) is not None for node in found.graph.all_nodes())
    gone = [array for name, array in before.items() if name not in found.graph.initializers and array is not None]
    return found, {key(array) for array in gone}


def compressed(base: Path, keys: set[str], bits: int, channels: int, goal: Path) -> tuple[Path, int]:
    """Return the package that coremltools' k-means makes of another one, and how many weights it has LUTs for."""
    with toolkit.quiet():
        import coremltools.optimize.coreml as optimize

        source = toolkit.coremltools().models.MLModel(str(base), skip_model_load=True)
        granularity = {"granularity": "per_grouped_channel", "group_size": channels} if channels else {}
        config = optimize.OpPalettizerConfig(mode="kmeans", nbits=bits, weight_threshold=0, **granularity)
        names: dict[str, Any] = {}
        for name, array in _constants(base):
            if key(array) in keys:
                names[name] = config
        made = optimize.palettize_weights(source, optimize.OptimizationConfig(op_name_configs=names))
        made.save(str(goal))
    return goal, len(names)


def _constants(package: Path) -> list[tuple[str, np.ndarray]]:
    """Return the constants of a package that have two axes or more."""
    block = interpreter.program.read_program(package).block
    found = []
    for operation in block.walk():
        if operation.type == "const":
            (value,) = operation.inputs["val"]
            array = value.value if not isinstance(value, str) else None
            if isinstance(array, np.ndarray) and array.ndim > 1:
                found.append((operation.outputs[0].name, array))
    return found


def size(package: Path) -> int:
    """Return what a package takes, in bytes."""
    return sum(path.stat().st_size for path in package.rglob("*") if path.is_file())


def print_comparison(names: Sequence[str], bits: int, channels: int, count: int) -> None:
    """Print one row for each model."""
    head = f"{'model':18} {'weights':>7} {'float16':>8} {'coremltools':>11} {'ours':>7} {'gain dB':>8}"
    print(f"{head} {'bytes: theirs':>14} {'ours':>9}")
    for name in names:
        model, calibration, samples = read(name, count)
        expected = run_samples(model, samples)
        mine, keys = palettized(model, calibration, bits, channels)
        with tempfile.TemporaryDirectory() as folder:
            base = packaged(model, Path(folder) / "base.mlpackage", 18 if channels or bits == 3 else 16)
            theirs, weights = compressed(base, keys, bits, channels, Path(folder) / "theirs.mlpackage")
            ours = packaged(mine, Path(folder) / "ours.mlpackage")
            found = [compare(expected, outputs(each, samples, model)).sqnr_db for each in (base, theirs, ours)]
            print(f"{name:18} {weights:7} {found[0]:8.1f} {found[1]:11.2f} {found[2]:7.2f} {found[2] - found[1]:+8.2f}"
                  f" {size(theirs):14} {size(ours):9}", flush=True)  # fmt: skip


def print_sizes(names: Sequence[str]) -> None:
    """Print what the package of each precision takes against float32."""
    target = load_target(TARGET)
    print(f"{'model':18} {'precision':10} {'bytes':>9} {'of fp32':>8} {'bits a weight':>14}")
    for name in names:
        model, calibration, _ = read(name, 1)
        full = sum(4 * value.const_value.size for value in model.graph.initializers.values() if value.const_value)
        for precision in PRECISIONS:
            found = model.clone()
            recipe = target.recipe_for(precision)
            Pipeline([pass_class(spec.pass_).model_validate(dict(spec.options)) for spec in recipe]).run(
                found, Context(target=target, calibration=calibration)
            )
            with tempfile.TemporaryDirectory() as folder:
                package = packaged(found, Path(folder) / "model.mlpackage")
                weights = [each for each in interpreter.load(package).weights() if each.elements > 1]
                bits = 8 * sum(each.stored_bytes for each in weights) / sum(each.elements for each in weights)
                print(
                    f"{name:18} {precision:10} {size(package):9} {size(package) / full:8.1%} {bits:14.2f}", flush=True
                )


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, default=4, choices=(1, 2, 3, 4, 6, 8))
    parser.add_argument("--channels", type=int, default=0, help="output channels that share a LUT; 0: all")
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--samples", type=int, default=16, help="samples to compare the outputs on")
    parser.add_argument("--sizes", action="store_true", help="print what packages take, by precision")
    arguments = parser.parse_args()
    if arguments.sizes:
        print_sizes(arguments.models)
    else:
        print_comparison(arguments.models, arguments.bits, arguments.channels, arguments.samples)


if __name__ == "__main__":
    main()
