"""The captioning service: inputs, decode processes, encoder batches, the pipeline."""
