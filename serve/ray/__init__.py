"""Captioning on a Ray cluster: batch stages, and replicas of the server."""
