"""Checkpoints of every kind of layer: plain to others, exact to resume from."""

import copy
import pickle

import pytest
import torch
from helpers.weight_norm_models import Regression, fit, quiet_trainer
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from torch import nn

from lightning_wn import WeightNormCallback
from lightning_wn.weight_norm import add_mean_only_batch_norm, apply_weight_norm, cached_weight_norm, fold_weight_norm
from lightning_wn.weight_norm.core.layers import rule_for
from lightning_wn.weight_norm.core.mean_only_batch_norm import mean_only_of
from lightning_wn.weight_norm.core.normalized_module import normalized_weights


class Sequence(nn.Module):
    """Reads the four inputs as a sequence of numbers."""

    def __init__(self, layer, size):
        super().__init__()
        self.layer = layer
        self.embed = nn.Linear(1, 4)
        self.head = nn.Linear(size, 2)

    def forward(self, x):
        x = self.embed(x.unsqueeze(-1))
        if isinstance(self.layer, nn.MultiheadAttention):
            keys, values = x[..., : self.layer.kdim], x[..., : self.layer.vdim]
            return self.head(self.layer(x, keys, values, need_weights=False)[0].mean(1))
        if isinstance(self.layer, nn.RNNCellBase):
            state = None
            for step in x.unbind(1):
                state = self.layer(step, state)
            return self.head(state[0] if isinstance(state, tuple) else state)
        return self.head(self.layer(x)[0][:, -1])


class Pairs(nn.Module):
    """Multiplies halves of the inputs."""

    def __init__(self, bias):
        super().__init__()
        self.layer = nn.Bilinear(2, 2, 2, bias=bias)

    def forward(self, x):
        return self.layer(x[:, :2].contiguous(), x[:, 2:].contiguous())


NETS = {
    "lstm": lambda: Sequence(nn.LSTM(4, 5, num_layers=2, bidirectional=True, batch_first=True), 10),
    "projected lstm": lambda: Sequence(nn.LSTM(4, 5, proj_size=3, batch_first=True, bias=False), 3),
    "gru": lambda: Sequence(nn.GRU(4, 5, batch_first=True), 5),
    "rnn": lambda: Sequence(nn.RNN(4, 5, batch_first=True, nonlinearity="relu"), 5),
    "lstm cell": lambda: Sequence(nn.LSTMCell(4, 5), 5),
    "gru cell": lambda: Sequence(nn.GRUCell(4, 5, bias=False), 5),
    "attention": lambda: Sequence(nn.MultiheadAttention(4, 2, batch_first=True), 4),
    "attention of three sizes": lambda: Sequence(
        nn.MultiheadAttention(4, 2, kdim=3, vdim=2, add_bias_kv=True, batch_first=True), 4
    ),
    "bilinear": lambda: Pairs(True),
    "bilinear without bias": lambda: Pairs(False),
    "convolutions": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 2)), nn.Conv1d(2, 6, 1), nn.ELU(), nn.ConvTranspose1d(6, 4, 2, groups=2), nn.Flatten(),
        nn.Linear(12, 2),
    ),
}  # fmt: skip


def supported(name, module):
    return rule_for(module) is not None


class Model(Regression):
    """Has a state of the optimizer for every parameter, and the same weights every time."""

    def __init__(self, name):
        torch.manual_seed(0)
        super().__init__(NETS[name]())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.02)


class Stop(Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = trainer.current_epoch == 0


def tensors(model):
    """Parameters and buffers, whatever `state_dict` makes of them."""
    return {n: t.detach().clone() for n, t in (*model.named_parameters(), *model.named_buffers())}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def check_file(tmp_path, name, *behind, form="folded", **arguments):
    """Train, stop, resume and load; return the file, the plain names and the trained model."""

    def callbacks():
        return [WeightNormCallback(supported, checkpoint=form, **arguments), *(build() for build in behind)]

    whole, first, second, plain = (Model(name) for _ in range(4))
    fit(whole, *callbacks(), max_epochs=3)
    saver = ModelCheckpoint(tmp_path, save_last=True)
    fit(first, *callbacks(), saver, Stop(), max_epochs=3, enable_checkpointing=True)
    state = torch.load(saver.last_model_path, weights_only=True)["state_dict"]
    assert (list(state) == list(plain.state_dict())) == (form == "folded")
    quiet_trainer(*callbacks(), max_epochs=3).fit(second, ckpt_path=saver.last_model_path)
    assert second.losses == whole.losses[-8:]
    assert_same(tensors(second), tensors(whole))
    if form == "folded":
        plain.load_state_dict(state)
        tested = quiet_trainer().test(Model(name), ckpt_path=saver.last_model_path, verbose=False)
    else:
        tested = quiet_trainer(WeightNormCallback(supported)).test(
            plain, ckpt_path=saver.last_model_path, verbose=False
        )
        assert all(not normalized_weights(module) for module in plain.modules())
    x = torch.randn(7, 4, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(plain.eval().net(x), first.eval().net(x), rtol=1e-6, atol=1e-6)
    # the file into a normalized model, in a Trainer of its own
    again = Model(name)
    reader = quiet_trainer(WeightNormCallback(supported, **arguments))
    assert tested[0]["test_loss"] == pytest.approx(
        reader.test(again, ckpt_path=saver.last_model_path, verbose=False)[0]["test_loss"], rel=1e-6
    )


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("dim", ["output", None])
def test_a_file_is_plain_and_resuming_from_it_exact(tmp_path, name, dim):
    check_file(tmp_path, name, dim=dim)


@pytest.mark.parametrize("name", ["lstm", "attention", "bilinear"])
@pytest.mark.parametrize("dim", ["output", None])
def test_a_file_of_g_and_v_resumes_exactly_and_is_read_by_a_plain_model(tmp_path, name, dim):
    check_file(tmp_path, name, form="parametrized", dim=dim)


@pytest.mark.parametrize("init", ["keep", "data"])
@pytest.mark.parametrize("behind", [(), (lambda: EMAWeightAveraging(decay=0.8),)], ids=["alone", "averaged"])
@pytest.mark.parametrize("name", ["convolutions", "bilinear", "gru"])
def test_means_and_initialized_layers(tmp_path, name, init, behind):
    check_file(tmp_path, name, *behind, init=init, mean_only_batch_norm=True)


@pytest.mark.parametrize("init", ["keep", "data"])
def test_means_in_a_file_of_g_and_v(tmp_path, init):
    check_file(tmp_path, "convolutions", form="parametrized", init=init, mean_only_batch_norm=True)


def normalize(name):
    model = Model(name).net
    apply_weight_norm(model, supported)
    add_mean_only_batch_norm(model, supported)
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
        model(x)  # moves the running means
    return model.eval(), x


@pytest.mark.parametrize("through", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("name", NETS)
def test_copies_and_pickles_compute_train_and_fold(name, through):
    model, x = normalize(name)
    expected = model(x)
    twin = through(model)
    assert_same(tensors(twin), tensors(model))
    assert torch.equal(twin(x), expected)
    assert torch.equal(through(twin)(x), expected)
    twin.train()(x).sum().backward()
    assert all(p.grad is not None for p in twin.parameters())
    assert all(p.grad is None for p in model.parameters())
    twin.eval()
    moved = twin(x)
    names = [n for n, module in model.named_modules() if supported(n, module) and not n.endswith("_norm")]
    assert fold_weight_norm(twin) == names
    torch.testing.assert_close(twin(x), moved, rtol=1e-5, atol=1e-6)  # b - mean is rounded once
    plain = NETS[name]()
    assert [n for n, _ in twin.named_parameters()] == with_biases(plain, model)
    assert str(twin) == str(with_bias_in_words(plain, name))
    assert torch.equal(model(x), expected)


def with_biases(plain, model):
    """Names of the plain model's parameters; a layer without bias gets one to hold its mean."""
    names = [n for n, _ in plain.named_parameters()]
    for name, layer in model.named_modules():
        if mean_only_of(layer) is not None and layer.bias is None:
            names.insert(names.index(f"{name}.weight") + 1, f"{name}.bias")
    return names


def with_bias_in_words(plain, name):
    return NETS["bilinear"]() if name == "bilinear without bias" else plain


@pytest.mark.parametrize("name", NETS)
def test_a_scope_computes_each_weight_once_and_training_goes_on(name, computed):
    model, x = normalize(name)
    count = sum(len(normalized_weights(module)) for module in model.modules())
    with torch.no_grad():
        expected = model(x)
    computed.clear()
    with torch.inference_mode(), cached_weight_norm(model):
        for _ in range(3):
            assert torch.equal(model(x), expected)
    assert len(computed) == count
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()(x).square().sum().backward()
    optimizer.step()
    with torch.no_grad(), cached_weight_norm(model.eval()):
        assert not torch.equal(model(x), expected)


def test_attention_takes_the_fast_path_in_a_scope(computed):
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    apply_weight_norm(model, supported)
    folded = copy.deepcopy(model)
    fold_weight_norm(folded)
    x, mask = torch.randn(3, 5, 8), torch.zeros(3, 5, dtype=torch.bool)
    mask[0, 3:] = True
    computed.clear()
    with torch.no_grad(), cached_weight_norm(model):
        for _ in range(2):
            assert torch.equal(model(x, src_key_padding_mask=mask), folded(x, src_key_padding_mask=mask))
    assert len(computed) == 8  # four weights a layer
