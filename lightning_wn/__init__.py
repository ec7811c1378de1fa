"""PyTorch Lightning callbacks: the gradient noise scale while you train, and weight normalization."""
