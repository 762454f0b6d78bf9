"""Training by the paper's recipe: the toy text-to-image model, then stage 1 and stage 2."""
