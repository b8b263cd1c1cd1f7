"""Values and gradients of single positions, in torch alone: no models, no files."""
