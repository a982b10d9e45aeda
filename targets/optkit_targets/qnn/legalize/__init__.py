"""Passes that only Qualcomm's HTP toolchain needs: for forms that it refuses, or computes otherwise than ONNX says.

What it does with each form was asked of onnxruntime-qnn 2.7 (QNN 2.51) and its emulator, node by node, against
onnxruntime on the CPU; the docstring of each pass says what came out.
"""
