"""From a noise scale to a batch size: the trade-off, candidates, and advice in numbers and words."""

from lightning_wn.batch_size.advice import BatchSizeAdvice, advise_batch_size
from lightning_wn.batch_size.candidates import Candidate
from lightning_wn.batch_size.run import ObservedRun, RunConfiguration, RunTime
from lightning_wn.batch_size.tradeoff import Factor

__all__ = ["BatchSizeAdvice", "Candidate", "Factor", "ObservedRun", "RunConfiguration", "RunTime", "advise_batch_size"]
