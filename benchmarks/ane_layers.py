"""Write the table of layers that benchmarks/cost_ane.py prices: the networks that Apple timed on its Neural Engine.

    python benchmarks/ane_layers.py > benchmarks/ane_layers.csv

Needs torch 2.13, torchvision 0.28 and timm 1.0.31, which nothing else of the project does. Apple publishes the time of
a whole network only; which layers it is made of follows from its architecture, which these libraries hold (the CLIP
text towers are built here). Branches that exist in training alone are folded, as Apple folded them. Each network is
exported at the input that it was timed with, cleaned up by the passes that begin every pipeline of an ANE, and
described by `optkit.cost.work.describe`; equal layers are counted. Constants and activations are numbers of elements.
"""

from __future__ import annotations

import csv
import importlib
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from optkit.cost.work import describe
from optkit.model.loading import load
from optkit.pipeline import Context, Pipeline
from optkit.plugins import pass_class
from optkit.target import load_target

COLUMNS = "model,op,kind,macs,operations,weights,inputs,outputs,m,n,k,count"
TARGET = "apple-a17-ane"
# Apple's name; where its architecture lies ("text": width and layers of a text tower, whose vocabulary has 49,408
# words); the edge of the image, or the number of words.
NETWORKS: dict[str, tuple[str, str, int]] = {
    "FastViT-MA36": ("timm", "fastvit_ma36", 256),
    "FastViT-S12": ("timm", "fastvit_s12", 256),
    "FastViT-SA12": ("timm", "fastvit_sa12", 256),
    "FastViT-SA24": ("timm", "fastvit_sa24", 256),
    "FastViT-SA36": ("timm", "fastvit_sa36", 256),
    "FastViT-T12": ("timm", "fastvit_t12", 256),
    "FastViT-T8": ("timm", "fastvit_t8", 256),
    "MobileCLIP-B image": ("timm", "vit_base_mci_224", 224),
    "MobileCLIP-L/14 image": ("timm", "vit_large_patch14_clip_224", 224),
    "MobileCLIP-S0 image": ("timm", "fastvit_mci0", 256),
    "MobileCLIP-S1 image": ("timm", "fastvit_mci1", 256),
    "MobileCLIP-S2 image": ("timm", "fastvit_mci2", 256),
    "MobileCLIP-S3 image": ("timm", "fastvit_mci3", 256),
    "MobileCLIP-S4 image": ("timm", "fastvit_mci4", 256),
    "MobileCLIP-S1 text": ("text", "512 12", 77),
    "MobileCLIP-S3 text": ("text", "768 12", 77),
    "MobileNetv2-1.0": ("torchvision.models", "mobilenet_v2", 224),
    "MobileNetv3-small": ("torchvision.models", "mobilenet_v3_small", 224),
    "MobileOne-S0": ("timm", "mobileone_s0", 224),
    "MobileOne-S1": ("timm", "mobileone_s1", 224),
    "MobileOne-S2": ("timm", "mobileone_s2", 224),
    "MobileOne-S3": ("timm", "mobileone_s3", 224),
    "MobileOne-S4": ("timm", "mobileone_s4", 224),
    "MobileViTv2-1.0": ("timm", "mobilevitv2_100", 256),
    "ResNet50": ("torchvision.models", "resnet50", 224),
}


def text_tower(width: int, layers: int, words: int) -> tuple[Any, Any]:
    """Return a CLIP text encoder and its input: words to one vector as wide as the model."""
    torch = importlib.import_module("torch")
    vision = importlib.import_module("timm.models.vision_transformer")
    vocabulary = 49408

    class Tower(torch.nn.Module):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(vocabulary, width)
            self.place = torch.nn.Parameter(torch.zeros(1, words, width))
            self.blocks = torch.nn.Sequential(*[vision.Block(width, width // 64) for _ in range(layers)])
            self.norm = torch.nn.LayerNorm(width)
            self.project = torch.nn.Linear(width, width, bias=False)

        def forward(self, tokens: Any) -> Any:
            return self.project(self.norm(self.blocks(self.table(tokens) + self.place))[:, -1])

    return Tower(), torch.zeros(1, words, dtype=torch.int64)


def export(network: str, folder: Path) -> Path:
    """Write one network as ONNX, opset 17, batch 1."""
    torch = importlib.import_module("torch")
    module, name, size = NETWORKS[network]
    if module == "text":
        width, layers = map(int, name.split())
        model, sample = text_tower(width, layers, size)
    else:
        sample = torch.zeros(1, 3, size, size)
        make = getattr(importlib.import_module(module), "create_model" if module == "timm" else name)
        model = make(name) if module == "timm" else make()
    model = model.eval()
    if module == "timm":
        model = importlib.import_module("timm.utils.model").reparameterize_model(model)
    path = folder / f"{network.replace('/', '_')}.onnx"
    torch.onnx.export(model, (sample,), str(path), opset_version=17, dynamo=False)
    return path


def layers(network: str, path: Path) -> list[list[Any]]:
    """Return one network's layers as rows of the table."""
    target = load_target(TARGET)
    model = load(path)
    passes = [pass_class(spec.pass_).model_validate(spec.options) for spec in target.cleanup]
    Pipeline(passes).run(model, Context(target=target))
    rows: Counter[tuple[Any, ...]] = Counter()
    for work in describe(model):
        if work.unpriced:
            raise ValueError(f"{network}: {work.unpriced}")
        if work.kind != "view" and work.dtype == "float32":  # arithmetic on shapes costs nothing
            elements = (work.read_bytes // 4, work.input_bytes // 4, work.output_bytes // 4)
            sizes = (work.m or "", work.n or "", work.k or "")
            rows[(network, work.op_type, work.kind, work.macs, work.operations, *elements, *sizes)] += work.count
    return [[*row, count] for row, count in rows.items()]


def main() -> int:
    """Write the table."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(COLUMNS.split(","))
    with tempfile.TemporaryDirectory() as folder:
        for network in sorted(NETWORKS):
            path = export(network, Path(folder))
            writer.writerows(layers(network, path))
            path.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
