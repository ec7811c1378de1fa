"""Where gradient samples come from, one probe a file.

They can be driven by hand, around a training step without Lightning: ``MeasuredParameters`` are the parameters that a
probe begins with, and a ``BatchCount`` is what is said of each batch.
"""

from lightning_wn.noise_scale.batch_counting import BatchCount
from lightning_wn.noise_scale.measured_parameters import MeasuredParameters
from lightning_wn.probes.micro_batch import MicroBatchProbe
from lightning_wn.probes.per_example import PerExampleProbe
from lightning_wn.probes.sharded import ShardedProbe

__all__ = ["BatchCount", "MeasuredParameters", "MicroBatchProbe", "PerExampleProbe", "ShardedProbe"]
