"""The frozen text-to-image model, and reconstruction with it."""
