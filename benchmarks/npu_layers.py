"""Write the table of layers that benchmarks/cost_npu.py prices: networks of Qualcomm's AI Hub, with random weights.

    python benchmarks/npu_layers.py > benchmarks/npu_layers.csv

Needs torch 2.13, torchvision 0.28 and timm 1.0.31, which nothing else of the project does. AI Hub publishes the time of
a whole network only; which layers it is made of follows from its architecture, which these libraries hold. Each is
exported at AI Hub's input size, cleaned up, and described by `optkit.cost.work.describe`; equal layers are counted.
Constants and activations are numbers of elements.
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

COLUMNS = "model,op,kind,macs,operations,weights,inputs,outputs,m,n,k,count"
CLEANUP = (
    "eliminate-no-ops", "fold-constants", "collapse-transposes", "collapse-reshapes", "fold-pad", "fold-batch-norm",
    "simplify-activations", "fold-constants", "eliminate-duplicates", "eliminate-dead-code",
)  # fmt: skip
# AI Hub's name, where its architecture lies, and the input: what aihub_model_macs.csv names, or r3d and its like of
# torchvision.models.video with 16 frames.
NETWORKS: dict[str, tuple[str, str, tuple[int, ...]]] = {
    "beit": ("timm", "beit_base_patch16_224", (3, 224, 224)),
    "convnext_tiny": ("torchvision.models", "convnext_tiny", (3, 224, 224)),
    "densenet121": ("torchvision.models", "densenet121", (3, 224, 224)),
    "dla102x": ("timm", "dla102x", (3, 224, 224)),
    "efficientformer": ("timm", "efficientformer_l1", (3, 224, 224)),
    "efficientnet_b4": ("torchvision.models", "efficientnet_b4", (3, 380, 380)),
    "efficientvit_b2_cls": ("timm", "efficientvit_b2", (3, 224, 224)),
    "levit": ("timm", "levit_128s", (3, 224, 224)),
    "mobile_vit": ("timm", "mobilevit_s", (3, 224, 224)),
    "regnet": ("torchvision.models", "regnet_x_3_2gf", (3, 224, 224)),
    "regnet_y_800mf": ("torchvision.models", "regnet_y_800mf", (3, 224, 224)),
    "resnet101": ("torchvision.models", "resnet101", (3, 224, 224)),
    "resnet18": ("torchvision.models", "resnet18", (3, 224, 224)),
    "resnet50": ("torchvision.models", "resnet50", (3, 224, 224)),
    "resnet_2plus1d": ("torchvision.models.video", "r2plus1d_18", (3, 16, 112, 112)),
    "resnet_3d": ("torchvision.models.video", "r3d_18", (3, 16, 112, 112)),
    "resnet_mixed": ("torchvision.models.video", "mc3_18", (3, 16, 112, 112)),
    "resnext101": ("torchvision.models", "resnext101_32x8d", (3, 224, 224)),
    "resnext50": ("torchvision.models", "resnext50_32x4d", (3, 224, 224)),
    "shufflenet_v2": ("torchvision.models", "shufflenet_v2_x0_5", (3, 224, 224)),
    "squeezenet1_1": ("torchvision.models", "squeezenet1_1", (3, 224, 224)),
    "wideresnet50": ("torchvision.models", "wide_resnet50_2", (3, 224, 224)),
}


def export(network: str, folder: Path) -> Path:
    """Write one network as ONNX, opset 17, batch 1."""
    torch = importlib.import_module("torch")
    module, name, shape = NETWORKS[network]
    build = getattr(importlib.import_module(module), "create_model" if module == "timm" else name)
    model = build(name) if module == "timm" else build()
    path = folder / f"{network}.onnx"
    torch.onnx.export(model.eval(), (torch.zeros(1, *shape),), str(path), opset_version=17, dynamo=False)
    return path


def layers(network: str, path: Path) -> list[list[Any]]:
    """Return one network's layers as rows of the table."""
    model = load(path)
    Pipeline([pass_class(name)() for name in CLEANUP]).run(model, Context())
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
    """Write the table to standard output."""
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(COLUMNS.split(","))
    with tempfile.TemporaryDirectory() as folder:
        for network in NETWORKS:
            table.writerows(layers(network, export(network, Path(folder))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
