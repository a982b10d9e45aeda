"""Passes that only Qualcomm's HTP toolchain needs: for forms that it refuses, or computes otherwise than ONNX says.

What it does with each form was asked of onnxruntime-qnn 2.7 (QNN 2.51) and its emulator, node by node, against
onnxruntime on the CPU; the docstring of each pass says what came out. What came out as needing no pass:

* int64: indices, constants, arithmetic, comparisons, inputs and outputs are narrowed to 32 bits by the provider.
* Linear layers as 1x1 convolutions: MatMul and Gemm take int8 and int4 weights with a scale per channel as Conv does,
  and compile to as many bytes (four layers of 256 x 256: w8a8 320 and 328 kB, w4a16 197 and 205 kB, Conv the larger).
* Channels as multiples of 32: the compiler pads them itself (six 3x3 convolutions of 33, 48 and 64 channels: 135, 135
  and 139 kB; of 24 and 32: 74 and 78 kB), so that zeros in the model would only be paid for twice.
* Squeeze, Unsqueeze, Flatten, Expand, convolutions over one or three axes, squares by Pow, quotients by constants, axes
  as inputs, Gelu, LayerNormalization and RMSNormalization (opset 23), Swish (24), Attention and RotaryEmbedding (23),
  LSTM and GRU: taken as they are.
"""
