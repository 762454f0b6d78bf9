"""Measuring what the captions say and what the embeddings hold."""
