"""Calibration and evaluation data in every form that the command line takes."""
