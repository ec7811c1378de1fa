"""Trainers of lightning.pytorch pass, those of pytorch_lightning are refused."""

import lightning.pytorch as pl
import pytest

from lightning_wn.trainer import require_lightning_trainer


class Mine(pl.Trainer):
    pass


@pytest.mark.parametrize("kind", [pl.Trainer, Mine])
def test_lightnings_own_trainers_pass(kind):
    require_lightning_trainer(kind(barebones=True, accelerator="cpu"), "MyCallback")


def test_a_subclass_of_the_other_packages_trainer_is_refused():
    other = type("Trainer", (), {"__module__": "pytorch_lightning.trainer.trainer"})
    with pytest.raises(TypeError, match=r"MyCallback is a `lightning\.pytorch` callback") as error:
        require_lightning_trainer(type("Mine", (other,), {})(), "MyCallback")
    assert "instead of `import pytorch_lightning as pl`" in str(error.value)
