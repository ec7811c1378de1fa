"""Which layers are meant, and what is said when none is."""

import pytest
import torch
from torch import nn

from lightning_wn.weight_norm import apply_weight_norm, fold_weight_norm


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.ReLU(), nn.Conv1d(4, 4, 1))
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7)


class MyLinear(nn.Linear):
    pass


@pytest.mark.parametrize(
    ("modules", "exclude", "names"),
    [
        (None, (), ["encoder.0", "encoder.3", "head"]),
        (None, "head", ["encoder.0", "encoder.3"]),
        (None, nn.Conv1d, ["encoder.0", "head"]),
        (None, ["encoder.*"], ["head"]),
        (nn.Linear, (), ["encoder.0", "head"]),
        ("torch.nn.Linear", (), ["encoder.0", "head"]),
        ("torch.nn.Embedding", (), ["embed"]),
        ("encoder.*", (), ["encoder.0", "encoder.3"]),
        ("*", "torch.nn.Linear", ["encoder.3", "embed"]),
        (["head", nn.Embedding], (), ["embed", "head"]),
        (lambda name, module: name.startswith("encoder"), (), ["encoder.0", "encoder.3"]),
        (
            lambda name, module: isinstance(module, nn.Linear),
            lambda name, module: name == "head",
            ["encoder.0"],
        ),
        (["e*", lambda name, module: name == "head"], ["*.3", nn.Embedding], ["encoder.0", "head"]),
        ("encoder.[0]", (), ["encoder.0"]),
        ("head", (), ["head"]),
    ],
)
def test_what_is_selected(modules, exclude, names):
    model = Model()
    assert apply_weight_norm(model, modules, exclude=exclude) == names
    normalized = [name for name, m in model.named_modules() if hasattr(m, "parametrizations")]
    assert normalized == names


@pytest.mark.parametrize(
    ("modules", "exclude", "words"),
    [
        ("encodr.*", (), ["`modules='encodr.*'` matches no module of Model", "a glob on qualified names"]),
        ("torch.nn.Conv2d", (), ["`modules='torch.nn.Conv2d'` matches no module"]),
        (nn.Conv2d, (), ["`modules=Conv2d` matches no module"]),
        (lambda name, module: False, (), ["`modules=<function", "matches no module"]),
        (["head", "nothing"], (), ["`modules='nothing'` matches no module"]),
        ("encoder", (), ["'encoder' (Sequential)", 'write "encoder.*"']),
        (
            nn.LayerNorm,
            (),
            ["`modules=LayerNorm` matches 'encoder.1' (LayerNorm)", "none of these owns a weight"],
        ),
        ([], (), ["`modules=()` selects nothing"]),
        (None, "decoder.*", ["`exclude='decoder.*'` matches no module of Model"]),
        (None, "encoder", ["`exclude='encoder'` matches 'encoder' (Sequential)", 'write "encoder.*"']),
        (None, [nn.Conv2d], ["`exclude=Conv2d` matches no module"]),
    ],
)
def test_an_entry_that_matches_nothing_is_an_error(modules, exclude, words):
    model = Model()
    with pytest.raises(ValueError, match="`") as error:
        apply_weight_norm(model, modules, exclude=exclude)
    for word in words:
        assert word in str(error.value)
    assert not any(hasattr(m, "parametrizations") for m in model.modules())


@pytest.mark.parametrize("argument", ["modules", "exclude"])
@pytest.mark.parametrize("value", [3, [None], [torch.Tensor], nn.Linear(1, 1), ["head", 2.5]])
def test_an_entry_of_a_wrong_type_is_an_error(argument, value):
    with pytest.raises(TypeError, match=f"`{argument}` got .* but each entry must be a type such as"):
        apply_weight_norm(Model(), **{argument: value})


def test_a_model_without_any_layer_of_the_default_types_is_an_error():
    with pytest.raises(ValueError, match="`modules=None` found no layer to normalize in Sequential"):
        apply_weight_norm(nn.Sequential(nn.LayerNorm(3), nn.Embedding(3, 3)))


class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.Parameter(torch.ones(3, 2))


@pytest.mark.parametrize("other", [Router(), nn.EmbeddingBag(3, 2)])
@pytest.mark.parametrize("modules", ["*", lambda name, module: True])
def test_a_selected_matrix_of_an_unsupported_type_is_an_error_until_excluded(other, modules):
    model = nn.Sequential(nn.Linear(3, 3), other)
    with pytest.raises(ValueError, match=f"selects '1' \\({type(other).__name__}\\), but only") as error:
        apply_weight_norm(model, modules)
    assert "add this name to `exclude`" in str(error.value)
    assert type(model[0]) is nn.Linear
    assert "0" in apply_weight_norm(model, modules, exclude="1")


def test_subclasses_follow_their_base_class():
    assert apply_weight_norm(nn.Sequential(MyLinear(2, 2))) == ["0"]


def test_the_output_projection_of_attention_works_in_both_paths():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    x = torch.randn(2, 5, 8)
    model.eval()
    with torch.no_grad():
        fast = model(x)
    slow = model(x)
    assert apply_weight_norm(model) == ["self_attn.out_proj", "linear1", "linear2"]
    with torch.no_grad():
        assert torch.equal(model(x), fast)
    assert torch.equal(model(x), slow)
    model(x).sum().backward()
    assert model.self_attn.out_proj.parametrizations.weight.original0.grad.abs().sum() > 0


def test_a_module_under_two_names_is_rewritten_once_and_found_by_either():
    layer = nn.Linear(2, 2)
    for pattern in ("first", "second"):
        model = nn.ModuleDict({"first": layer, "second": layer})
        assert apply_weight_norm(model, pattern) == ["first"]
        assert fold_weight_norm(model) == ["first"]
    model = nn.ModuleDict({"first": layer, "second": layer, "third": nn.Linear(2, 2)})
    assert apply_weight_norm(model, exclude="second") == ["third"]


def test_a_single_layer_is_a_model():
    layer = nn.Linear(2, 2)
    assert apply_weight_norm(layer) == [""]
    assert apply_weight_norm(layer) == []


def test_what_computes_a_parametrized_tensor_is_left_alone():
    class Through(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, weight):
            return self.inner(weight)

    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    nn.utils.parametrize.register_parametrization(model[0], "weight", Through())
    assert apply_weight_norm(model, "*") == ["1"]
