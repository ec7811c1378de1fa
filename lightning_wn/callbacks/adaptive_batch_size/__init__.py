"""`AdaptiveBatchSizeCallback` and its parts."""
