"""What embeddings and captions hold of synthetic scenes, whose content is known exactly."""
