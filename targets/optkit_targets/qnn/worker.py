"""The child process in which everything of Qualcomm's runs: the one file that imports onnxruntime-qnn.

Its libraries print on stdout, keep state for a whole process and may crash on strange graphs; none of that may reach
the process that compiles. Requests and answers are pickles on stdin and stdout: ``(method name, arguments)`` in,
``("ok", result)`` or ``("refused", sentence)`` out. What the libraries print goes to stderr.
"""

from __future__ import annotations

import os
import pickle
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnxruntime as ort
import onnxruntime_qnn as qnn

from optkit_targets.qnn.binary import read_binary

MODEL, WRAPPER, PROFILE = "model.onnx", "context.onnx", "profile.csv"
NPU = "QNNExecutionProvider"


class Worker:
    """Answers requests; holds at most one session to run samples on."""

    def __init__(self) -> None:
        ort.register_execution_provider_library(qnn.get_ep_name(), qnn.get_library_path())
        self._devices = [device for device in ort.get_ep_devices() if device.ep_name == qnn.get_ep_name()]
        self._session: ort.InferenceSession | None = None

    def assign(self, folder: str, provider: Mapping[str, str]) -> dict[str, str]:
        """Return which provider took each node of ``model.onnx``, by node name, every node as written."""
        os.chdir(folder)
        options = self._options(provider, fallback=True)
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        return _assignment(ort.InferenceSession(MODEL, options))

    def compile(self, folder: str, provider: Mapping[str, str], *, fallback: bool) -> dict[str, Any]:
        """Compile ``model.onnx`` in ``folder`` into ``context.onnx`` and its binary beside it.

        Paths are relative: the binary holds a hash of the model's path, and the same model is to give the same bytes.
        """
        os.chdir(folder)
        options = self._options({**provider, "profiling_level": "detailed", "profiling_file_path": PROFILE}, fallback)
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        options.add_session_config_entry("ep.context_enable", "1")
        options.add_session_config_entry("ep.context_file_path", WRAPPER)
        options.add_session_config_entry("ep.context_embed_mode", "0")
        start = time.perf_counter()
        session = ort.InferenceSession(MODEL, options)
        seconds = time.perf_counter() - start
        if session.get_providers()[:1] != [NPU]:
            raise RuntimeError("the session did not choose the NPU's execution provider")
        binaries = sorted(path.name for path in Path().glob("*.bin"))
        library = Path(qnn.LIB_DIR_FULL_PATH) / "libQnnSystem.so"
        facts = [read_binary(library, Path(name)) for name in binaries]
        return {"seconds": seconds, "binaries": binaries, "facts": facts, "assignment": _assignment(session)}

    def load(self, model: str, provider: Mapping[str, str], *, fallback: bool) -> list[str]:
        """Load a model or a context's wrapper, and return the names of its outputs."""
        self._session = ort.InferenceSession(model, self._options(provider, fallback))
        if self._session.get_providers()[:1] != [NPU]:
            raise RuntimeError("the session did not choose the NPU's execution provider")
        return [value.name for value in self._session.get_outputs()]

    def run(self, samples: Sequence[Mapping[str, np.ndarray]]) -> list[list[np.ndarray]]:
        """Run samples on what was loaded."""
        assert self._session is not None
        names = [value.name for value in self._session.get_inputs()]
        return [self._session.run(None, {name: sample[name] for name in names}) for sample in samples]

    def _options(self, provider: Mapping[str, str], fallback: bool) -> ort.SessionOptions:
        """Return session options for the NPU; ``fallback``: nodes that it does not take may run on the CPU."""
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "0" if fallback else "1")
        options.add_provider_for_devices(self._devices[:1], {"backend_path": qnn.get_qnn_htp_path(), **provider})
        return options


def _assignment(session: ort.InferenceSession) -> dict[str, str]:
    parts = session.get_provider_graph_assignment_info()
    return {node.name: part.ep_name for part in parts for node in part.get_nodes()}


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer requests until their stream ends."""
    worker = Worker()
    while True:
        try:
            method, arguments = pickle.load(requests)
        except EOFError:
            return
        answer: tuple[str, Any]
        try:
            answer = "ok", getattr(worker, method)(**arguments)
        except Exception as error:  # onnxruntime's exceptions share no base class
            answer = "refused", str(error)
        pickle.dump(answer, answers, protocol=pickle.HIGHEST_PROTOCOL)
        answers.flush()


if __name__ == "__main__":
    private = os.fdopen(os.dup(1), "wb")  # stdout is whatever the libraries print on
    os.dup2(2, 1)
    serve(sys.stdin.buffer, private)
