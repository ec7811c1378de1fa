"""Hooks on the modules of a model, for as long as a forward pass is recorded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_wn.per_example.engine.layers import Layer

NoteStart = Callable[[Layer, Any, Any], None]
NoteCall = Callable[[Layer, Any, Any, Any], None]


class ForwardHooks:
    """Puts hooks on and takes them off, so that copies and files of the model that are made meanwhile have none.

    Args:
        layers: What to listen to.
        note_start: Called with a layer without a rule, its arguments and keyword arguments, before its forward.
        note_call: Called with a layer, its arguments, keyword arguments and output, after its forward.
    """

    def __init__(self, layers: Sequence[Layer], note_start: NoteStart, note_call: NoteCall) -> None:
        self._layers = layers
        self._note_start = note_start
        self._note_call = note_call
        self._handles: list[RemovableHandle] = []

    def put_on(self) -> None:
        """Listen from here on."""
        if self._handles:
            return
        for layer in self._layers:
            # first in line: the gradient by the layer's own output, before hooks of others change the output
            def after(_: nn.Module, args: Any, kwargs: Any, output: Any, layer: Layer = layer) -> None:
                self._note_call(layer, args, kwargs, output)

            self._handles.append(layer.module.register_forward_hook(after, with_kwargs=True, prepend=True))
            if layer.rule is None:

                def before(_: nn.Module, args: Any, kwargs: Any, layer: Layer = layer) -> None:
                    self._note_start(layer, args, kwargs)

                self._handles.append(layer.module.register_forward_pre_hook(before, with_kwargs=True))

    def take_off(self) -> None:
        """Listen no more."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
