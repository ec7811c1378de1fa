"""Exact squared gradient norms of single examples, from the backward pass that trains the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_wn.noise_scale.measured_parameters import MeasuredParameters
from lightning_wn.noise_scale.preconditioning import Denominator
from lightning_wn.per_example.engine.attention import AttentionCall, batch_length, find_projections
from lightning_wn.per_example.engine.call import Call, Context, OutputGradient, is_private, start_of
from lightning_wn.per_example.engine.forward_hooks import ForwardHooks
from lightning_wn.per_example.engine.gradient_blocks import Elements, GradientBlocks
from lightning_wn.per_example.engine.layers import BatchDim, Layer, Slot, find_layers
from lightning_wn.per_example.engine.layout import Layout, arrivals_of, dims_taken, signature_of
from lightning_wn.per_example.engine.rerun import Rerun
from lightning_wn.per_example.engine.shared_parameters import SharedParameters
from lightning_wn.per_example.engine.verification import Verification
from lightning_wn.per_example.engine.weight_terms import WeightTerms
from lightning_wn.per_example.rules.errors import PerExampleError, reached_twice, require_separate_examples
from lightning_wn.per_example.rules.gradients import Common, Dense, Form
from lightning_wn.summing import summing_dtype


class PerExampleNorms:
    """Measures |∂L/∂θ by example i|² while the ordinary backward pass runs.

    L is the loss that is back-propagated. Where that is the mean over B examples, the gradient of example i's
    own loss is B times larger, and its squared norm B² times: no such factor is applied here.

    Layers with a rule are answered for as soon as autograd reaches them, from their input, which autograd
    keeps anyway, and their output's gradient. A parameter with several uses waits for all of them: gradients
    add up, norms do not. A module with parameters and no rule is run again example by example, unless its
    parameters only enter by being expanded or added to the batch (class token, position embedding).

    Training sees the same bits: hooks only read. What cannot be measured exactly raises
    :class:`PerExampleError` in ``after_backward`` (or at once where it shows in the model), never in the
    middle of the user's forward or backward pass. The first measured step, and every step in which modules
    are used in a new way, is verified: what was seen must add up to the gradient that each parameter got.

    Args:
        model: The model, in the mode in which it is trained.
        parameters: The parameters to measure; frozen ones are skipped.
        batch_dims: For modules, by name or glob, whose tensors do not have the batch in their first dimension:
            the dimension that has it, or ``"folded"`` where the first dimension is B·k with the k parts of an
            example one after the other. That cannot be told from shapes.
        groups: Sets of parameters whose squared norms are wanted apart too. They may overlap; what is not
            among ``parameters`` does not count.
        denominator: Asks for the preconditioned squared norm too: it tells what to divide each element of a
            parameter's gradient by, for Adam √v̂ + ε, of the parameter's shape, at the moment it is called
            (during the backward pass). Where it returns None for a parameter that has a gradient, the
            preconditioned norm is NaN. It costs the materialised gradient of every example, a few at a time.

    Attributes:
        coverage: The share of the model's trainable elements that are measured.
        dims: In a step that is verified, the dimension in which each layer's examples were taken to be, None where all
            share what it gives; None in other steps.
        blocks: Compares some elements of Σ_i ∂L/∂θ by example i with those of ``Parameter.grad``.
        elements: After ``after_backward``, the elements of Σ_i ∂L/∂θ by example i.
        low_precision: Whether a layer computed in 16 bits in the last step, so that its gradients are rounded.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> norms = PerExampleNorms(layer, list(layer.parameters()))
        >>> norms.attach()
        >>> norms.before_forward(2)
        >>> loss = layer(torch.tensor([[1.0, 2.0], [3.0, 4.0]])).sum()
        >>> norms.before_backward(loss)
        >>> loss.backward()
        >>> norms.after_backward()  # (B,)
        tensor([ 5., 25.])
        >>> norms.detach()
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Sequence[nn.Parameter],
        *,
        batch_dims: Mapping[str, BatchDim] | None = None,
        groups: Sequence[Sequence[nn.Parameter]] = (),
        denominator: Denominator | None = None,
    ) -> None:
        self._model = model
        self._measured = MeasuredParameters(parameters, groups=groups, denominator=denominator)
        self._places = {id(p): place for place, p in enumerate(parameters)}
        self._layers = find_layers(model, parameters, batch_dims or {})
        measured = {id(p): p for layer in self._layers for p in layer.parameters.values()}
        self._parameters = list(measured.values())
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.coverage = sum(p.numel() for p in self._parameters) / max(trainable, 1)
        self._slots = list({id(slot): slot for layer in self._layers for slot in layer.slots.values()}.values())
        self.dims: dict[str, BatchDim | None] | None = None
        self._hooks = ForwardHooks(self._layers, self._note_start, self._note_call)
        self._verified: dict[Layout, set[Layout]] = {}
        self.blocks = GradientBlocks(parameters, self._slots)
        self.elements: Elements | None = None
        self.low_precision = False
        self._batch_size = 0
        self._start_afresh()

    def _start_afresh(self) -> None:
        self._hooks.take_off()
        self._verification: Verification | None = None
        self._shared = SharedParameters()
        self._calls: list[Call] = []
        self._attentions: list[AttentionCall] = []
        self._starts: dict[str, list[tuple[list[int], Context]]] = {}
        self._errors: list[PerExampleError] = []
        self._sq_norms: list[tuple[int, Tensor]] = []
        self._found: list[tuple[int, Tensor]] = []
        self._preconditioned: list[Tensor] = []
        self._common: dict[int, Common] = {}
        self._signature: Layout = ()
        for slot in self._slots:
            slot.forget()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that are measured."""
        return list(self._parameters)

    def attach(self) -> None:
        """Look at the model; hooks are on it only from ``before_forward`` to ``after_backward``.

        Raises:
            PerExampleError: If the model mixes examples or is compiled.
        """
        require_separate_examples(self._model)

    def detach(self) -> None:
        """Take all hooks off and forget the step."""
        self._forget()

    def before_forward(self, batch_size: int) -> None:
        """Record from here on.

        Args:
            batch_size: B, the length of the dimension that is the batch.
        """
        require_separate_examples(self._model)
        self._forget()
        self._batch_size = batch_size
        self.low_precision = False
        self._verification = Verification(self._model, self._parameters)
        self._hooks.put_on()

    def before_backward(self, loss: Tensor, shares: Tensor | None = None) -> None:
        """Look at the graph of the loss for tensors that all examples share until they meet the batch.

        Args:
            loss: What is about to be back-propagated.
            shares: Each example's share of the loss and of its weight-only terms, shape (B,); equal by default.
        """
        self._try(self._look_at_graph, loss, shares)
        terms = [index for index, p in enumerate(self._parameters) if id(p) in self._common]
        shared = [index for index, p in enumerate(self._parameters) if id(p) in self._shared.gradients]
        self._signature = signature_of(self._calls, self._attentions, self._batch_size, terms, shared)
        if self._signature in self._verified and self._verification is not None:
            self._verification.stop()
            self._verification = None
        self.dims = None if self._verification is None else dims_taken(self._calls, self._shared.gradients)

    def _look_at_graph(self, loss: Tensor, shares: Tensor | None) -> None:
        terms = WeightTerms(loss, {id(p) for p in self._model.parameters()})
        self._shared.watch(loss, self._batch_size, self._calls, self._layers, terms.nodes)
        for call in self._calls:
            call.leave_to_children()
        self._common = terms.in_common(self._layers, self._batch_size, shares)
        if self._verification is not None:
            self._verification.add_common(self._common)

    def after_backward(self) -> Tensor:
        """Return Σ over the measured parameters of |∂L/∂θ by example i|², shape (B,).

        In float32 at least, on the parameters' device, without waiting for it (verified steps do wait).

        Returns:
            Shape (B,), or with groups or a denominator (B, columns): the total, each group's, and last the
            preconditioned one, Σ |∂L/∂θ by example i / denominator(θ)|².

        Raises:
            PerExampleError: If the norms of this step would not be exact.
        """
        self._hooks.take_off()
        self.elements = None
        try:
            self._try(self._finish)
            if self._errors:
                raise self._errors[0]
            self._conclude_verification()
            return self._sums()
        finally:
            self._forget()

    def _conclude_verification(self) -> None:
        """Judge what was verified; verify again where other outputs got a gradient than in the verified steps."""
        arrivals = arrivals_of(self._calls)
        if self._verification is None:
            if arrivals not in self._verified[self._signature]:
                del self._verified[self._signature]
        elif self._verification.check():
            self._verified.setdefault(self._signature, set()).add(arrivals)

    def _forget(self) -> None:
        """Take the step's hooks off and forget what they saw."""
        for call in self._calls:
            for output in call.outputs:
                output.remove()
        for attention in self._attentions:
            attention.remove()
        if self._verification is not None:
            self._verification.stop()
        self._shared.remove()
        self._start_afresh()

    def _try(self, function: Any, *args: Any) -> None:
        """Keep an error for ``after_backward``: a measurement must not stop a backward pass half way."""
        try:
            function(*args)
        except PerExampleError as error:
            self._errors.append(error)

    def _note_start(self, layer: Layer, args: Any, kwargs: Any) -> None:
        self._starts.setdefault(layer.name, []).append(start_of(layer, args, kwargs))

    def _note_call(self, layer: Layer, args: Any, kwargs: Any, output: Any) -> None:
        context: Context | None = None
        versions: list[int] | None = None
        if layer.rule is None:
            # calls nest: the last start of this layer is the one that ends here
            if not self._starts.get(layer.name):
                return
            versions, context = self._starts[layer.name].pop()
        outputs = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
        if not any(o.requires_grad for o in outputs):
            return
        self.low_precision |= any(o.dtype.itemsize < 4 for o in outputs)
        layer.count_call(in_backward=torch._C._current_graph_task_id() != -1)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if layer.rule is None and self._follow_attention(layer, leaves, outputs):
            return
        input_has_history = any(isinstance(leaf, Tensor) and leaf.grad_fn is not None for leaf in leaves)
        leaves = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        if versions is None:
            versions = [leaf._version for leaf in leaves if isinstance(leaf, Tensor)]
        call = Call(layer, leaves, spec, versions, [], context, input_has_history)
        # the generic rule needs the gradients of all outputs and waits for the end
        arrived = None if layer.rule is None else lambda: self._try(self._answer, call)
        private = layer.rule is not None and len(outputs) == 1 and is_private(outputs[0], call.tensors)
        call.outputs = [OutputGradient(o, private=private, arrived=arrived) for o in outputs]
        self._calls.append(call)

    def _follow_attention(self, layer: Layer, leaves: Sequence[Any], outputs: Sequence[Tensor]) -> bool:
        """Wait inside the graph of an attention layer; False if it has to be run again."""
        length, projections = batch_length(layer.module, outputs), None
        fold, rest = divmod(length or 0, self._batch_size)
        if length is not None and not rest and (fold == 1 or layer.batch_dim == "folded"):
            inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            projections = find_projections(layer.module, layer.parameters, inputs, outputs)
        if length is None or projections is None:
            return False

        def take(name: str, form: Form) -> None:
            if self._verification is not None:
                self._verification.add_form(layer.parameters[name], form)
            self._take(layer.slots[name], form, layer)

        attention = AttentionCall(layer.label, layer.parameters, length, fold, take)
        attention.follow(projections, self._try)
        self._attentions.append(attention)
        return True

    def _answer(self, call: Call) -> None:
        """Apply the layer's rule; called by autograd when the gradient of the output is known."""
        layer = call.layer
        if sum(output.arrivals for output in call.outputs) > 1:
            raise reached_twice(layer.label)
        assert layer.rule is not None
        grad = call.arrived_gradient()
        with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
            seen, fold = call.seen(grad, self._batch_size)
            self._take_forms(layer, dict(layer.rule(layer.module, seen)), fold)
        if self._verification is not None:
            total = grad if call.shared is None else grad.sum(0)
            self._verification.add_call(layer.module, layer.parameters, call.leaves, call.spec, total)
        call.leaves = [None]  # autograd may free the input now

    def _take_forms(self, layer: Layer, forms: dict[str, Form | Tensor], fold: int) -> None:
        missing = set(layer.slots) - set(forms)
        if missing:
            raise PerExampleError(f"the rule for {layer.label} gave no gradient of {', '.join(sorted(missing))}")
        for name, slot in layer.slots.items():
            form = forms[name]
            form = Dense(form) if isinstance(form, Tensor) else form
            self._take(slot, form.merge(fold) if fold > 1 else form, layer)

    def _take(self, slot: Slot, form: Form, layer: Layer) -> None:
        """Square the gradient of one use, or keep it until the parameter's other uses are known."""
        if slot.squared:
            raise PerExampleError(
                f"{layer.label} was used again after its gradient had been taken, as reentrant checkpointing of a "
                "reused layer does: use checkpoint(..., use_reentrant=False)"
            )
        if slot.expected <= 1:
            self._square(slot, [form])
            return
        slot.uses.append(form.compact(slot.shape))
        if len(slot.uses) == slot.expected:
            self._square(slot, slot.uses)

    def _square(self, slot: Slot, forms: Sequence[Form]) -> None:
        slot.squared = True
        forms = [*forms, *(self._common[id(p)] for p in slot.measured if id(p) in self._common)]
        sq_norms, along = slot.squared_norms(forms)
        self._sq_norms += [(self._places[id(p)], own) for p, own in sq_norms]
        self._found += self.blocks.of_slot(slot, forms, along)
        if self._measured.denominator is not None:
            self._preconditioned.append(slot.preconditioned(forms, self._measured.denominator))
        slot.uses = []

    def _sums(self) -> Tensor:
        """Add up what was squared; see :meth:`after_backward`."""
        measured = self._measured
        device = measured.device if self._parameters else torch.device("cpu")
        places = [place for place, _ in self._sq_norms]
        sq_norms = _stacked([sq_norms for _, sq_norms in self._sq_norms], self._batch_size, device)
        total = sq_norms.sum(0)
        self.elements = self.blocks.join(self._found, dict(zip(places, sq_norms.sum(1), strict=True)), device)
        if measured.single_column:
            return total
        wide = summing_dtype(device)
        preconditioned = _stacked(self._preconditioned, self._batch_size, device)
        columns = measured.add_up(places, sq_norms.to(wide), preconditioned.to(wide))
        return torch.cat((total.unsqueeze(0), columns[1:].to(total.dtype))).T

    def _finish(self) -> None:
        with torch.no_grad():
            self._take_shared_parameters()
            for attention in self._attentions:
                attention.finish()
            for call in self._calls:
                call.require_seen()
                if call.layer.rule is None:
                    self._run_again(call)
            # some uses of a parameter may have no gradient: an output that the loss does not depend on
            for slot in self._slots:
                if slot.uses or (not slot.squared and any(id(p) in self._common for p in slot.measured)):
                    self._square(slot, slot.uses)

    def _take_shared_parameters(self) -> None:
        for layer in self._layers:
            for name, parameter in layer.parameters.items():
                shared = self._shared.gradients.get(id(parameter))
                slot = layer.slots.get(name)
                if shared is None or not shared.forms or slot is None or slot.squared:
                    continue
                if self._verification is not None:
                    for form in shared.forms:
                        self._verification.add_form(parameter, form)
                self._square(slot, shared.forms)

    def _run_again(self, call: Call) -> None:
        """Apply the generic rule."""
        layer = call.layer
        answered = call.without | set(self._shared.gradients)
        parameters = {name: p for name, p in layer.parameters.items() if id(p) not in answered}
        if not parameters or not any(output.arrivals for output in call.outputs):
            return
        for name, grad in Rerun(call, parameters, self._batch_size).gradients().items():
            form = Dense(grad.to_dense().to(torch.promote_types(grad.dtype, torch.float32)))
            if self._verification is not None:
                self._verification.add_form(parameters[name], form)
            self._take(layer.slots[name], form, layer)


def _stacked(terms: Sequence[Tensor], batch_size: int, device: torch.device) -> Tensor:
    """Stack one row a term; parts of a model may lie on several devices."""
    rows = [term.to(device) for term in terms]
    return torch.stack(rows) if rows else torch.zeros(0, batch_size, device=device)
