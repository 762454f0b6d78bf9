"""Small trained readers of embeddings."""
