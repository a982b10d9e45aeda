"""The tools that are compared: how each is installed, and how each is asked for each task."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SCRIPTS = Path(__file__).parents[1] / "peers"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "optkit-benchmarks"
OURS = "optkit"

# Each tool has an environment of its own: their ceilings on onnx and NumPy exclude each other.
RUNTIME = "onnxruntime==1.31.1"
REQUIREMENTS = {
    "onnxruntime": (RUNTIME, "onnx==1.23.2", "onnx-ir", "sympy"),
    "nncf": ("nncf==3.4.0", "onnx==1.23.2", RUNTIME, "sympy"),
    "onnx-neural-compressor": (
        *("onnx-neural-compressor==1.0", "onnx==1.23.2", RUNTIME, "numpy<2"),
        *("prettytable", "scipy", "sympy"),  # it imports them and does not declare them
    ),
    # Its HQQ alone needs torch, which every import of onnxruntime.quantization would otherwise pay for.
    "onnxruntime-hqq": (RUNTIME, "onnx==1.23.2", "onnx-ir", "sympy", "torch>=2.4"),
    "neural-compressor": ("neural-compressor==3.7.1", "onnx<=1.18", "numpy<2", RUNTIME, "six", "sympy"),
    "quantize-inc": (f"{SCRIPTS.parents[1]}[inc]",),  # the same algorithms as a pass of ours
}


@dataclass(frozen=True)
class Method:
    """One way to quantize.

    Attributes:
        task: What it is compared with.
        tool: ``optkit`` or a peer.
        name: Which of the tool's ways.
        script: The peer's script below ``benchmarks/peers``, or a recipe for optkit in the peer's environment; empty
            for optkit.
        options: Arguments of the script, or of ``optkit compile``.
    """

    task: str
    tool: str
    name: str
    script: str = ""
    options: tuple[str, ...] = ()

    @property
    def opset(self) -> int:
        """Return the opset that a model is raised to where the tool does not take its own."""
        return 17 if self.task in {"w8a8", "fp16"} else 21

    def command(self, model: Path, calibration: Path, output: Path, environments: Path) -> list[str]:
        """Return the command that quantizes ``model`` into the folder ``output``."""
        if not self.script or self.script.endswith(".toml"):
            python = Path(sys.executable) if self.tool == OURS else python_of(self.tool, environments)
            command = [str(python), "-m", "optkit", "compile", str(model), "--target", "host"]
            command += ["--recipe", str(SCRIPTS / self.script)] if self.script else []
            return [*command, "--calibration", str(calibration), "--output", str(output / "package"), *self.options]
        python, script = python_of(self.tool, environments), SCRIPTS / f"{self.script}.py"
        return [str(python), str(script), str(model), str(calibration), str(output / "model.onnx"), *self.options]

    def result(self, output: Path) -> Path | None:
        """Return the ONNX file that the command left in ``output``, or None."""
        found = sorted(output.rglob("*.onnx"))
        return found[0] if found else None


def _ours(task: str, name: str, *options: str) -> Method:
    return Method(task, OURS, name, "", options)


def _int8(tool: str, name: str, script: str, *options: str) -> Method:
    return Method("w8a8", tool, name, script, options)


def _blocks(task: str, tool: str, name: str, script: str, *options: str) -> Method:
    return Method(task, tool, name, script, options)


def _pass(task: str, algorithm: str) -> Method:
    return Method(task, PASS, algorithm, "quantize_inc.toml", ("--set", f"quantize-inc.algorithm={algorithm}"))


ORT, NNCF, ONC, HQQ, INC, PASS = REQUIREMENTS
METHODS: tuple[Method, ...] = (
    _ours("w8a8", "default", "--precision", "w8a8"),
    _ours("w8a8", "static", "--precision", "w8a8", "--set", "quantize-int8.form=static"),
    _int8(ORT, "static", "onnxruntime_integer"),
    _int8(ORT, "static, 7-bit weights", "onnxruntime_integer", "reduce_range=1"),
    _int8(ORT, "static, layers only", "onnxruntime_integer", "layers=1"),
    _int8(ORT, "static, layers only, 7-bit weights", "onnxruntime_integer", "layers=1", "reduce_range=1"),
    _int8(ORT, "dynamic", "onnxruntime_integer", "dynamic=1"),
    _int8(ORT, "dynamic, unsigned weights", "onnxruntime_integer", "dynamic=1", "weight=QUInt8"),
    _int8(NNCF, "static", "nncf_integer"),
    _int8(NNCF, "static, folded first", "nncf_integer", "folded=1"),
    _int8(NNCF, "static, transformer", "nncf_integer", "model_type=transformer"),
    _int8(ONC, "static", "onnx_neural_compressor_integer"),
    _int8(ONC, "smoothquant", "onnx_neural_compressor_integer", "algorithm=smoothquant"),
    _int8(ONC, "dynamic", "onnx_neural_compressor_integer", "algorithm=dynamic"),
    _int8(INC, "static", "neural_compressor_all", "algorithm=static"),
    _int8(INC, "smoothquant", "neural_compressor_all", "algorithm=smoothquant"),
    _int8(INC, "dynamic", "neural_compressor_all", "algorithm=dynamic"),
    *(_pass("w8a8", algorithm) for algorithm in ("static", "smoothquant", "dynamic")),
    _ours("w4a16-b32", "default", "--precision", "w4a16-b32"),
    _ours("w4a16-b32", "rtn", "--precision", "w4a16-b32", "--set", "quantize-weights.method=rtn"),
    _blocks("w4a16-b32", ORT, "default", "onnxruntime_nbits"),
    _blocks("w4a16-b32", ORT, "default, symmetric", "onnxruntime_nbits", "symmetric=1"),
    _blocks("w4a16-b32", HQQ, "hqq", "onnxruntime_nbits", "method=hqq"),
    _blocks("w4a16-b32", ORT, "gptq", "onnxruntime_nbits", "method=gptq"),
    _blocks("w4a16-b32", ORT, "k-quant", "onnxruntime_nbits", "method=k_quant"),
    _blocks("w4a16-b32", ORT, "rtn", "onnxruntime_nbits", "method=rtn"),
    _blocks("w4a16-b32", NNCF, "asymmetric", "nncf_weights", "mode=INT4_ASYM"),
    _blocks("w4a16-b32", NNCF, "asymmetric, awq, scale estimation", "nncf_weights", "awq=1", "scale_estimation=1"),
    _blocks("w4a16-b32", ONC, "rtn", "onnx_neural_compressor_nbits", "algorithm=rtn"),
    _blocks("w4a16-b32", ONC, "rtn, symmetric", "onnx_neural_compressor_nbits", "algorithm=rtn", "symmetric=1"),
    _blocks("w4a16-b32", ONC, "gptq, symmetric", "onnx_neural_compressor_nbits", "algorithm=gptq", "symmetric=1"),
    _blocks("w4a16-b32", ONC, "awq, symmetric", "onnx_neural_compressor_nbits", "algorithm=awq", "symmetric=1"),
    _blocks("w4a16-b32", INC, "rtn", "neural_compressor_all", "algorithm=rtn"),
    _blocks("w4a16-b32", INC, "rtn, symmetric", "neural_compressor_all", "algorithm=rtn", "symmetric=1"),
    _blocks("w4a16-b32", INC, "gptq, symmetric", "neural_compressor_all", "algorithm=gptq", "symmetric=1"),
    _blocks("w4a16-b32", INC, "awq, symmetric", "neural_compressor_all", "algorithm=awq", "symmetric=1"),
    *(_pass("w4a16-b32", algorithm) for algorithm in ("rtn", "gptq", "awq")),
    _ours("w2a16-b32", "default", "--precision", "w2a16-b32"),
    _blocks("w2a16-b32", ORT, "default", "onnxruntime_nbits", "bits=2"),
    _blocks("w2a16-b32", ORT, "default, symmetric", "onnxruntime_nbits", "bits=2", "symmetric=1"),
    _blocks("w2a16-b32", HQQ, "hqq", "onnxruntime_nbits", "bits=2", "method=hqq"),
    _ours("fp16", "default", "--precision", "fp16"),
    Method("fp16", ORT, "transformers.float16", "onnxruntime_float16"),
    _ours("w8a16", "default", "--precision", "w8a16"),
    _ours("w4a8", "default", "--precision", "w4a8"),
)
TASKS = tuple(dict.fromkeys(method.task for method in METHODS))


def python_of(peer: str, environments: Path) -> Path:
    """Return the interpreter of a peer's environment."""
    return environments / peer / "bin" / "python"


def install(peers: Sequence[str], environments: Path) -> None:
    """Create the environments of peers that have none; progress goes to the terminal.

    Raises:
        CalledProcessError: pip failed.
    """
    for peer in peers:
        folder = environments / peer
        if not (folder / "complete").exists():
            print(f"installing {peer} into {folder}", file=sys.stderr)
            subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
            subprocess.run([folder / "bin" / "pip", "install", "-q", *REQUIREMENTS[peer]], check=True)
            (folder / "complete").touch()


def missing(peers: Sequence[str], environments: Path) -> list[str]:
    """Return the peers that have no environment."""
    return [peer for peer in peers if not python_of(peer, environments).exists()]
