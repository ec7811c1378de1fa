"""The gradient noise scale: mathematics, samples, metric, estimate. Knows no Trainer."""
