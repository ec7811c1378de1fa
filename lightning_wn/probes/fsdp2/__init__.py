"""What the probe ``sharded`` reads of FSDP2."""
