"""Compiles models for the Hexagon NPU of Qualcomm's chips, and runs them on its emulator."""
