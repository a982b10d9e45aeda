"""The real models of the shared folder, and the data that each is calibrated, evaluated and compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from optkit.dataset.samples import Samples, read_samples
from optkit.model.loading import load

SPECS = Path(__file__).parent / "data_specs"
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@dataclass(frozen=True)
class RealModel:
    """A model below ``shared/data``.

    Attributes:
        file: The ONNX file.
        calibration: Its calibration data: a path below ``shared/data``, or a function of ``text_models.py``.
        evaluation: Samples that are not in ``calibration`` where the folder has any.
        preprocess: How images become inputs, a file of ``data_specs``.
        share: What the int8 file may be of the float one; None where no figure is promised.
    """

    file: str
    calibration: str
    evaluation: str
    preprocess: str = ""
    share: float | None = None

    @property
    def path(self) -> Path:
        return DATA / self.file

    @property
    def spec(self) -> Path | None:
        return SPECS / self.preprocess if self.preprocess else None

    @property
    def calibration_data(self) -> str:
        return located(self.calibration)

    @property
    def evaluation_data(self) -> str:
        return located(self.evaluation)

    def samples(self, count: int) -> Samples:
        """Return the first ``count`` evaluation samples, without their labels."""
        found = read_samples(self.evaluation_data, load(self.path), preprocess=self.spec)[:count]
        return Samples(found.items, found.source)


def located(data: str) -> str:
    return str((SPECS if ".py:" in data else DATA) / data)


def text(name: str, calibration: str, evaluation: str) -> Sequence[str]:
    return f"text_models.py:{name}_{calibration}", f"text_models.py:{name}_{evaluation}"


MNIST = ("mnist/calibration.npz[:128]", "mnist/test.npz[:1000]")
CIFAR10 = ("cifar10_jpeg/calibration.npz[:128]", "cifar10_jpeg/test.npz[:500]")
IMAGENET = ("imagenet_sample[:100]", "imagenet_sample[100:]")
SPEECH = text("silero_vad", "eval[:32]", "eval[32:48]")

# Sizes that make every shape static, for devices that want that, and data of those sizes where the model's own varies.
STATIC_DIMS = {
    "ad_autoencoder": {"N": 1},
    "fns_candy": {"None": 1},
    "magika_v3_3": {"unk__214": 1},
    "mobilenet_v1_075": {"N": 1},
    "relu_lm": {"N": 1, "T": 128},
    "resnet20_cifar10": {"N": 1},
    "resnet56_cifar10": {"N": 1},
    "silero_vad": {"input.0": 1, "input.1": 576, "state.1": 1},
    "silero_vad_half": {"input.0": 1, "input.1": 576, "state.1": 1},
    "silero_vad_op18_ifless": {"batch": 1, "sequence": 576},
    "sst2_relu_encoder": {"N": 1, "T": 40},
    "stories260k": {"N": 1, "T": 64},
}

REAL_MODELS = {
    name: RealModel(f"{folder}/{name}.onnx", *rest)
    for name, folder, *rest in (
        ("ad_autoencoder", "ad_autoencoder", *text("autoencoder", "eval[:64]", "eval[64:]")),
        ("fns_candy", "fns_candy", "fns_candy/golden.npz", "fns_candy/golden.npz", "fns_candy.toml"),
        ("magika_v3_3", "magika_v3_3", *text("magika", "eval[::4]", "eval[1::4]")),
        ("mnist_burn_cnn", "mnist", *MNIST, "mnist_burn_cnn.toml", 0.3),
        ("mnist_cntk8", "mnist", *MNIST, "mnist_cntk8.toml", 0.3),
        ("mobilenet_v1_075", "mobilenet_v1_075", *IMAGENET, "mobilenet_v1_075.toml", 0.3),
        ("relu_lm", "relu_lm", *text("relu_lm", "calibration[:16]", "eval[:16]")),
        ("resnet20_cifar10", "resnet20_cifar10", *CIFAR10, "resnet_cifar10.toml", 0.3),
        ("resnet56_cifar10", "resnet56_cifar10", *CIFAR10, "resnet_cifar10.toml", 0.3),
        ("silero_vad", "silero_vad", *SPEECH),
        ("silero_vad_half", "silero_vad", *SPEECH),
        ("silero_vad_op18_ifless", "silero_vad", *SPEECH),
        ("squeezenet1_1", "squeezenet1_1", *IMAGENET, "squeezenet1_1.toml", 0.3),
        ("squeezenet1_1_fp16_original", "squeezenet1_1", *IMAGENET, "squeezenet1_1.toml"),
        ("sst2_relu_encoder", "sst2", *text("sst2", "calibration[:64]", "eval[:64]")),
        ("stories260k", "stories260k", *text("stories260k", "calibration[:4]", "eval[:4]")),
        (
            "ultraface_rfb320",
            "ultraface_rfb320",
            "ultraface_rfb320/golden.npz[:4]",
            "ultraface_rfb320/golden.npz[4:]",
            "ultraface_rfb320.toml",
        ),
    )
}
