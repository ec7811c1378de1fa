"""Train a small CNN on handwritten digits, with weight normalization, and measure its gradient noise scale.

Run it from anywhere; everything it writes goes into ``runs/quickstart/`` of the current directory::

    python examples/quickstart.py
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import lightning.pytorch as pl
import matplotlib as mpl
import torch
from digits import Digits, DigitsCNN
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_wn import GradientNoiseScaleCallback, WeightNormCallback
from lightning_wn.reports import plot_noise_scale, read_csv_history

# the images lie in memory: worker processes would only cost time
warnings.filterwarnings("ignore", message=".*does not have many workers.*")
# Lightning 2.6 calls a function that newer versions of torch deprecate
warnings.filterwarnings("ignore", message=".*LeafSpec.*")
# the tensors are tiny: a second thread would only wait for the first
torch.set_num_threads(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max-epochs", type=int, default=8)
    train(Path("runs/quickstart"), parser.parse_args().max_epochs, accumulate_grad_batches=4)


def train(
    folder: Path, max_epochs: int, accumulate_grad_batches: int, devices: int = 1, strategy: str = "auto"
) -> None:
    """Train on the CPU, which is plenty for so small a network, and report."""
    pl.seed_everything(0)
    # every step is measured here, for a short run; the default, one in 10, costs about nothing
    noise_scale = GradientNoiseScaleCallback(every_n_steps=1)
    csv_logger = CSVLogger(folder, name="csv")
    trainer = pl.Trainer(
        max_epochs=max_epochs,
        accumulate_grad_batches=accumulate_grad_batches,
        callbacks=[WeightNormCallback(), noise_scale],
        logger=[TensorBoardLogger(folder, name="tensorboard"), csv_logger],
        log_every_n_steps=5,
        default_root_dir=folder,
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
    )
    trainer.fit(DigitsCNN(), Digits(batch_size=8))
    if trainer.is_global_zero:
        report(trainer, noise_scale, folder, Path(csv_logger.log_dir))


def report(trainer: pl.Trainer, noise_scale: GradientNoiseScaleCallback, folder: Path, csv_folder: Path) -> None:
    """Print what was measured and save the picture."""
    mpl.use("Agg")  # works without a display
    picture = folder / "noise_scale.png"
    advice = noise_scale.advise()
    plot_noise_scale(read_csv_history(csv_folder), advice).savefig(picture, dpi=120)
    print("\nIn plain words, from print(noise_scale.advise()):\n")
    print(advice)
    print()
    print(f"Validation accuracy: {float(trainer.callback_metrics['val/accuracy']):.1%}")
    print(f"Picture:             {picture}")
    print(f"TensorBoard logs:    {folder / 'tensorboard'}")
    print(f"To open them:        tensorboard --logdir {folder / 'tensorboard'}")


if __name__ == "__main__":
    main()
