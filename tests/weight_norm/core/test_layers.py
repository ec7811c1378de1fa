"""Layers with several weights, one norm per weight, and layers that are built late."""

import copy

import pytest
import torch
from helpers.per_example_reference import check, mixed_loss
from helpers.weight_norm_models import Recurrent, Regression, fit, normalized, quiet_trainer
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_sequence

from lightning_wn import WeightNormCallback
from lightning_wn.weight_norm import apply_weight_norm, fold_weight_norm
from lightning_wn.weight_norm.core.layers import rule_for
from lightning_wn.weight_norm.core.normalized_module import normalized_weights


class Gated(nn.Module):
    """Calls a cell of a recurrent layer, or attention, and returns one tensor."""

    def __init__(self, layer, *inputs):
        super().__init__()
        self.layer = layer
        self.inputs = inputs

    def forward(self, *changed):
        out = self.layer(*(changed or self.inputs))
        return torch.cat([t.flatten() for t in flat(out)])


def flat(out):
    return [out] if isinstance(out, torch.Tensor) else [t for part in out if part is not None for t in flat(part)]


def in_double(inputs):
    return tuple(in_double(x) if type(x) is tuple else x.to(torch.float64) for x in inputs)


def sequences(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


LAYERS = {
    "lstm": lambda: Gated(nn.LSTM(3, 5), sequences(4, 2, 3)),
    "deep lstm": lambda: Gated(nn.LSTM(3, 5, num_layers=2, bidirectional=True, proj_size=2), sequences(4, 2, 3)),
    "lstm without bias": lambda: Gated(nn.LSTM(3, 5, bias=False, batch_first=True), sequences(2, 4, 3)),
    "gru": lambda: Gated(nn.GRU(3, 5, num_layers=2, bidirectional=True), sequences(4, 2, 3)),
    "rnn": lambda: Gated(nn.RNN(3, 5, nonlinearity="relu"), sequences(4, 2, 3)),
    "packed lstm": lambda: Gated(nn.LSTM(3, 5), pack_sequence([sequences(4, 3), sequences(2, 3)])),
    "lstm cell": lambda: Gated(nn.LSTMCell(3, 5), sequences(2, 3), (sequences(2, 5), sequences(2, 5))),
    "gru cell": lambda: Gated(nn.GRUCell(3, 5, bias=False), sequences(2, 3), sequences(2, 5)),
    "rnn cell": lambda: Gated(nn.RNNCell(3, 5), sequences(2, 3), sequences(2, 5)),
    "attention": lambda: Gated(nn.MultiheadAttention(4, 2, batch_first=True), *[sequences(2, 3, 4)] * 3),
    "attention of three sizes": lambda: Gated(
        nn.MultiheadAttention(4, 2, kdim=3, vdim=5, add_bias_kv=True),
        sequences(3, 2, 4), sequences(6, 2, 3), sequences(6, 2, 5),
    ),
    "bilinear": lambda: Gated(nn.Bilinear(3, 4, 5), sequences(2, 3), sequences(2, 4)),
}  # fmt: skip
NUM_WEIGHTS = {
    "lstm": 2, "deep lstm": 12, "lstm without bias": 2, "gru": 8, "rnn": 2, "packed lstm": 2, "lstm cell": 2,
    "gru cell": 2, "rnn cell": 2, "attention": 2, "attention of three sizes": 4, "bilinear": 1,
}  # fmt: skip


def pairs(model):
    """Each normalized weight by its qualified name, with its g and v."""
    found = {}
    for name, module in model.named_modules():
        for tensor in normalized_weights(module):
            chain = module.parametrizations[tensor]
            found[f"{name}.{tensor}"] = chain.original0, chain.original1
    return found


def build(name, normalize=True):
    torch.manual_seed(0)
    model = LAYERS[name]()
    if normalize:
        assert apply_weight_norm(model, "layer")[0] == "layer"
    return model


def plain_twin(model, name):
    """The plain model of the same weights, computed by the formula, row by row."""
    plain = build(name, normalize=False).to(next(model.parameters()).dtype)
    state = {key: value for key, value in model.state_dict().items() if "original" not in key}
    for key, (g, v) in pairs(model).items():
        rows = [length.detach() * row / row.norm() for length, row in zip(g.flatten(), v.detach(), strict=True)]
        state[key] = torch.stack(rows)
    plain.load_state_dict(state)
    return plain


@pytest.mark.parametrize("name", LAYERS)
def test_every_weight_is_normalized_and_the_function_is_kept_bit_for_bit(name):
    plain, model = build(name, normalize=False), build(name)
    assert len(pairs(model)) == NUM_WEIGHTS[name]
    assert torch.equal(model(), plain())
    before = {key: value.clone() for key, value in plain.state_dict().items()}
    assert fold_weight_norm(model)[0] == "layer"
    assert list(model.state_dict()) == list(before)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    assert type(model.layer) is type(plain.layer)
    assert torch.equal(model(), plain())
    # and it trains as a plain layer does
    model().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_follow_the_chain_rule_from_the_plain_layers(name):
    model = build(name).double()
    model.inputs = in_double(model.inputs)
    with torch.no_grad():
        for g, _ in pairs(model).values():
            g.mul_(1.3)
    plain = plain_twin(model, name)
    weight = torch.randn(model().shape).double()
    out = model()
    torch.testing.assert_close(out, plain(*model.inputs))
    (out * weight).sum().backward()
    (plain(*model.inputs) * weight).sum().backward()
    gradients = dict(plain.named_parameters())
    for key, (g, v) in pairs(model).items():
        dw = gradients[key].grad
        for i, (row, d) in enumerate(zip(v.detach(), dw, strict=True)):
            length = row.norm()
            along = (d * row).sum() / length
            torch.testing.assert_close(g.grad.flatten()[i], along)
            torch.testing.assert_close(v.grad[i], g.flatten()[i].detach() / length * (d - along * row / length))
    for key, p in model.named_parameters():
        if "original" not in key:
            torch.testing.assert_close(p.grad, gradients[key].grad)


@pytest.mark.parametrize("name", LAYERS)
def test_training_moves_g_and_v_and_what_is_computed_with_them(name):
    model = build(name)
    with torch.no_grad():
        target = model() + 1
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    before = [p.detach().clone() for p in model.parameters()]
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (model() - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]
    moved = [key for (key, p), old in zip(model.named_parameters(), before, strict=True) if not torch.equal(p, old)]
    assert len([key for key in moved if "original" in key]) == 2 * NUM_WEIGHTS[name]
    # float32, the formula in another order
    torch.testing.assert_close(model(), plain_twin(model, name)(), rtol=1e-4, atol=1e-5)
    trained = model().detach()
    fold_weight_norm(model)
    assert torch.equal(model(), trained)


@pytest.mark.parametrize("name", LAYERS)
def test_copies_types_and_states(name):
    model = build(name)
    model().sum().backward()
    twin = copy.deepcopy(model)
    for p in twin.parameters():
        p.data.add_(0.1)
    assert not torch.equal(twin(), model())
    other = build(name)
    other.load_state_dict(twin.state_dict())
    assert torch.equal(other(), twin())
    fold_weight_norm(twin)
    assert torch.equal(other(), twin())
    assert len(pairs(other)) == NUM_WEIGHTS[name]
    wide = copy.deepcopy(other).double()
    torch.testing.assert_close(wide(*in_double(other.inputs)).float(), other(), rtol=1e-4, atol=1e-5)
    assert apply_weight_norm(other, "layer") == []


def test_a_recurrent_layer_computes_each_weight_once_a_call_and_keeps_none(computed):
    model = build("deep lstm")
    for grad in (True, False):
        computed.clear()
        with torch.set_grad_enabled(grad):
            model()
        assert len(computed) == NUM_WEIGHTS["deep lstm"]
    assert not any(
        isinstance(value, list) and torch.is_tensor(value[0]) for value in vars(model.layer).values() if value
    )


def test_a_recurrent_layer_that_fails_forgets_the_call():
    model = build("lstm")
    with pytest.raises(RuntimeError):
        model(torch.randn(4, 2, 7))
    with torch.no_grad():
        before = model()
        model.layer.parametrizations.weight_ih_l0.original0.mul_(2)
        assert not torch.equal(model(), before)


def test_assigned_recurrent_weights_arrive():
    model, other = build("lstm"), torch.randn(20, 3)
    model.layer.weight_ih_l0 = other
    torch.testing.assert_close(model.layer.weight_ih_l0, other, rtol=1e-6, atol=1e-6)


def test_parts_of_attention_are_selected_and_excluded():
    def attention():
        return nn.ModuleDict({"a": nn.MultiheadAttention(4, 2), "b": nn.Linear(2, 2)})

    assert apply_weight_norm(attention(), nn.MultiheadAttention) == ["a", "a.out_proj"]
    assert apply_weight_norm(attention(), "a") == ["a", "a.out_proj"]
    assert apply_weight_norm(attention(), "a", exclude="a.out_proj") == ["a"]
    assert apply_weight_norm(attention()) == ["a.out_proj", "b"]
    assert apply_weight_norm(attention(), "*", exclude="a") == ["a.out_proj", "b"]


def test_attention_in_evaluation_takes_the_fast_path_with_computed_weights():
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    x, mask = torch.randn(3, 5, 8), torch.zeros(3, 5, dtype=torch.bool)
    mask[0, 3:] = True
    assert "layers.1.self_attn" in apply_weight_norm(model, "*")
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
        folded = copy.deepcopy(model)
        fold_weight_norm(folded)
        for arguments in ({}, {"src_key_padding_mask": mask}):
            assert torch.equal(model(x, **arguments), folded(x, **arguments))


def test_a_failure_in_a_later_weight_leaves_the_layer_plain():
    model = build("lstm", normalize=False)
    with torch.no_grad():
        model.layer.weight_hh_l0[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"'layer' \(LSTM\) cannot be weight-normalized: .*NaN"):
        apply_weight_norm(model, "layer")
    assert not hasattr(model.layer, "parametrizations")
    assert model.layer._flat_weights[0] is model.layer.weight_ih_l0


def test_a_failure_while_rewriting_is_undone(monkeypatch):
    model, plain = build("lstm", normalize=False), build("lstm", normalize=False)
    names = [name for name, _ in model.named_parameters()]
    register = nn.utils.parametrize.register_parametrization

    def fails_at_the_second(module, tensor, *args):
        if tensor == "weight_hh_l0":
            raise MemoryError
        return register(module, tensor, *args)

    monkeypatch.setattr(nn.utils.parametrize, "register_parametrization", fails_at_the_second)
    with pytest.raises(MemoryError):
        apply_weight_norm(model, "layer")
    assert [name for name, _ in model.named_parameters()] == names
    assert type(model.layer) is nn.LSTM
    assert torch.equal(model(), plain())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "build_layer",
    [lambda: nn.Linear(33, 17), lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), lambda: nn.Conv1d(2, 1, 1)],
)
def test_one_norm_per_weight(build_layer, dtype):
    layer = build_layer().to(dtype)
    before = layer.weight.detach().clone()
    assert apply_weight_norm(layer, dim=None) == [""]
    g = layer.parametrizations.weight.original0
    assert g.shape == ()
    torch.testing.assert_close(g.double(), before.double().norm(), rtol=2 * torch.finfo(dtype).eps, atol=0)
    assert torch.equal(layer.weight, before)
    assert "per_tensor=True" in str(layer)
    with torch.no_grad():
        g.mul_(2)
    torch.testing.assert_close(layer.weight, 2 * before)
    weight = layer.weight.detach()
    fold_weight_norm(layer)
    assert torch.equal(layer.weight, weight)


def test_one_norm_per_weight_equals_torchs():
    ours, theirs = (nn.Conv2d(2, 3, 2).double() for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    apply_weight_norm(ours, dim=None)
    parametrizations.weight_norm(theirs, dim=None)
    assert [p.shape for p in ours.parameters()] == [p.shape for p in theirs.parameters()]
    weight = torch.randn_like(ours.weight)
    for layer in (ours, theirs):
        (layer.weight * weight).sum().backward()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad)
    theirs.load_state_dict(ours.state_dict())


def test_a_zero_weight_with_one_norm_learns():
    layer = nn.Linear(3, 2)
    nn.init.zeros_(layer.weight)
    apply_weight_norm(layer, dim=None)
    assert torch.equal(layer.weight.abs(), torch.zeros(2, 3))
    layer(torch.randn(4, 3)).sum().backward()
    assert layer.parametrizations.weight.original0.grad != 0


@pytest.mark.parametrize("name", ["lstm", "deep lstm", "attention", "gru cell"])
def test_one_norm_per_weight_of_layers_with_several(name):
    plain, model = build(name, normalize=False), build(name, normalize=False)
    apply_weight_norm(model, "layer", dim=None)
    assert all(g.shape == () for g, _ in pairs(model).values())
    assert len(pairs(model)) == NUM_WEIGHTS[name]
    assert torch.equal(model(), plain())


@pytest.mark.parametrize("build_with", [apply_weight_norm, lambda model, dim: WeightNormCallback(dim=dim)])
def test_another_dim_is_refused(build_with):
    with pytest.raises(ValueError, match=r"`dim` got 0, but it must be \"output\""):
        build_with(nn.Linear(2, 2), dim=0)
    with pytest.raises(ValueError, match=r"`init=\"data\"` sets the variance of each unit.*`dim=\"output\"`"):
        WeightNormCallback(init="data", dim=None)


@pytest.mark.parametrize("dim", ["output", None])
def test_a_fit_and_its_file(tmp_path, dim):
    model = Recurrent()
    callback = WeightNormCallback("net.*", dim=dim)
    trainer = fit(model, callback, max_epochs=10)
    assert sum(model.losses[-4:]) < sum(model.losses[:4])
    assert normalized(model) == ["net.head"]
    assert list(normalized_weights(model.net["lstm"])) == ["weight_ih_l0", "weight_hh_l0"]
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    expected = torch.cat(trainer.predict(model))
    fresh = Recurrent()
    found = quiet_trainer(WeightNormCallback("net.*")).predict(fresh, ckpt_path=tmp_path / "last.ckpt")
    torch.testing.assert_close(torch.cat(found), expected, rtol=0, atol=0)


def test_recurrent_weights_are_kept_by_data_dependent_initialization():
    model = Recurrent()
    before = model.net["lstm"].weight_ih_l0.detach().clone()
    model.lr = 0.0
    fit(model, WeightNormCallback("net.*", init="data"))
    assert torch.equal(model.net["lstm"].weight_ih_l0, before)
    # the head sees 8 examples a batch, of which the first set it
    out = model.predict_step(next(iter(model.data())), 0)
    torch.testing.assert_close(out.std(0, correction=0), torch.ones(2), atol=1e-3, rtol=0)


class Lazy(Regression):
    def __init__(self, built):
        super().__init__(nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.LazyLinear(2)))
        self.built = built

    def configure_model(self):
        if self.built:
            self.net(torch.zeros(2, 4))


def test_lazy_layers_are_normalized_once_they_are_built():
    model = Lazy(built=True)
    fit(model, WeightNormCallback(init="data"))
    assert normalized(model) == ["net.0", "net.2"]
    with pytest.raises(ValueError, match=r"'net\.0' \(LazyLinear\).*has no shape yet.*`configure_model`"):
        fit(Lazy(built=False), WeightNormCallback())


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: nn.LSTM(4, 3, batch_first=True), (3, 5, 4)),
        (lambda: nn.GRU(4, 3, batch_first=True, bidirectional=True), (3, 5, 4)),
        (lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True), (3, 5, 4)),
        (lambda: nn.Linear(4, 4), (3, 5, 4)),
        (lambda: nn.Conv1d(4, 4, 2), (3, 4, 5)),
    ],
)
@pytest.mark.parametrize("dim", ["output", None])
def test_the_noise_scale_sees_the_gradients_of_single_examples(layer, shape, dim):
    torch.manual_seed(0)
    model = layer().double()
    assert apply_weight_norm(model, lambda name, module: rule_for(module) is not None, dim=dim)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.2)
    x = torch.randn(shape).double()

    def run():
        out = model(x)
        return mixed_loss(out[0] if isinstance(out, tuple) else out)

    check(model, run, 3)
