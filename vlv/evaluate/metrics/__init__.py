"""Distances between images, statistics, and the official VQA accuracy."""
