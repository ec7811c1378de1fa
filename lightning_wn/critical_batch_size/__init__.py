"""The critical batch size measured directly: branches of training at several batch sizes."""
