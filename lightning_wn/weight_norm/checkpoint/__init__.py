"""Weights in files: state dicts with plain weights, and g and v beside them for an exact resume."""
