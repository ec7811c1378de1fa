"""Whether the examples of a batch mix, so that a row's share of the gradient is no example's gradient."""
