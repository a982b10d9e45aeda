"""Integer arithmetic, and the ranges that calibration data gives it."""
