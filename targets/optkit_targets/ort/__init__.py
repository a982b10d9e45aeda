"""Runs and packages models with ONNX Runtime."""
