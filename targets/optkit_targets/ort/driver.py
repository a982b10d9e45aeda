"""Runs a model on samples inside an emulated Python: ``driver.py MODEL INPUTS.npz OUTPUTS.npz OPTIONS``.

Arrays are keyed ``<sample>.<position>``, names stand in OPTIONS, which is JSON: ``{"inputs": [...], "threads": n}``.
Only numpy and onnxruntime can be imported there. What onnxruntime refuses is said on stderr, with exit code 3.
"""

import json
import sys

import numpy as np
import onnxruntime as ort


def main(model: str, inputs: str, outputs: str, options: str) -> int:
    """Run every sample and write its outputs in the model's order."""
    wanted = json.loads(options)
    settings = ort.SessionOptions()
    settings.log_severity_level = 4  # errors come back as exceptions
    settings.intra_op_num_threads = wanted["threads"]
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")  # a waiting thread costs emulated time
    results = {}
    try:
        session = ort.InferenceSession(model, settings, providers=["CPUExecutionProvider"])
        taken = {value.name for value in [*session.get_inputs(), *session.get_overridable_initializers()]}
        results["names"] = np.array([value.name for value in session.get_outputs()])
        with np.load(inputs) as arrays:
            for sample, names in enumerate(wanted["inputs"]):
                feed = {name: arrays[f"{sample}.{position}"] for position, name in enumerate(names) if name in taken}
                for position, value in enumerate(session.run(None, feed)):
                    array = np.asarray(value)
                    results[f"{sample}.{position}"] = array.astype(str) if array.dtype == object else array
    except Exception as error:  # onnxruntime's exceptions share no base class
        print(error, file=sys.stderr)  # noqa: T201  the only way out of the emulator
        return 3
    np.savez(outputs, allow_pickle=False, **results)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
