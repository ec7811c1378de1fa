"""The Lightning callbacks: each is thin over parts that know no Trainer."""
