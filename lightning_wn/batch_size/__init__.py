"""From a noise scale to a batch size: the trade-off, candidates, and advice in numbers and words."""
