"""Checkpoint folders, published weights, tensor files, random weights."""
