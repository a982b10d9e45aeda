"""From ONNX to MIL: one small function for every family of operators."""
