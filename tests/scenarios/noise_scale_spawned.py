"""Trains under ddp_spawn, ddp_fork or ddp_notebook: ``python noise_scale_spawned.py FOLDER STRATEGY``."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import asdict
from pathlib import Path

import lightning as L
import torch
from helpers.frozen_digits import QUIET, DigitsMLP, digits
from torch.utils.data import DataLoader

from lightning_wn import GradientNoiseScaleCallback

if __name__ == "__main__":
    folder, strategy = sys.argv[1:]
    torch.set_num_threads(1)
    # a copy has to bring its result home too
    callback = copy.deepcopy(GradientNoiseScaleCallback(every_n_steps=1, ema_decay=1.0))
    trainer = L.Trainer(
        callbacks=[callback], strategy=strategy, devices=2, max_steps=40, accumulate_grad_batches=2, **QUIET
    )
    # spawned workers cannot receive a random generator
    trainer.fit(DigitsMLP(), DataLoader(digits(), 32, shuffle=True))
    saved = callback.state_dict()  # before anybody asked for the estimate
    outcome = asdict(callback.estimate())
    outcome["saved"] = float(saved["optimizers"][0]["moments"]["total"][-1])
    outcome["suggested"] = callback.advise().suggested_batch_size
    outcome["metric"] = float(trainer.callback_metrics["gns/noise_scale"])
    Path(folder, "parent.json").write_text(json.dumps(outcome))
