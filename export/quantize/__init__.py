"""Precisions of a graph: float16 and mixed, INT8, FP8, and how their ranges are calibrated."""
