"""Probes: where gradient samples come from, one file a probe."""
