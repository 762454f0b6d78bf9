"""The frozen text-to-image model, and reconstruction through it."""
