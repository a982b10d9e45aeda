"""The figures that the READMEs of the real models give, measured again."""

from __future__ import annotations

from pathlib import Path

import pytest

from optkit.dataset.samples import read_samples
from optkit.evaluate.evaluation import evaluate
from optkit.model.loading import load
from optkit.session import Session
from real_models import SPECS

# --- real models: the figures of their READMEs ---


def measured(shared: Path, model: str, data: str, preprocess: str | None, metrics: list[str]) -> list[float]:
    path = shared / "data" / model
    spec = f"{SPECS}/{data}" if ".py:" in data else str(shared / "data" / data)
    samples = read_samples(spec, load(path), preprocess=preprocess and SPECS / preprocess)
    session = Session(path, optimize=True)
    outputs = []

    def run(samples):
        outputs[:] = [session.run(sample) for sample in samples]
        return list(outputs)

    return [e.reference for e in evaluate(run, lambda _: list(outputs), samples, metrics)[1]]


@pytest.mark.parametrize(
    ("model", "data", "preprocess", "figures"),
    [
        ("mnist/mnist_cntk8.onnx", "mnist/test.npz", "mnist_cntk8.toml", {"top1": 0.989}),
        ("mnist/mnist_burn_cnn.onnx", "mnist/test.npz", "mnist_burn_cnn.toml", {"top1": 0.993}),
        ("sst2/sst2_relu_encoder.onnx", "text_models.py:sst2_eval", None, {"top1": 0.8234}),
        ("magika_v3_3/magika_v3_3.onnx", "text_models.py:magika_eval", None, {"top1": 0.9737}),
        ("ad_autoencoder/ad_autoencoder.onnx", "text_models.py:autoencoder_eval", None, {"mse": 9.4913}),
        ("silero_vad/silero_vad.onnx", "text_models.py:silero_vad_eval", None, {"mse": 0.0}),
    ],
)
def test_figures_of_small_models(shared, model, data, preprocess, figures):
    assert measured(shared, model, data, preprocess, list(figures)) == pytest.approx(list(figures.values()), abs=6e-5)


RESNET20, RESNET56 = "resnet20_cifar10/resnet20_cifar10.onnx", "resnet56_cifar10/resnet56_cifar10.onnx"


MOBILENET, SQUEEZENET = "mobilenet_v1_075/mobilenet_v1_075.onnx", "squeezenet1_1/squeezenet1_1.onnx"


STORIES = "stories260k/stories260k.onnx"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "data", "preprocess", "figures"),
    [
        (RESNET20, "cifar10_jpeg/test.npz", "resnet_cifar10.toml", {"top1": 0.8195}),
        (RESNET56, "cifar10_jpeg/test.npz", "resnet_cifar10.toml", {"top1": 0.841}),
        (MOBILENET, "imagenet_sample", "mobilenet_v1_075.toml", {"top1": 0.822, "top5": 0.95}),
        (SQUEEZENET, "imagenet_sample", "squeezenet1_1.toml", {"top1": 0.62, "top5": 0.818}),
        ("relu_lm/relu_lm.onnx", "text_models.py:relu_lm_eval", None, {"nll": 1.7896}),
        (STORIES, "text_models.py:stories260k_eval", None, {"nll:next": 1.4618, "perplexity:next": 4.3138}),
        (STORIES, "stories260k/tokens.npz", None, {"nll:next": 1.4618}),
    ],
)
def test_figures_of_large_models(shared, model, data, preprocess, figures):
    assert measured(shared, model, data, preprocess, list(figures)) == pytest.approx(list(figures.values()), abs=6e-5)
