"""Language-model engines that continue prompt embeddings: vLLM, transformers, llama.cpp, a remote server."""
