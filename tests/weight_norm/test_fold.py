"""Folding of weight norm from anywhere, real models among it, and what a folded model can be exported to."""

import importlib.util
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import weight_norm as old_weight_norm

from lightning_wn.weight_norm import apply_weight_norm, cached_weight_norm, fold_weight_norm

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
TORCH = {"parametrization": parametrizations.weight_norm, "legacy": old_weight_norm}


def moved(model):
    """Move g and v, so that w is none of them, and compute what torch's older hook computes before a forward."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.rand_like(p))
    return model


@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("spelling", TORCH)
def test_torchs_layers_become_plain_and_compute_the_same(spelling, dim):
    for plain in (nn.Linear(4, 3), nn.ConvTranspose1d(4, 3, 2), nn.Conv2d(4, 3, 2, bias=False)):
        kind, names = type(plain), [name for name, _ in plain.named_parameters()]
        layer = moved(TORCH[spelling](plain, dim=dim)).double().eval()
        x = torch.randn(*{"Linear": (2, 4), "ConvTranspose1d": (2, 4, 5), "Conv2d": (2, 4, 5, 5)}[kind.__name__])
        expected = layer(x.double())
        model = nn.Sequential(layer)
        assert fold_weight_norm(model) == ["0"]
        assert torch.equal(model(x.double()), expected)
        assert type(layer) is kind
        assert [name for name, _ in layer.named_parameters()] == names
        assert layer.weight.dtype == torch.float64
        assert not layer.training
        assert not layer._forward_pre_hooks
        assert fold_weight_norm(model) == []
        pickle.dumps(model)
        layer.load_state_dict(layer.state_dict())


@pytest.mark.parametrize("spelling", TORCH)
def test_flags_and_other_tensors(spelling):
    frozen, recurrent = nn.Linear(3, 3), nn.LSTM(3, 4)
    bilinear = TORCH[spelling](TORCH[spelling](nn.Bilinear(2, 2, 2)), "bias", dim=0)
    TORCH[spelling](frozen).requires_grad_(False)
    old_weight_norm(recurrent, "weight_hh_l0")
    x = torch.randn(5, 2, 3)
    expected = recurrent(x)[0]
    model = nn.ModuleList([frozen, recurrent, bilinear])
    assert fold_weight_norm(model) == ["0", "1", "2"]
    assert [p.requires_grad for p in frozen.parameters()] == [False, False]
    assert set(dict(recurrent.named_parameters())) == set(dict(nn.LSTM(3, 4).named_parameters()))
    assert torch.equal(recurrent(x)[0], expected)
    with torch.no_grad():
        recurrent.weight_hh_l0.zero_()
    assert not torch.equal(recurrent(x)[0], expected)
    assert next(iter(dict(bilinear.named_parameters()))) == "bias"
    assert {"weight", "bias"} == set(dict(bilinear.named_parameters()))


@pytest.mark.parametrize("spelling", TORCH)
def test_shared_weights_are_shared_again(spelling):
    first, second = (TORCH[spelling](nn.Linear(3, 3)) for _ in range(2))
    if spelling == "legacy":
        second.weight_g, second.weight_v = first.weight_g, first.weight_v
    else:
        chains = [layer.parametrizations.weight for layer in (first, second)]
        chains[1].original0, chains[1].original1 = chains[0].original0, chains[0].original1
    assert fold_weight_norm(nn.Sequential(first, second)) == ["0", "1"]
    assert first.weight is second.weight


def test_a_parametrization_on_top_is_refused():
    class Twice(nn.Module):
        def forward(self, weight):
            return 2 * weight

    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 3)), nn.Linear(3, 3))
    nn.utils.parametrize.register_parametrization(model[0], "weight", Twice())
    apply_weight_norm(model)
    with pytest.raises(ValueError, match=r"'0' \(Linear\) has another parametrization on top"):
        fold_weight_norm(model)
    assert hasattr(model[1], "parametrizations")


def wav2vec2():
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    config = Wav2Vec2Config(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=(8, 8),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        apply_spec_augment=False,
    )
    return Wav2Vec2Model(config), (torch.randn(2, 400),), ["encoder.pos_conv_embed.conv"]


def encodec():
    from transformers import EncodecConfig, EncodecModel

    config = EncodecConfig(
        num_filters=4, hidden_size=8, codebook_size=16, codebook_dim=8, upsampling_ratios=[2, 2], num_lstm_layers=1
    )
    model = EncodecModel(config)
    names = [name for name, module in model.named_modules() if hasattr(module, "parametrizations")]
    assert len(names) > 8
    return model.encoder, (torch.randn(1, 1, 64),), [name[8:] for name in names if name.startswith("encoder.")]


def hifi_gan():
    """Under the older spelling, as its checkpoints are."""
    from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

    config = SpeechT5HifiGanConfig(
        model_in_dim=8,
        upsample_initial_channel=8,
        upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4],
        resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1, 3]],
    )
    model = SpeechT5HifiGan(config)
    kinds = (nn.Conv1d, nn.ConvTranspose1d)
    names = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    for name in names:
        old_weight_norm(model.get_submodule(name))
    return model, (torch.randn(6, 8),), names


def output(model, inputs):
    with torch.no_grad():
        out = model(*inputs)
    return out[0] if not isinstance(out, torch.Tensor) else out


@pytest.mark.parametrize("build", [wav2vec2, encodec, hifi_gan])
def test_real_models_are_folded(build):
    torch.manual_seed(0)
    model, inputs, names = build()
    moved(model).eval()
    expected = output(model, inputs)
    assert fold_weight_norm(model) == names
    assert torch.equal(output(model, inputs), expected)
    assert not any("original" in name or name.endswith("_g") for name in model.state_dict())
    pickle.loads(pickle.dumps(model))


def test_gpt2_with_tied_embeddings():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=20, n_positions=8)
    model = GPT2LMHeadModel(config).eval()
    tokens = torch.arange(8).view(1, 8)
    plain = model.state_dict()
    expected = model(tokens).logits
    names = apply_weight_norm(model, ["*.wte", "lm_head"])
    assert names == ["transformer.wte", "lm_head"]
    assert torch.equal(model(tokens).logits, expected)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()
    with torch.no_grad():
        trained = model(tokens).logits
        with cached_weight_norm(model):
            assert torch.equal(model(tokens).logits, trained)
    assert fold_weight_norm(model) == names
    assert model.lm_head.weight is model.transformer.wte.weight
    assert list(model.state_dict()) == list(plain)
    assert torch.equal(model(tokens).logits, trained)


@pytest.fixture
def folded():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), parametrizations.weight_norm(nn.ConvTranspose1d(4, 2, 3)))
    apply_weight_norm(model)
    moved(model).eval()
    fold_weight_norm(model)
    return model


def test_a_folded_model_is_exported(folded):
    x = torch.randn(1, 2, 7)
    expected = folded(x)
    program = torch.export.export(folded, (x,))
    torch.testing.assert_close(program.module()(x), expected)
    assert sorted(program.state_dict) == ["0.bias", "0.weight", "2.bias", "2.weight"]
    for scripted in (torch.jit.script(folded), torch.jit.trace(folded, x)):
        file = io.BytesIO()
        torch.jit.save(scripted, file)
        file.seek(0)
        torch.testing.assert_close(torch.jit.load(file)(x), expected)


@pytest.mark.skipif(importlib.util.find_spec("onnx") is None, reason="needs the package onnx")
def test_a_folded_model_is_exported_to_onnx(folded, tmp_path):
    torch.onnx.export(folded, (torch.randn(1, 2, 7),), tmp_path / "model.onnx", dynamo=False)
    import onnx

    graph = onnx.load(tmp_path / "model.onnx").graph
    assert [node.op_type for node in graph.node] == ["Conv", "Relu", "ConvTranspose"]


def test_an_unfolded_model_is_exported_too_with_the_formula_in_the_graph():
    model = nn.Sequential(nn.Linear(3, 2))
    apply_weight_norm(model)
    x = torch.randn(4, 3)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x))
    torch.testing.assert_close(torch.jit.trace(model, x)(x), model(x))
