"""Passes that only Core ML needs: forms that the Apple Neural Engine runs well.

Where a transformer goes, in this order:

* `avoid-fallbacks`: forms that placement leaves to the CPU, where others mean the same.
* `fuse-attention`: one operator for attention, where a system that has it is asked for.
* `convert-linear-to-conv`: linear layers and what lies between them in the engine's layout, ``[B, C, 1, S]``.
* `split-attention-heads`: attention of that layout, head by head.

And wherever a model is quantized: `dequantize-tables`, for tables that lookups pick rows of to stay integers.

What coremltools 9.0 makes of their result by itself: ``layer_norm`` over channels, ``gelu`` of Erf, ``silu`` of a
product with Sigmoid, and ``batch_norm`` of a product and sum with constants by channel.
"""
