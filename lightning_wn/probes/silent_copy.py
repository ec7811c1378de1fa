"""A copy of a LightningModule that computes the gradient of one more batch, without a trace in training."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from types import FunctionType, ModuleType
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from lightning_wn.probes.base import CannotMeasureError
from lightning_wn.trainer import copy_without_trainer, loss_scale, training_step_output

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PACKAGE = __name__.partition(".")[0]
_DEPTH = 6
"""How deep attributes are searched for what cannot be copied."""
_APART = (type, ModuleType, FunctionType, nn.Module, Trainer)
_SHARED = (Dataset, DataLoader, LightningDataModule)


class SilentCopy:
    """A model as it is now, to run ``training_step`` on later.

    The copy has weights, buffers and metrics of its own. What it logs goes nowhere, its optimizers and schedulers do
    not step, and random numbers are drawn from where training stands without being taken from it. What it reads of
    its Trainer is there, with the present step and epoch. Hooks of the user's on modules belong to the copy, too;
    those of this package do not.

    Args:
        trainer: Trains the model.
        model: The model.

    Raises:
        CannotMeasureError: If it cannot be copied.
    """

    def __init__(self, trainer: Trainer, model: LightningModule) -> None:
        memo: dict[int, Any] = {id(trainer): trainer}
        recorders = [_Recorder(optimizer) for optimizer in trainer.optimizers]
        memo |= {id(recorder.real): recorder for recorder in recorders}
        memo |= {
            id(wrapped): recorder
            for wrapped, recorder in zip(trainer.strategy._lightning_optimizers, recorders, strict=False)
        }
        schedulers = [_Still(config.scheduler, step=_nothing) for config in trainer.lr_scheduler_configs]
        memo |= {id(vars(one)["_real"]): one for one in schedulers}
        seen: set[int] = set()
        for module in model.modules():
            memo |= {id(hook): _nothing for hook in _own_hooks(module) if not isinstance(hook, FunctionType)}
            _prepare(vars(module), memo, seen)
        try:
            copied = copy_without_trainer(model, memo)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise CannotMeasureError(
                f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error})".replace("\n", " ")
            ) from error
        # parameters that only an optimizer knows have no copy
        known = [*model.parameters(), *(p for recorder in recorders for p in recorder.parameters)]
        self._copies = {id(p): (p, memo[id(p)]) for p in known if id(p) in memo}
        for recorder in recorders:
            recorder.follow(copied, self._copies)
        self._originals = {id(p) for p in known}
        self._trainer = trainer
        step, epoch = trainer.global_step, trainer.current_epoch
        silence(copied, trainer, optimizers=recorders, global_step=step, current_epoch=epoch)
        for module in copied.modules():
            _remove_own_hooks(module)
        of_optimizers = recorders[0] if len(recorders) == 1 else recorders
        of_schedulers = (schedulers[0] if len(schedulers) == 1 else schedulers) or None
        vars(copied).update(
            optimizers=lambda use_pl_optimizer=True: of_optimizers,
            lr_schedulers=lambda: of_schedulers,
            manual_backward=self._backward,
        )
        self._model = copied
        self._recorders = recorders
        known_ids = {id(tensor) for tensor in (*known, *model.buffers())}
        # what a user's `__deepcopy__` shares stays
        self._own = [t for t in (*copied.parameters(), *copied.buffers()) if id(t) not in known_ids]

    def free(self) -> None:
        """Give the memory back; cycles of references would keep it until Python collects them."""
        for tensor in self._own:
            tensor.grad = None
            tensor.data = tensor.data.new_empty(0)

    def gradients(
        self, parameters: Sequence[nn.Parameter], batch: Any, batch_idx: int, optimizer: Optimizer | None, step: int
    ) -> tuple[list[Tensor | None], Tensor | None] | None:
        """Return the gradient of a batch at the copied weights.

        Args:
            parameters: The original's, whose gradients are wanted.
            batch: As ``training_step`` gets it; it is copied.
            batch_idx: Passed to ``training_step``.
            optimizer: In manual optimization, whose gradients are wanted.
            step: At which of its steps on the batch, from 1.

        Returns:
            The gradients, None for parameters that the loss does not reach, and a loss scaler's factor that they
            have; or None if ``training_step`` skips the batch, or does not let the optimizer step.

        Raises:
            CannotMeasureError: If the loss is not the copy's, or its ``training_step`` fails.
        """
        for original, copied in self._copies.values():
            # between two batches no optimizer is toggled
            copied.requires_grad_(original.requires_grad)
        self._model._param_requires_grad_state = {}
        copies = self.copies_of(parameters)
        with self._running():
            reached = self._run(copied_batch(batch), batch_idx, optimizer, step)
        if not reached:
            return None
        return [own.grad for own in copies], loss_scale(self._trainer, self._model.device)

    def copies_of(self, parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        """Return what stands for these parameters."""
        if any(id(p) not in self._copies for p in parameters):
            raise CannotMeasureError(
                "an optimizer moves parameters that are no part of the model, so a copy has none of them"
            )
        return [self._copies[id(p)][1] for p in parameters]

    def loss(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch at the copied weights, with its graph.

        Raises:
            CannotMeasureError: If ``training_step`` fails, or gives no loss.
        """
        with self._running(), self._trainer.precision_plugin.train_step_context():
            output = training_step_output(self._model, batch, batch_idx)
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor) or _reaches(loss, self._originals):
            raise CannotMeasureError(f"a copy of {type(self._model).__name__} gives no loss of its own")
        return loss

    def _run(self, batch: Any, batch_idx: int, optimizer: Optimizer | None, step: int) -> bool:
        """Run one batch, and return whether the gradients that are wanted are there."""
        manual = not self._model.automatic_optimization
        for recorder in self._recorders:
            recorder.steps_left = step if manual and recorder.real is optimizer else -1
        if self._model.on_train_batch_start(batch, batch_idx) == -1:
            return False
        try:
            with self._trainer.precision_plugin.train_step_context():
                output = training_step_output(self._model, batch, batch_idx)
        except _StepReachedError:
            return True
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if manual or loss is None:
            return False
        self._backward(loss)
        return True

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        """Draw random numbers that training does not miss, and say what fails in the user's code."""
        on_gpu = self._model.device.type == "cuda"
        try:
            with isolate_rng(include_cuda=on_gpu), _other_rng(self._model.device), torch.enable_grad(), _eager():
                yield
        except (CannotMeasureError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise CannotMeasureError(
                f"`training_step` fails on a copy of the model ({type(error).__name__}: {error})".replace("\n", " ")
            ) from error

    def _backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if _reaches(loss, self._originals):
            raise CannotMeasureError(
                f"the loss of a copy of {type(self._model).__name__} reaches the weights of the original, as a "
                "function that was made in `__init__` and uses `self` does"
            )
        scale = loss_scale(self._trainer, self._model.device)
        self._model.backward(loss if scale is None else loss * scale, *args, **kwargs)


def silence(model: LightningModule, trainer: Trainer, **own: Any) -> None:
    """Let a copy read what it likes of its Trainer, ``own`` in the place of the Trainer's, and log nowhere."""
    logger = None if trainer.logger is None else DummyLogger()
    still: Any = _Still(trainer, logger=logger, loggers=[] if logger is None else [logger], **own)
    model.trainer = still
    for module in model.modules():
        if isinstance(module, LightningModule):
            vars(module).update(log=_nothing, log_dict=_nothing, print=_nothing, clip_gradients=_nothing)


class _StepReachedError(BaseException):
    """The optimizer that is asked about would step now; no `except Exception` of the user's stops it."""


class _Still:
    """Looks like another object, except for what is given here; what is set on it does not reach the other."""

    def __init__(self, real: Any, **own: Any) -> None:
        vars(self).update(own, _real=real)

    @property  # type: ignore[misc]  # for `isinstance`
    def __class__(self) -> type:
        kind: type = type(vars(self)["_real"])
        return kind

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_real"], name)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Still:
        return self


class _Recorder(_Still):
    """Stands for an optimizer, holds the copy's parameters, and never moves them."""

    def __init__(self, real: Optimizer) -> None:
        super().__init__(real, optimizer=self)
        self.real = real
        self.steps_left = -1
        self.param_groups: list[dict[str, Any]] = []
        self._model: LightningModule | None = None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The original's."""
        return [p for group in self.real.param_groups for p in group["params"]]

    def follow(self, model: LightningModule, copies: Mapping[int, tuple[nn.Parameter, nn.Parameter]]) -> None:
        """Take the copies of the parameters."""
        self._model = model
        self.param_groups = [
            {**group, "params": [copies[id(p)][1] for p in group["params"] if id(p) in copies]}
            for group in self.real.param_groups
        ]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zero the copy's gradients."""
        for p in (p for group in self.param_groups for p in group["params"]):
            if set_to_none:
                p.grad = None
            elif p.grad is not None:
                p.grad.detach_().zero_()

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """Run the closure, and end the run where the gradients are those that are wanted."""
        result = closure() if closure is not None else None
        self.steps_left -= 1
        if self.steps_left == 0:
            raise _StepReachedError
        return result

    @contextlib.contextmanager
    def toggle_model(self, sync_grad: bool = True) -> Iterator[None]:
        """As LightningOptimizer has it."""
        assert self._model is not None
        with self._model.toggled_optimizer(self):  # type: ignore[arg-type]  # it looks like one
            yield


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Stands for what would leave a trace."""


def _prepare(value: Any, memo: dict[int, Any], seen: set[int], depth: int = 0) -> None:
    """Put into the memo what `deepcopy` cannot copy or had better not: results of autograd, generators, data."""
    if depth > _DEPTH or id(value) in seen or id(value) in memo:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        if not value.is_leaf:
            memo[id(value)] = value.detach().clone()
    elif isinstance(value, torch.Generator):
        generator = torch.Generator(value.device)
        generator.set_state(value.get_state())
        memo[id(value)] = generator
    elif isinstance(value, _SHARED):
        memo[id(value)] = value
    elif isinstance(value, Mapping):
        for part in value.values():
            _prepare(part, memo, seen, depth + 1)
    elif isinstance(value, list | tuple | AbstractSet | deque):
        for part in value:
            _prepare(part, memo, seen, depth + 1)
    elif not isinstance(value, _APART) and hasattr(value, "__dict__"):
        _prepare(vars(value), memo, seen, depth + 1)


def _own_hooks(module: nn.Module) -> list[Any]:
    return [hook for name in _HOOKS for hook in getattr(module, name).values() if _is_own(hook)]


def has_users_hooks(model: nn.Module) -> bool:
    """Whether hooks that are not this package's are on a module; on a copy they would be called once more."""
    return any(
        not _is_own(hook) for module in model.modules() for name in _HOOKS for hook in getattr(module, name).values()
    )


def _remove_own_hooks(module: nn.Module) -> None:
    for name in _HOOKS:
        hooks = getattr(module, name)
        for key in [key for key, hook in hooks.items() if _is_own(hook)]:
            del hooks[key]


def _is_own(hook: Any) -> bool:
    """Whether a hook is this package's."""
    function = getattr(hook, "func", hook)
    return str(getattr(function, "__module__", "")).partition(".")[0] == _PACKAGE


def copied_batch(batch: Any) -> Any:
    """Copy a batch: `training_step` may write into it."""
    memo: dict[int, Any] = {}
    _prepare(batch, memo, set())
    return copy.deepcopy(batch, memo)


def _reaches(loss: Tensor, parameters: AbstractSet[int]) -> bool:
    """Whether a backward pass would add to the gradient of one of these parameters, by identity."""
    waiting, seen = [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if id(getattr(node, "variable", None)) in parameters:
            return True
        waiting += [following for following, _ in node.next_functions]
    return False


@contextlib.contextmanager
def _other_rng(device: torch.device) -> Iterator[None]:
    """Restore the random state of an accelerator that has one of its own and is no CUDA device."""
    module: Any = getattr(torch, device.type, None)
    if device.type in ("cpu", "cuda") or not hasattr(module, "get_rng_state"):
        yield
        return
    state = module.get_rng_state()
    try:
        yield
    finally:
        module.set_rng_state(state)


@contextlib.contextmanager
def _eager() -> Iterator[None]:
    """Run what is compiled as it was written: compiling a copy anew would take longer than training's step."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
