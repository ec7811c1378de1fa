"""Settings for all tests."""

import torch

# small tensors: a second thread costs more than it gives, and distributed tests use both cores
torch.set_num_threads(1)
