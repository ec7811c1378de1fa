"""One rule per layer type: its gradient, example by example, from its input and its output's gradient."""
