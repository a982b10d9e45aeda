"""The models that are quantized, and the samples that every tool calibrates with and is scored on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from optkit.dataset.samples import Samples, read_samples
from optkit.evaluate.fidelity import Outputs
from optkit.evaluate.metrics import Metric, default_metric, metric_named, scored_output
from optkit.model.loading import load
from optkit.session import Session

SPECS = Path(__file__).parents[2] / "tests" / "data_specs"
OWN_SPECS = Path(__file__).parent
QUICK_CALIBRATION, QUICK_EVALUATION = 32, 64
LAYERS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


@dataclass(frozen=True)
class Subject:
    """A model below ``data/`` of the shared folder, with its data.

    Attributes:
        file: The ONNX file.
        calibration: Data to calibrate with: a path below ``data/``, or a function of ``text_models.py``.
        evaluation: Data to score on, disjoint from the former where there is enough.
        preprocess: How images become inputs.
        evaluation_preprocess: The same for ``evaluation``, where that has another form.
        metric: The metric; the one that suits the labels by default.
    """

    file: str
    calibration: str
    evaluation: str
    preprocess: Path | None = None
    evaluation_preprocess: Path | None = None
    metric: str = ""


def _text(calibration: str, evaluation: str) -> tuple[str, str]:
    return f"{SPECS}/text_models.py:{calibration}", f"{SPECS}/text_models.py:{evaluation}"


IMAGENET = ("imagenet_sample[:100]", "imagenet_sample[100:]")
CIFAR10 = ("cifar10_jpeg/calibration.npz[:768:3]", "cifar10_jpeg/test.npz")
MNIST = ("mnist/calibration.npz[:256]", "mnist/test.npz")

SUBJECTS = {
    "mobilenet_v1_075": Subject("mobilenet_v1_075/mobilenet_v1_075.onnx", *IMAGENET, SPECS / "mobilenet_v1_075.toml"),
    "squeezenet1_1": Subject("squeezenet1_1/squeezenet1_1.onnx", *IMAGENET, SPECS / "squeezenet1_1.toml"),
    "resnet20_cifar10": Subject("resnet20_cifar10/resnet20_cifar10.onnx", *CIFAR10, SPECS / "resnet_cifar10.toml"),
    "resnet56_cifar10": Subject("resnet56_cifar10/resnet56_cifar10.onnx", *CIFAR10, SPECS / "resnet_cifar10.toml"),
    "mnist_burn_cnn": Subject("mnist/mnist_burn_cnn.onnx", *MNIST, SPECS / "mnist_burn_cnn.toml"),
    "mnist_cntk8": Subject("mnist/mnist_cntk8.onnx", *MNIST, SPECS / "mnist_cntk8.toml"),
    "sst2_relu_encoder": Subject("sst2/sst2_relu_encoder.onnx", *_text("sst2_calibration[:256]", "sst2_eval[:436]")),
    "relu_lm": Subject("relu_lm/relu_lm.onnx", *_text("relu_lm_calibration[:64]", "relu_lm_eval")),
    "stories260k": Subject(
        "stories260k/stories260k.onnx", *_text("stories260k_eval[:20]", "stories260k_eval[20:90]"), metric="nll:next"
    ),
    "magika_v3_3": Subject("magika_v3_3/magika_v3_3.onnx", *_text("magika_eval[::3]", "magika_eval")),
    "ultraface_rfb320": Subject(
        "ultraface_rfb320/ultraface_rfb320.onnx",
        "imagenet_sample[:100]",
        "ultraface_rfb320/golden.npz",
        OWN_SPECS / "ultraface_photographs.toml",
        SPECS / "ultraface_rfb320.toml",
    ),
    "ad_autoencoder": Subject(
        "ad_autoencoder/ad_autoencoder.onnx", *_text("autoencoder_eval[::3]", "autoencoder_eval")
    ),
    "silero_vad": Subject("silero_vad/silero_vad.onnx", *_text("silero_vad_eval[::3]", "silero_vad_eval")),
    "fns_candy": Subject(
        "fns_candy/fns_candy.onnx", "fns_candy/golden.npz", "fns_candy/golden.npz", SPECS / "fns_candy.toml"
    ),
}


@dataclass(frozen=True)
class Prepared:
    """A subject, read.

    Attributes:
        name: Its name.
        path: The ONNX file.
        calibration: A folder of samples, one sub-folder for each input.
        samples: What is scored on, with labels where there are some.
        outputs: The float model's outputs for each of them.
        metric: What the labels measure; None without labels.
        bytes: Size of the float model.
        layers: How many convolutions and matrix products it has.
    """

    name: str
    path: Path
    calibration: Path
    samples: Samples
    outputs: Sequence[Outputs]
    metric: Metric | None
    bytes: int
    layers: int


def prepare(name: str, shared: Path, folder: Path, *, quick: bool) -> Prepared:
    """Read a subject's data, write its calibration samples below ``folder``, and run the float model.

    Args:
        name: One of `SUBJECTS`.
        shared: The folder that holds ``data/``.
        folder: An empty folder.
        quick: Take few samples.

    Returns:
        The subject, ready for every tool.

    Raises:
        InputError: A file is missing or does not fit.
    """
    subject = SUBJECTS[name]
    data = shared / "data"
    path = data / subject.file
    model = load(path)
    calibration = _read(data, subject.calibration, model, subject.preprocess)
    samples = _read(data, subject.evaluation, model, subject.evaluation_preprocess or subject.preprocess)
    samples = _without(samples, subject)
    if quick:
        calibration, samples = calibration[:QUICK_CALIBRATION], samples[:QUICK_EVALUATION]
    for number, sample in enumerate(calibration):
        for key, array in sample.items():
            (folder / key).mkdir(parents=True, exist_ok=True)
            np.save(folder / key / f"{number:05}.npy", array)
    session = Session(path)
    outputs = [session.run(sample) for sample in samples]
    return Prepared(
        name,
        path,
        folder,
        samples,
        outputs,
        _metric(subject, samples, outputs),
        path.stat().st_size,
        sum(node.op_type in LAYERS for node in model.graph.all_nodes()),
    )


def _read(data: Path, spec: str, model: ir.Model, preprocess: Path | None) -> Samples:
    return read_samples(spec if ".py:" in spec else str(data / spec), model, preprocess=preprocess)


def _without(samples: Samples, subject: Subject) -> Samples:
    """Leave out every third sample where those calibrate."""
    if not subject.calibration.endswith("[::3]"):
        return samples
    kept = [number for number in range(len(samples)) if number % 3]
    labels = [samples.labels[number] for number in kept] if samples.labels is not None else None
    return Samples([samples[number] for number in kept], samples.source, labels)


def _metric(subject: Subject, samples: Samples, outputs: Sequence[Outputs]) -> Metric | None:
    if samples.labels is None and not subject.metric:
        return None
    label = np.asarray(samples.labels[0]) if samples.labels is not None else np.empty(0)
    spec = subject.metric or default_metric(label, np.asarray(outputs[0][scored_output(outputs[0])]))
    return metric_named(spec, outputs[:16], samples.labels)


def raised(path: Path, opset: int, folder: Path) -> Path:
    """Write the model in a newer opset by ONNX's own converter, for tools that do not take the old one."""
    model = onnx.version_converter.convert_version(onnx.load(path), opset)
    model.ir_version = max(model.ir_version, 8)
    goal = folder / f"{path.stem}-opset{opset}.onnx"
    onnx.save(model, goal)
    return goal
