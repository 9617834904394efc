"""Calibration text, and what it makes reach the layers of a model."""
