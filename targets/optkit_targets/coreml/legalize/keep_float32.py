"""Let Core ML compute in float32."""

from __future__ import annotations

import onnx_ir as ir

from optkit.pipeline import Context, Pass

FLOAT_KEY = "optkit.float"


class KeepFloat32(Pass):
    """Let Core ML compute in float32, on the CPU and the GPU: the Neural Engine computes in float16 only.

    The model says so in its metadata (``optkit.float``); without it the packager writes float16.
    """

    def run(self, model: ir.Model, context: Context) -> None:
        """Mark the model."""
        if model.metadata_props.get(FLOAT_KEY) == "float32":
            context.missed("model", "it is computed in float32 already")
            return
        model.metadata_props[FLOAT_KEY] = "float32"
        context.applied("model", "computed in float32, so never on the Neural Engine")
