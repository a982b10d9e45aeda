"""How close a compiled model is to the original: fidelity, metrics, intervals."""
