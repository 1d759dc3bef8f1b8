"""Supporting modules with one job each. You can change the model and its training without reading them."""
