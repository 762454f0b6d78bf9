"""Language-model engines that continue prompt embeddings: vLLM, transformers, a remote server."""
