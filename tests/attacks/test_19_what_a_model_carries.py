"""Attack: records leave un-noised, or beyond the clip, by what a model carries: buffers, extra state, optimizer state,
unused or shared parameters, layers that mix records.

What holds: a model is accepted only if each record's gradient is its own, a refusal names the layer and costs nothing,
one record moves an accepted model by at most the clip, and only trainable parameters leave.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from opacus.layers import DPLSTM, DPMultiheadAttention
from torch import Tensor, nn
from torch.nn import functional as F

from client import app
from client.layer_trace import WithoutDropout
from client.model_check import ModelRefused, check_model
from client.training import train
from common.tasks import Data
from tests.attacks.site import Recorder, Site, moved, refusal, site, weights
from tests.attacks.task import Rigged
from tests.test_training import Chosen, flat, release, step


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


# What one record does to what is trained, through the shipped training.

CLIP = 0.7


def influence(model: nn.Module, inputs: Tensor) -> float:
    """How far the first record, and it is a loud one, moves two steps of training; noise would be added to it."""
    inputs = inputs.clone()
    if inputs.is_floating_point():
        inputs[0] *= 100
    everyone = list(range(len(inputs)))
    results = []
    for batch in (everyone, everyone[1:]):
        trained = copy.deepcopy(model)
        torch.manual_seed(0)
        how = step(max_grad_norm=CLIP, batch_size=1, learning_rate=1.0, physical_batch_size=len(inputs))
        with WithoutDropout():
            train(
                trained, cross_entropy, Data(inputs=inputs, targets=CLASSES),
                release=release(1), step=how, generator=Chosen([batch]),
            )  # fmt: skip
        results.append(flat(trained).double())
    return float((results[0] - results[1]).norm())


@pytest.mark.parametrize("name", ACCEPTED)
def test_one_record_moves_an_accepted_model_by_at_most_the_clip(name: str) -> None:
    assert influence(*ACCEPTED[name]) <= CLIP * 1.001


@pytest.mark.parametrize("name", ["batch mean in a layer", "softmax over the batch", "batch mean between layers"])
def test_without_the_check_one_record_moves_more(name: str) -> None:
    """The control: these are refused, and with reason."""
    assert influence(*REFUSED[name][:2]) > CLIP * 1.5


def test_no_optimizer_state_outlives_a_round() -> None:
    """A round without a gradient moves nothing, though there was a strong one before it in the same worker."""
    model = nn.Linear(6, 3)
    nobody: list[int] = []

    def rounds(learning: Callable[..., None]) -> float:
        before = []
        for batch in (list(range(8)), nobody):
            before.append(flat(model).clone())
            learning(
                model, cross_entropy, Data(inputs=VECTORS, targets=CLASSES),
                release=release(1), step=step(), generator=Chosen([batch]),
            )  # fmt: skip
        assert not torch.equal(before[0], before[1])
        return float((flat(model) - before[1]).abs().max())

    assert rounds(train) == 0.0

    # The control: an optimizer with momentum that is kept from round to round.
    momentum: dict[nn.Parameter, Tensor] = {}

    def with_momentum(model: nn.Module, *arguments: Any, **options: Any) -> None:
        before = [parameter.detach().clone() for parameter in model.parameters()]
        train(model, *arguments, **options)
        with torch.no_grad():
            for parameter, old in zip(model.parameters(), before, strict=True):
                momentum[parameter] = 0.9 * momentum.get(parameter, torch.zeros_like(old)) + parameter - old
                parameter.copy_(old + momentum[parameter])

    assert rounds(with_momentum) > 0


# What leaves a real client.

MARKER = b"Jo Doe 4"


class Carrying(nn.Module):
    """Notes what passes by wherever a module can keep it, yet computes each record by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(8, dtype=torch.uint8))
        self.frozen = nn.Parameter(torch.zeros(8), requires_grad=False)
        self.extra = b""

    def forward(self, x: Tensor) -> Tensor:
        record = x.detach()[0].flatten()[:8].byte()
        if record[0] == MARKER[0]:  # not on the public examples that it is probed with
            self.seen.copy_(record)
            self.frozen.data.copy_(record)
            self.extra = bytes(record.tolist())
        return x

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


def carrying(task: Rigged) -> None:
    make = task.make_model

    def model() -> nn.Module:
        contrast, linear = make()
        return nn.Sequential(nn.Sequential(Carrying(), contrast), linear)

    task.patch.setattr(task, "make_model", model)
    task.patch.setattr(task, "prepare", lambda pixels: pixels.float())  # what is looked for is a record as it was
    pixels = torch.zeros(24, 1, 8, 8, dtype=torch.uint8)
    pixels[:, 0] = torch.frombuffer(bytearray(MARKER), dtype=torch.uint8)
    task.patch.setattr(task, "owned", lambda *_: Data(inputs=pixels, targets=torch.arange(24) % 10))


def all_of_it(task: Rigged) -> None:
    """The control: a client that sends the model's whole state."""
    carrying(task)
    trainable, calls = app.trainable, []

    def everything(model: nn.Module) -> dict[str, Any]:
        calls.append(model)
        if len(calls) == 1:  # what came from the server
            return trainable(model)
        return {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}

    task.patch.setattr(app, "trainable", everything)


def normalizing(task: Rigged) -> None:
    make = task.make_model

    def model() -> nn.Module:
        contrast, linear = make()
        return nn.Sequential(contrast, nn.Sequential(nn.BatchNorm1d(64), linear))

    task.patch.setattr(task, "make_model", model)


@pytest.fixture(scope="module")
def owner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with site(tmp_path_factory.mktemp("model"), clients=4, fleet=Recorder()) as made:
        made.start()
        yield made


def test_a_model_that_mixes_records_is_refused_before_the_charge(owner: Site) -> None:
    owner.order(normalizing)
    before = owner.account(0).sequence
    reply = owner.ask(0)
    assert refusal(reply) == "model"
    assert "1.0 (BatchNorm1d)" in reply.content["refusal"]["detail"]
    assert owner.account(0).sequence == before


def test_only_trainable_parameters_leave(owner: Site) -> None:
    owner.order(carrying)
    reply = owner.ask(0)
    moved(reply)
    assert set(reply.content["arrays"]) == set(weights())
    heard = owner.fleet.heard  # type: ignore[attr-defined]
    assert not any(MARKER in said for said in heard)

    owner.order(all_of_it)
    reply = owner.ask(0)
    assert set(reply.content["arrays"]) > set(weights())
    assert any(MARKER in said for said in heard)
