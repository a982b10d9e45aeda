"""Compiles models for Apple's Core ML: ONNX to ML Program packages, and an interpreter that runs them anywhere."""
