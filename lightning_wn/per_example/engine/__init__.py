"""Follows one backward pass and gives the squared gradient norm of every example."""
