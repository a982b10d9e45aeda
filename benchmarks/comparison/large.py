"""Our int4 on a decoder of 100 million random parameters: seconds and peak memory by each method."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx_ir as ir

from comparison.processes import measure

LAYERS, WIDTH, HEADS, HIDDEN, VOCABULARY = 12, 768, 12, 3072, 10_240
SAMPLES, TOKENS = 64, 128
METHODS = ("rtn", "gptq")

# x: [1, T, WIDTH]; pre-normalized, causal, ReLU.
LAYER = """
    n{i}a = LayerNormalization (x{i}, ones, zeros)
    qkv{i} = MatMul (n{i}a, wqkv{i})
    q{i}, k{i}, v{i} = Split <axis = -1> (qkv{i}, thirds)
    q{i}h = Reshape (q{i}, heads)
    k{i}h = Reshape (k{i}, heads)
    v{i}h = Reshape (v{i}, heads)
    q{i}t = Transpose <perm = [0, 2, 1, 3]> (q{i}h)
    k{i}t = Transpose <perm = [0, 2, 3, 1]> (k{i}h)
    v{i}t = Transpose <perm = [0, 2, 1, 3]> (v{i}h)
    s{i} = MatMul (q{i}t, k{i}t)
    s{i}s = Mul (s{i}, scale)
    s{i}m = Add (s{i}s, mask)
    p{i} = Softmax <axis = -1> (s{i}m)
    o{i} = MatMul (p{i}, v{i}t)
    o{i}t = Transpose <perm = [0, 2, 1, 3]> (o{i})
    o{i}f = Reshape (o{i}t, flat)
    o{i}p = MatMul (o{i}f, wo{i})
    h{i} = Add (x{i}, o{i}p)
    n{i}b = LayerNormalization (h{i}, ones, zeros)
    u{i} = MatMul (n{i}b, wu{i})
    r{i} = Relu (u{i})
    d{i} = MatMul (r{i}, wd{i})
    x{j} = Add (h{i}, d{i})
"""


def build(path: Path) -> int:
    """Write the model, its weights beside it, and return how many parameters it has."""
    generator = np.random.default_rng(0)

    def weight(rows: int, columns: int) -> np.ndarray:
        return generator.standard_normal((rows, columns), np.float32) / np.float32(rows**0.5)

    constants: dict[str, np.ndarray] = {
        "table": generator.standard_normal((VOCABULARY, WIDTH), np.float32),
        "head": weight(WIDTH, VOCABULARY),
        "ones": np.ones(WIDTH, np.float32),
        "zeros": np.zeros(WIDTH, np.float32),
        "thirds": np.full(3, WIDTH, np.int64),
        "heads": np.array([1, TOKENS, HEADS, WIDTH // HEADS], np.int64),
        "flat": np.array([1, TOKENS, WIDTH], np.int64),
        "scale": np.array((WIDTH // HEADS) ** -0.5, np.float32),
        "mask": np.triu(np.full((TOKENS, TOKENS), -1e9, np.float32), 1),
    }
    for i in range(LAYERS):
        constants |= {f"wqkv{i}": weight(WIDTH, 3 * WIDTH), f"wo{i}": weight(WIDTH, WIDTH)}
        constants |= {f"wu{i}": weight(WIDTH, HIDDEN), f"wd{i}": weight(HIDDEN, WIDTH)}
    text = (
        f'<ir_version: 8, opset_import: ["" : 17]> decoder (int64[1,{TOKENS}] ids) => '
        f"(float[1,{TOKENS},{VOCABULARY}] logits) {{ x0 = Gather (table, ids)\n"
        + "".join(LAYER.format(i=i, j=i + 1) for i in range(LAYERS))
        + f"last = LayerNormalization (x{LAYERS}, ones, zeros)\n logits = MatMul (last, head) }}"
    )
    model = ir.from_onnx_text(text, initializers=[ir.tensor(array, name=name) for name, array in constants.items()])
    for number, node in enumerate(model.graph):
        node.name = f"{node.op_type}_{number}"
    ir.save(model, path, external_data=f"{path.stem}.data")
    return sum(array.size for array in constants.values())


def time_large(timeout: float) -> None:
    """Build the model in a temporary folder, compile it by each method, and print what that took."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parameters = build(folder / "decoder.onnx")
        tokens = np.random.default_rng(1).integers(0, VOCABULARY, (SAMPLES, 1, TOKENS))
        np.savez(folder / "tokens.npz", ids=tokens)
        print(f"{parameters / 1e6:.1f} M parameters, {SAMPLES} samples of {TOKENS} tokens to calibrate with\n")
        print(f"{'method':8}{'seconds':>9}{'CPU s':>9}{'peak MB':>9}{'file MB':>9}{'dB':>7}")
        for method in METHODS:
            command = [sys.executable, "-m", "optkit", "compile", "decoder.onnx", "--target", "host"]
            command += ["--precision", "w4a16-b32", "--set", f"quantize-weights.method={method}"]
            command += ["--calibration", "tokens.npz", "--output", method]
            cost = measure(command, folder=folder, timeout=timeout)
            if cost.error:
                print(f"{method:8}  failed: {cost.error}")
                continue
            report = json.loads((folder / method / "report.json").read_text(encoding="utf-8"))
            decibels = report["executions"][0]["fidelity"]["sqnr_db"]
            size = sum(item.stat().st_size for item in (folder / method).rglob("*") if item.suffix != ".html")
            figures = f"{cost.seconds:9.1f}{cost.cpu_seconds:9.1f}{cost.memory_bytes / 1e6:9.0f}{size / 1e6:9.1f}"
            print(f"{method:8}{figures}{decibels:7.1f}", flush=True)
