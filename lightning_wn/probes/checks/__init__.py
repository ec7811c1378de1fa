"""Whether what a probe took for independent gradient samples is that."""
