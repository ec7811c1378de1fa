"""`WeightNormCallback` and its parts."""
