"""From a noise scale to a batch size: the trade-off, advice in words, and figures."""
