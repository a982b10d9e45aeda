"""The models of the shared folder with every shape fixed, and their data, for devices that take static shapes only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

SPECS = Path(__file__).parents[1] / "tests" / "data_specs"
TEXT = f"{SPECS}/text_models.py:"


@dataclass(frozen=True)
class Subject:
    """A model below ``data/`` of the shared folder.

    Attributes:
        folder: Where its file is.
        calibration: Data to calibrate with: a path below ``data/``, or ``TEXT`` and a function of ``text_models.py``.
        evaluation: The same to score on, without a slice.
        first: The first sample to score: those before it may have been calibrated with.
        preprocess: How images become inputs, a file of ``tests/data_specs``.
        dims: Sizes of dynamic dimensions.
        fixed: Values of inputs that become constants.
        metric: The metric, where the labels do not say.
    """

    folder: str
    calibration: str
    evaluation: str
    first: int = 0
    preprocess: str = ""
    dims: tuple[tuple[str, int], ...] = ()
    fixed: tuple[tuple[str, float], ...] = ()
    metric: str = ""

    def path(self, shared: Path, name: str) -> Path:
        """Return the model's file."""
        return shared / "data" / self.folder / f"{name}.onnx"

    def calibration_data(self, shared: Path) -> str:
        """Return the data to calibrate with."""
        return _located(shared, self.calibration)

    def evaluation_data(self, shared: Path, samples: int) -> str:
        """Return that many samples to score on, or all there are."""
        return f"{_located(shared, self.evaluation)}[{self.first}:{self.first + samples}]"

    @property
    def spec(self) -> Path | None:
        """The file that says how images become inputs."""
        return SPECS / self.preprocess if self.preprocess else None


def _located(shared: Path, data: str) -> str:
    return data if data.startswith(TEXT) else str(shared / "data" / data)


def _images(preprocess: str, *dims: tuple[str, int], folder: str) -> Subject:
    return Subject(folder, "imagenet_sample[:100]", "imagenet_sample", 100, preprocess, dims)


def _cifar10(folder: str) -> Subject:
    data = ("cifar10_jpeg/calibration.npz[:128]", "cifar10_jpeg/test.npz")
    return Subject(folder, *data, 0, "resnet_cifar10.toml", (("N", 1),))


SUBJECTS = {
    "squeezenet1_1": _images("squeezenet1_1.toml", folder="squeezenet1_1"),
    "mobilenet_v1_075": _images("mobilenet_v1_075.toml", ("N", 1), folder="mobilenet_v1_075"),
    "resnet20_cifar10": _cifar10("resnet20_cifar10"),
    "resnet56_cifar10": _cifar10("resnet56_cifar10"),
    "mnist_burn_cnn": Subject("mnist", "mnist/calibration.npz[:128]", "mnist/test.npz", 0, "mnist_burn_cnn.toml"),
    "mnist_cntk8": Subject("mnist", "mnist/calibration.npz[:128]", "mnist/test.npz", 0, "mnist_cntk8.toml"),
    "ultraface_rfb320": Subject(
        "ultraface_rfb320", "ultraface_rfb320/golden.npz[:4]", "ultraface_rfb320/golden.npz", 4, "ultraface_rfb320.toml"
    ),
    "fns_candy": Subject(
        "fns_candy", "fns_candy/golden.npz[:1]", "fns_candy/golden.npz", 0, "fns_candy.toml", (("None", 1),)
    ),
    "sst2_relu_encoder": Subject(
        "sst2", f"{TEXT}sst2_padded_calibration[:128]", f"{TEXT}sst2_padded_eval", dims=(("N", 1), ("T", 40))
    ),
    "relu_lm": Subject(
        "relu_lm", f"{TEXT}relu_lm_calibration[:64]", f"{TEXT}relu_lm_eval", dims=(("N", 1), ("T", 128))
    ),
    "stories260k": Subject(
        "stories260k",
        f"{TEXT}stories260k_fixed[:20]",
        f"{TEXT}stories260k_fixed",
        20,
        dims=(("N", 1), ("T", 128)),
        metric="nll:next",
    ),
    "ad_autoencoder": Subject(
        "ad_autoencoder", f"{TEXT}autoencoder_eval[:64]", f"{TEXT}autoencoder_eval", 64, dims=(("N", 1),)
    ),
    "magika_v3_3": Subject("magika_v3_3", f"{TEXT}magika_eval[:19]", f"{TEXT}magika_eval", 19, dims=(("unk__214", 1),)),
    "silero_vad_op18_ifless": Subject(
        "silero_vad",
        f"{TEXT}silero_vad_eval[:32]",
        f"{TEXT}silero_vad_eval",
        32,
        dims=(("batch", 1), ("sequence", 576)),
        fixed=(("sr", 16000),),
        metric="mse",
    ),
}
