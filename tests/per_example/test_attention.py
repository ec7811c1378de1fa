"""``nn.MultiheadAttention``: every option against brute force, answered for without running it again."""

import pytest
import torch
from helpers.per_example_reference import check, mixed_loss
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_wn.per_example import PerExampleError
from lightning_wn.per_example.engine.rerun import Rerun
from lightning_wn.weight_norm import apply_weight_norm

DOUBLE = torch.float64
# older versions do not tell whether a saved tensor may be read: there the module is run again
READS_GRAPHS = hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks")
needs_graphs = pytest.mark.skipif(not READS_GRAPHS, reason="the generic rule has no folded batches or 3-D masks")
randomized = settings(derandomize=True, deadline=None, max_examples=60)


@pytest.fixture
def never_run_again(monkeypatch):
    forbid_running_again(monkeypatch)


def forbid_running_again(patch):
    if not READS_GRAPHS:
        return

    def fail(rerun):
        raise AssertionError("a module was run again")

    patch.setattr(Rerun, "gradients", fail)


class Attend(nn.Module):
    """Attention over a batch-first input, in several ways of calling it."""

    def __init__(self, call, attention, options=None, memory_features=(4, 4)):
        super().__init__()
        self.call = call
        self.attention = attention
        self.options = options or {}
        self.memory_features = memory_features

    def forward(self, x, memory):
        y = x * 1.0  # as in the middle of a network
        keys, values = (memory[..., :n] * 1.0 for n in self.memory_features)
        inputs = {
            "self": (y, y, y),
            "self_no_history": (x, x, x),
            "encoder_decoder": (y, keys, keys),
            "three": (y, keys, values),
            "equal_but_three": (y, y * 1.0, y * 2.0),
        }[self.call]
        if not self.attention.batch_first:
            # the layer tells self-attention by `is`
            turned = {id(t): t.transpose(0, 1) for t in inputs}
            inputs = tuple(turned[id(t)] for t in inputs)
        output, weights = self.attention(*inputs, **self.options)
        output = output if self.attention.batch_first else output.transpose(0, 1)
        return output, weights


@needs_graphs
@randomized
@given(
    batch=st.integers(1, 4),
    lengths=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    heads=st.sampled_from([1, 2]),
    bias=st.booleans(),
    batch_first=st.booleans(),
    dropout=st.sampled_from([0.0, 0.5]),
    call=st.sampled_from(["self", "self_no_history", "encoder_decoder", "three", "equal_but_three"]),
    features=st.sampled_from([(4, 4), (3, 4), (4, 5), (3, 5)]),
    zero=st.booleans(),
    weights=st.sampled_from(["not needed", "needed", "in the loss", "by head", "alone in the loss"]),
    mask=st.sampled_from(["none", "bool", "float", "by example", "padding"]),
    dtype=st.sampled_from([torch.float32, DOUBLE]),
)
def test_every_option(batch, lengths, heads, bias, batch_first, dropout, call, features, zero, weights, mask, dtype):
    torch.manual_seed(0)
    target, source = lengths
    if call in ("self", "self_no_history", "equal_but_three"):
        source, features = target, (4, 4)
    if call == "encoder_decoder":
        features = (features[0], features[0])
    attention = nn.MultiheadAttention(
        4, heads, dropout=dropout, bias=bias, add_zero_attn=zero, kdim=features[0], vdim=features[1],
        batch_first=batch_first, dtype=dtype,
    )  # fmt: skip
    with torch.no_grad():
        for p in attention.parameters():
            p.normal_()
    options = {"need_weights": weights != "not needed", "average_attn_weights": weights != "by head"}
    if mask == "bool":
        options["attn_mask"] = torch.ones(target, source, dtype=torch.bool).triu(1)
    elif mask == "float":
        options["attn_mask"] = torch.randn(target, source, dtype=dtype)
    elif mask == "by example":
        options["attn_mask"] = torch.randn(batch * heads, target, source, dtype=dtype)
    elif mask == "padding":
        options["key_padding_mask"] = torch.arange(source) >= torch.randint(1, source + 1, (batch, 1))
    model = Attend(call, attention, options, features)
    x = torch.randn(batch, target, 4, dtype=dtype)
    memory = torch.randn(batch, source, 6, dtype=dtype)

    def run():
        output, found = model(x, memory)
        loss = mixed_loss(output) if weights != "alone in the loss" else 0.0
        return loss + mixed_loss(found) if weights in ("in the loss", "by head", "alone in the loss") else loss

    with pytest.MonkeyPatch.context() as patch:
        forbid_running_again(patch)
        check(model, run, batch)


@pytest.mark.parametrize(
    "measured",
    [["in_proj_weight"], ["in_proj_bias"], ["out_proj.weight"], ["out_proj.bias"], ["in_proj_bias", "out_proj.weight"]],
)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.usefixtures("never_run_again")
def test_some_of_the_parameters(measured, frozen, batch_first):
    torch.manual_seed(0)
    model = Attend("self", nn.MultiheadAttention(4, 2, batch_first=batch_first, dtype=DOUBLE))
    x = torch.randn(3, 5, 4, dtype=DOUBLE)
    named = dict(model.attention.named_parameters())
    for name, p in named.items():
        p.requires_grad_(not frozen or name in measured)
    check(model, lambda: mixed_loss(model(x, x)[0]), 3, parameters=[named[name] for name in measured])


@pytest.mark.usefixtures("never_run_again")
@pytest.mark.parametrize("calls", [("self", "self"), ("self", "encoder_decoder"), ("three", "encoder_decoder")])
def test_one_module_called_twice(calls):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(4, 2, batch_first=True, dtype=DOUBLE)
    first, second = (Attend(call, attention) for call in calls)
    x, memory = torch.randn(3, 5, 4, dtype=DOUBLE), torch.randn(3, 2, 4, dtype=DOUBLE)
    model = nn.ModuleList([first, second])

    def run():
        return mixed_loss(second(first(x, memory)[0], memory)[0])

    check(model, run, 3)


@pytest.mark.usefixtures("never_run_again")
@pytest.mark.parametrize("call", ["encoder_decoder", "three"])
def test_values_that_the_loss_does_not_use(call):
    torch.manual_seed(0)
    model = Attend(call, nn.MultiheadAttention(4, 2, batch_first=True, dtype=DOUBLE))
    x, memory = torch.randn(3, 5, 4, dtype=DOUBLE), torch.randn(3, 2, 4, dtype=DOUBLE)
    check(model, lambda: mixed_loss(model(x, memory)[1]), 3)


@pytest.mark.usefixtures("never_run_again")
def test_two_modules_that_share_a_projection():
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.TransformerEncoderLayer(4, 2, 8, 0.3, batch_first=True, dtype=DOUBLE) for _ in "ab"])
    model[1].self_attn.in_proj_weight = model[0].self_attn.in_proj_weight
    x = torch.randn(3, 5, 4, dtype=DOUBLE)
    check(model, lambda: mixed_loss(model(x)), 3)


@needs_graphs
@pytest.mark.usefixtures("never_run_again")
def test_examples_of_several_parts():
    torch.manual_seed(0)
    model = nn.MultiheadAttention(4, 2, batch_first=True, dtype=DOUBLE)
    x = torch.randn(3, 2, 5, 4, dtype=DOUBLE)

    def run():
        windows = x.flatten(0, 1)
        return mixed_loss(model(windows, windows, windows)[0].unflatten(0, (3, 2)))

    check(model, run, 3, batch_dims={"": "folded"})


@pytest.mark.usefixtures("never_run_again")
def test_autocast():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
    x = torch.randn(4, 6, 16)

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            return mixed_loss(model(x).float())

    # bfloat16 rounds the gradient that arrives at each layer to 3 digits, and brute force rounds anew
    check(model, run, 4, tolerance=3e-2)


# what the graph does not show in the usual way is run again, and as exact
@pytest.mark.parametrize("kind", ["bias_kv", "checkpointed", "subclass", "weight_normalized", "offloaded"])
def test_what_is_run_again(kind):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(4, 2, batch_first=True, add_bias_kv=kind == "bias_kv", dtype=DOUBLE)
    if kind == "subclass":
        attention.__class__ = Doubled
    if kind == "weight_normalized":
        apply_weight_norm(attention, modules=[type(attention.out_proj)])
    model = Attend("self", attention)
    x = torch.randn(3, 5, 4, dtype=DOUBLE)

    def run():
        if kind == "checkpointed":
            return mixed_loss(checkpoint(model, x, x, use_reentrant=False)[0])
        if kind == "offloaded":
            with torch.autograd.graph.save_on_cpu():
                return mixed_loss(model(x, x)[0])
        return mixed_loss(model(x, x)[0])

    check(model, run, 3)


class Doubled(nn.MultiheadAttention):
    def forward(self, query, key, value, **options):
        output, weights = super().forward(query, key, value, **options)
        return output * self.in_proj_weight.sum(), weights


def test_a_second_backward_pass_is_refused():
    model = Attend("self", nn.MultiheadAttention(4, 2, batch_first=True, dtype=DOUBLE))
    x = torch.randn(3, 5, 4, dtype=DOUBLE)

    def run():
        losses = mixed_loss(model(x, x)[0])
        losses.mean().backward(retain_graph=True)
        return losses

    with pytest.raises(PerExampleError, match=r"reached 'attention' \(MultiheadAttention\) twice"):
        check(model, run, 3)
