"""Kernels compiled ahead of time: build, load, and the launches that are built."""
