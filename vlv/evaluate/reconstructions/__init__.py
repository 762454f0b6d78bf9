"""Reconstructions of a set of images, and their distances to the originals."""
