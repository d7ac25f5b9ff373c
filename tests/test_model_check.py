"""A model is accepted only if each record's gradient is its own; a refusal names the layer."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from opacus.layers import DPLSTM, DPMultiheadAttention
from torch import Tensor, nn
from torch.nn import functional as F

from client.model_check import ModelRefused, check_model


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none")


class Custom(nn.Module):
    """Two linear layers and a forward pass that a test brings along."""

    def __init__(self, forward: Callable[["Custom", Tensor], Any]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


class Part(nn.Module):
    """A layer without parameters."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Transformer(nn.Module):
    """Embedding, constant positions, one encoder layer made of linear layers, mean over the sequence."""

    def __init__(self, length: int = 8, width: int = 6) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, width)
        self.register_buffer("positions", torch.linspace(0, 1, length)[:, None].expand(-1, width).clone())
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.feed = nn.Sequential(nn.Linear(width, 12), nn.GELU(), nn.Dropout(0.2), nn.Linear(12, width))
        self.head = nn.Linear(width, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.positions
        y = self.norms[0](x)
        attended = F.scaled_dot_product_attention(self.query(y), self.key(y), self.value(y), dropout_p=0.1)
        x = x + F.dropout(attended, 0.1, self.training)
        return self.head((x + self.feed(self.norms[1](x))).mean(1))


class TiedEmbedding(nn.Module):
    """A language model's usual trick, by a layer that shares the parameter or by the parameter itself."""

    def __init__(self, *, through_layer: bool) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(20, 6), nn.Linear(6, 20, bias=False)
        self.out.weight = self.embed.weight
        self.through_layer = through_layer

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.tanh(self.embed(tokens).mean(1))
        return self.out(x) if self.through_layer else x @ self.embed.weight.T


class Attention(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.attention, self.head = layer, nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x)[0].mean(1))


class Recurrent(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0][:, -1])


class OwnParameter(nn.Module):
    """A parameter beside layers: Opacus differentiates the whole module with functorch."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.scale, self.inner = nn.Parameter(torch.rand(6)), inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x * self.scale)


class Counter(nn.Module):
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x


class Remembers(nn.Module):
    """State outside buffers: what a record sees depends on the batch before."""

    last: Tensor | float = 0.0

    def forward(self, x: Tensor) -> Tensor:
        out = x + self.last
        self.last = x.mean().detach()
        return out


def cnn(norm: nn.Module, *, inplace: bool = False) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), norm, nn.ReLU(inplace), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3)
    )


def frozen(model: nn.Module, names: str = "") -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad = not name.startswith(names)
    return model


def tied_linear() -> nn.Module:
    model = Custom(lambda m, x: m.second(m.first(x).tanh()))
    model.second.weight = model.first.weight
    return model


def linear(*parts: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), *parts, nn.Linear(6, 3))


torch.manual_seed(0)  # the same cases in every run
VECTORS, SEQUENCES, TOKENS = torch.randn(8, 6), torch.randn(8, 7, 6), torch.randint(20, (8, 8))
IMAGES = torch.randint(256, (8, 2, 7, 7)).float() / 255
CLASSES = torch.randint(3, (8,))

ACCEPTED = {
    "linear": (nn.Linear(6, 3), VECTORS),
    "bytes": (
        nn.Sequential(Part(lambda x: x.float() / 255), nn.Linear(6, 3)),
        (VECTORS.abs() * 50).to(torch.uint8),
    ),
    "cnn": (cnn(nn.GroupNorm(2, 4)), IMAGES),
    "instance norm": (cnn(nn.InstanceNorm2d(4, affine=True)), IMAGES),
    "in evaluation mode": (cnn(nn.GroupNorm(2, 4)).eval(), IMAGES),
    "transformer": (Transformer(), TOKENS),
    "opacus attention": (Attention(DPMultiheadAttention(6, 2, dropout=0.1, batch_first=True)), SEQUENCES),
    "opacus lstm": (Recurrent(DPLSTM(6, 6, batch_first=True)), SEQUENCES),
    "dropout": (linear(nn.Dropout(0.5), nn.ReLU()), VECTORS),
    "functional dropout": (Custom(lambda m, x: m.second(F.dropout(m.first(x), 0.5, m.training))), VECTORS),
    "frozen layer": (frozen(linear(), "0"), VECTORS),
    "own parameter": (OwnParameter(nn.Linear(6, 3)), VECTORS),
    "tied layers": (tied_linear(), VECTORS),
    "tied embedding": (TiedEmbedding(through_layer=True), TOKENS),
    "layer called twice": (frozen(Custom(lambda m, x: m.first(m.first(x).tanh())), "second"), VECTORS),
    "twins": (Custom(lambda m, x: m.second((m.first(x) - m.first(x * x)).abs())), VECTORS),
}

REFUSED = {
    "batch norm 1d": (linear(nn.BatchNorm1d(6)), VECTORS, r"1 \(BatchNorm1d\).*replace it by GroupNorm"),
    "batch norm 2d": (cnn(nn.BatchNorm2d(4)), IMAGES, r"1 \(BatchNorm2d\).*replace it by GroupNorm"),
    "batch norm without parameters": (
        cnn(nn.BatchNorm2d(4, affine=False)),
        IMAGES,
        r"running_mean of 1 \(BatchNorm2d\)",
    ),
    "batch norm without parameters and state": (
        cnn(nn.BatchNorm2d(4, affine=False, track_running_stats=False)),
        IMAGES,
        r"^1 \(BatchNorm2d\) mixes records",
    ),
    "instance norm with state": (
        cnn(nn.InstanceNorm2d(4, affine=True, track_running_stats=True)),
        IMAGES,
        r"1 \(InstanceNorm2d\)",
    ),
    "torch attention": (
        Attention(nn.MultiheadAttention(6, 2, batch_first=True)),
        SEQUENCES,
        "attention .*DPMultihead",
    ),
    "torch lstm": (Recurrent(nn.LSTM(6, 6, batch_first=True)), SEQUENCES, r"layer \(LSTM\).*DPLSTM"),
    "batch mean in a layer": (linear(Part(lambda x: x - x.mean(0))), VECTORS, r"^1 \(Part\) mixes records"),
    "batch mean in place": (linear(Part(lambda x: x.sub_(x.mean(0)))), VECTORS, r"^1 \(Part\) mixes records"),
    "batch mean between layers": (
        nn.Sequential(Custom(lambda m, x: m.second(m.first(x) - m.first(x).mean(0)))),
        VECTORS,
        r"^0 \(Custom\) mixes",
    ),
    "softmax over the batch": (linear(nn.Softmax(dim=0)), VECTORS, r"^1 \(Softmax\) mixes records"),
    "the record before": (linear(Part(lambda x: x.cumsum(0))), VECTORS, r"^1 \(Part\) mixes records"),
    "batch size": (
        linear(Part(lambda x: x / len(x))),
        VECTORS,
        r"^1 \(Part\) depends on the number of records",
    ),
    "squeeze": (linear(Part(torch.squeeze)), VECTORS, "must return a tensor with the batch dimension first"),
    "other noise": (
        linear(Part(lambda x: x + torch.randn_like(x))),
        VECTORS,
        r"^1 \(Part\) .*random numbers",
    ),
    "state in an attribute": (linear(Remembers()), VECTORS, r"^1 \(Remembers\) mixes records"),
    "counter": (linear(Counter()), VECTORS, r"buffer 1\.calls of 1 \(Counter\) changes in training"),
    "unused layer": (
        Custom(lambda m, x: m.first(x)),
        VECTORS,
        r"second\.weight of second \(Linear\) takes no part",
    ),
    "detached": (
        Custom(lambda m, x: m.second(m.first(x)).detach()),
        VECTORS,
        r"first\.weight .* takes no part",
    ),
    "nothing to train": (frozen(linear()), VECTORS, "no trainable parameter"),
    "parameter used outside its layer": (
        TiedEmbedding(through_layer=False),
        TOKENS,
        r"embed\.weight of embed \(Embedding\) gets a wrong",
    ),
    "one call without a batch": (
        frozen(Custom(lambda m, x: m.first(x) + m.first(torch.ones(1, 6))), "second"),
        VECTORS,
        r"first\.weight.* wrong",
    ),
    "one call unused": (
        frozen(Custom(lambda m, x: (m.first(x), m.first(x * 2))[0]), "second"),
        VECTORS,
        r"first\.weight.* wrong",
    ),
    "batch folded away": (
        Custom(lambda m, x: m.second(m.first(x.view(-1, 1, 6).repeat(1, 2, 1).view(-1, 6)).view(len(x), 2, 6)).sum(1)),
        VECTORS,
        r"first\.weight.* wrong",
    ),
    "batch second": (
        Custom(lambda m, x: m.second(m.first(x.transpose(0, 1)).transpose(0, 1)).sum(1)),
        SEQUENCES,
        r"first\.weight.* wrong",
    ),
    "batch second, by chance as long": (
        Custom(lambda m, x: m.second(m.first(x[:, :5].transpose(0, 1)).transpose(0, 1)).sum(1)),
        SEQUENCES,
        r"first\.weight.* wrong",
    ),
    "an error": (
        linear(Part(lambda x: x[:, :, 0])),
        VECTORS,
        r"^1 \(Part\) fails on 5 records at a time: IndexE",
    ),
    "in place": (
        cnn(nn.GroupNorm(2, 4), inplace=True),
        IMAGES,
        r"2 \(ReLU\) is beyond Opacus: use out-of-place",
    ),
    "dropout under functorch": (
        OwnParameter(linear(nn.Dropout())),
        VECTORS,
        r"^inner\.1 \(Dropout\) is beyond Opacus.* without dropout",
    ),
    "no tensor": (
        Custom(lambda m, x: (m.second(m.first(x)),)),
        VECTORS,
        r"\(Custom\) must return a tensor .* tuple",
    ),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name: str) -> None:
    model, inputs = ACCEPTED[name]
    check_model(model, cross_entropy, inputs, CLASSES)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str) -> None:
    model, inputs, message = REFUSED[name]
    with pytest.raises(ModelRefused, match=message) as refusal:
        check_model(model, cross_entropy, inputs, CLASSES)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (F.cross_entropy, r"one value per record, shape \[5\], found \[\]: use reduction='none'"),
        (lambda y, t: cross_entropy(y, t)[:, None], r"found \[5, 1\]"),
        (lambda y, t: cross_entropy(y, t) - cross_entropy(y, t).mean(), "the loss mixes records"),
        (lambda y, t: cross_entropy(y, t) * (t == t[0]), "the loss (mixes|depends)"),
        (lambda y, t: cross_entropy(y, t) / 0, "the loss is not finite"),
        (lambda y, t: cross_entropy(y, t) / len(t), "the loss depends on the number of records"),
    ],
)
def test_a_loss_that_is_not_one_value_per_record_is_refused(
    loss: Callable[[Tensor, Tensor], Tensor], message: str
) -> None:
    with pytest.raises(ModelRefused, match=message):
        check_model(nn.Linear(6, 3), loss, VECTORS, CLASSES)


def test_a_gradient_that_mixes_records_behind_a_clean_output_is_refused() -> None:
    class Mixed(torch.autograd.Function):
        @staticmethod
        def forward(_ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(_ctx: object, gradient: Tensor) -> Tensor:
            return gradient + gradient.mean(0)

    with pytest.raises(ModelRefused, match=r"0\.weight of 0 \(Linear\) gets a wrong per-record gradient"):
        check_model(linear(Part(Mixed.apply)), cross_entropy, VECTORS, CLASSES)


@pytest.mark.parametrize("inputs", [torch.zeros(8, 6), torch.randn(1, 6), torch.randn(7, 6)])
def test_examples_that_show_nothing_are_an_error(inputs: Tensor) -> None:
    with pytest.raises(ValueError, match="expected"):
        check_model(nn.Linear(6, 3), cross_entropy, inputs, CLASSES[: max(1, len(inputs) - len(inputs) % 2)])


@pytest.mark.parametrize("name", ["transformer", "in evaluation mode", "counter", "state in an attribute", "in place"])
def test_nothing_is_changed(name: str) -> None:
    model, inputs = ACCEPTED[name] if name in ACCEPTED else REFUSED[name][:2]
    state, examples, training = copy.deepcopy(model.state_dict()), inputs.clone(), model.training
    torchs, numpys = torch.get_rng_state(), np.random.get_state(legacy=False)["state"]["key"].copy()
    attributes = [set(vars(x)) for x in [*model.modules(), *model.parameters()]]
    with nullcontext() if name in ACCEPTED else pytest.raises(ModelRefused):
        check_model(model, cross_entropy, inputs, CLASSES)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert torch.equal(inputs, examples)
    assert model.training == training
    assert torch.equal(torch.get_rng_state(), torchs)
    assert (np.random.get_state(legacy=False)["state"]["key"] == numpys).all()
    assert [set(vars(x)) for x in [*model.modules(), *model.parameters()]] == attributes
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
