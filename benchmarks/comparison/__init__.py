"""What `benchmarks/quantization.py` is made of: the models and data, the tools, their processes, scores and tables."""
