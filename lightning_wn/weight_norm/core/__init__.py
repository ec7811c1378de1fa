"""w = g · v/‖v‖ in a module: the mathematics, the layers that have it, and what computes their weights."""
