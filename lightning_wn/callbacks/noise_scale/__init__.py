"""`GradientNoiseScaleCallback` and its parts."""
