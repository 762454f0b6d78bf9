"""Captions for files: the batch command line, its pipeline, and the language-model engines behind it."""
