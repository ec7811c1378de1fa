"""The gradient noise scale: mathematics, metric, probes, and the callback that joins them."""
