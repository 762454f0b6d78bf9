"""Captions from another model as stage-2 data."""
