"""Train the digits classifier and write digits.onnx, calibration.npz and test.npz beside this script.

    pip install "optkit[train]"
    python examples/digits/train.py

Data: the 1,797 handwritten digits (8x8 pixels) that come with scikit-learn, split by class into 1,347 for training and
450 held out. Seeds are fixed and one thread is used, so that a rerun with the same versions of torch gives the same
file; with other versions the accuracy moves by a few tenths of a percent (one of 450 digits is 0.22 %).
"""

import argparse
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

SEED = 0
EPOCHS = 60
REQUIRED_ACCURACY = 0.975


def conv(cin: int, cout: int, kernel: int, groups: int = 1) -> nn.Sequential:
    """Convolution without bias, then batch norm: the exported graph keeps both."""
    convolution = nn.Conv2d(cin, cout, kernel, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(cout))


class Digits(nn.Module):
    """8x8 -> stem, depthwise-separable residual -> pool 4x4 -> residual -> mean over pixels -> 10 scores."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(1, 24, 3)
        self.depthwise = conv(24, 24, 3, groups=24)
        self.pointwise = conv(24, 24, 1)
        self.widen = conv(24, 48, 3)
        self.block1 = conv(48, 48, 3)
        self.block2 = conv(48, 48, 3)
        self.classifier = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = (x + self.pointwise(self.depthwise(x).relu())).relu()
        x = nn.functional.max_pool2d(self.widen(x).relu(), 2)
        x = (x + self.block2(self.block1(x).relu())).relu()
        return self.classifier(x.mean((2, 3)))


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image by up to one pixel and add a little noise."""
    padded = nn.functional.pad(images, (1, 1, 1, 1))
    shifts = torch.randint(0, 3, (len(images), 2), generator=generator).tolist()
    shifted = torch.stack([image[:, y : y + 8, x : x + 8] for image, (y, x) in zip(padded, shifts, strict=True)])
    return shifted + 0.05 * torch.randn(shifted.shape, generator=generator)


def train(images: Tensor, labels: Tensor) -> Digits:
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    net = Digits()
    steps = EPOCHS * -(-len(images) // 64)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=steps)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(images), generator=generator).split(64):
            loss = nn.functional.cross_entropy(net(augment(images[batch], generator)), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval()


def to_onnx(net: Digits) -> ir.Model:
    """Write the network node by node, as an exporter without any folding would."""
    tape = ir.tape.Tape()
    weights = {name: array.detach().numpy() for name, array in net.state_dict().items()}

    def weight(name: str) -> ir.Value:
        return tape.initializer(ir.tensor(weights[name], name=name))

    def conv_bn(x: ir.Value, name: str) -> ir.Value:
        layer = getattr(net, name)[0]
        pads = [layer.padding[0]] * 4
        attributes = {"group": layer.groups, "kernel_shape": list(layer.kernel_size), "pads": pads}
        x = tape.op("Conv", [x, weight(f"{name}.0.weight")], attributes, name=f"{name}.conv")
        norm = [weight(f"{name}.1.{part}") for part in ("weight", "bias", "running_mean", "running_var")]
        return tape.op("BatchNormalization", [x, *norm], {"epsilon": getattr(net, name)[1].eps}, name=f"{name}.norm")

    def relu(x: ir.Value, name: str) -> ir.Value:
        return tape.op("Relu", [x], name=f"{name}.relu")

    def add(a: ir.Value, b: ir.Value, name: str) -> ir.Value:
        return tape.op("Add", [a, b], name=f"{name}.add")

    image = ir.val("image", dtype=ir.DataType.FLOAT, shape=("batch", 1, 8, 8))
    scores = ir.val("scores", dtype=ir.DataType.FLOAT, shape=("batch", 10))
    x = relu(conv_bn(image, "stem"), "stem")
    inner = conv_bn(relu(conv_bn(x, "depthwise"), "depthwise"), "pointwise")
    x = relu(add(x, inner, "separable"), "separable")
    x = relu(conv_bn(x, "widen"), "widen")
    x = tape.op("MaxPool", [x], {"kernel_shape": [2, 2], "strides": [2, 2]}, name="pool")
    inner = conv_bn(relu(conv_bn(x, "block1"), "block1"), "block2")
    x = relu(add(x, inner, "block"), "block")
    x = tape.op("GlobalAveragePool", [x], name="mean")
    x = tape.op("Flatten", [x], {"axis": 1}, name="flatten")
    classifier = [weight("classifier.weight"), weight("classifier.bias")]
    tape.op("Gemm", [x, *classifier], {"transB": 1}, name="classifier", output=scores)
    for node in tape.nodes[:-1]:
        node.outputs[0].name = node.name
    graph = ir.Graph(
        [image], [scores], nodes=tape.nodes, initializers=tape.initializers, opset_imports={"": 17}, name="digits"
    )
    return ir.Model(graph, ir_version=8, producer_name="examples/digits/train.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="where to write the three files")
    output = parser.parse_args().output
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)

    digits = load_digits()
    images = (digits.images[:, None] / 16).astype(np.float32)  # [n, 1, 8, 8] in [0, 1]
    labels = digits.target.astype(np.int64)
    split = train_test_split(images, labels, test_size=450, random_state=SEED, stratify=labels)
    train_images, test_images, train_labels, test_labels = split

    net = train(torch.from_numpy(train_images), torch.from_numpy(train_labels))
    output.mkdir(parents=True, exist_ok=True)
    model = output / "digits.onnx"
    model.write_bytes(ir.to_proto(to_onnx(net)).SerializeToString(deterministic=True))
    np.savez_compressed(output / "calibration.npz", image=train_images[:100])
    np.savez_compressed(output / "test.npz", image=test_images, labels=test_labels)

    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    scores = session.run(["scores"], {"image": test_images})[0]
    with torch.inference_mode():
        difference = np.abs(net(torch.from_numpy(test_images)).numpy() - scores).max()
    correct = int((scores.argmax(1) == test_labels).sum())
    print(f"{model}: {model.stat().st_size:,} bytes, differs from torch by at most {difference:.1e}")
    print(f"held-out accuracy: {correct} of {len(test_labels)} = {correct / len(test_labels):.2%}")
    if correct < REQUIRED_ACCURACY * len(test_labels):
        raise SystemExit(f"below the required {REQUIRED_ACCURACY:.1%}")


if __name__ == "__main__":
    main()
