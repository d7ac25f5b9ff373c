"""Clipped sums, however they are computed: equal to one record at a time by autograd, and in bound for any record."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from client.gradients import MODES, Unsupported, choose, layers, require, trainable
from client.gradients.book_keeping import BookKeeping
from client.gradients.columns import Columns, Windows, Written
from common.config import GradientMode

LOSS = nn.CrossEntropyLoss(reduction="none")
CLASSES = 3


def alone(model: nn.Module, inputs: Tensor, targets: Tensor, bound: float) -> Tensor:
    """The oracle: each record's gradient by plain autograd in float64, clipped, summed, flat."""
    model = copy.deepcopy(model).double()
    if inputs.is_floating_point():
        inputs = inputs.double()
    parameters = trainable(model)
    total = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
    for i in range(len(inputs)):
        gradients = torch.autograd.grad(LOSS(model(inputs[i : i + 1]), targets[i : i + 1]).sum(), parameters)
        gradient = torch.cat([g.flatten() for g in gradients])
        total += gradient * min(1.0, bound / (float(gradient.norm()) + 1e-6))
    return total


def sums(mode: GradientMode, model: nn.Module, inputs: Tensor, targets: Tensor, bound: float) -> Tensor:
    computed = MODES[mode](model, LOSS, bound)
    try:
        computed(inputs, targets)  # a second pass is as good as the first
        return torch.cat([part.flatten() for part in computed(inputs, targets)])
    finally:
        computed.close()


def pictures(dimensions: int, batch: int) -> Tensor:
    return torch.randn(batch, 4, *[9, 7, 6][:dimensions])


class Residual(nn.Module):
    """What cannot be a Sequential."""

    def __init__(self, *inner: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(*inner)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


@st.composite
def models(draw: st.DrawFn) -> tuple[nn.Module, Callable[[int], Tensor]]:
    """A random model of the layers that book_keeping knows, and a maker of records for it."""
    dimensions = draw(st.integers(0, 3))
    activation = draw(st.sampled_from([nn.Tanh, nn.ReLU, nn.GELU]))
    if dimensions == 0:  # words
        width = draw(st.sampled_from([4, 8]))
        body: list[nn.Module] = [nn.Embedding(11, width)]
        if draw(st.booleans()):
            body += [Residual(nn.LayerNorm(width), nn.Linear(width, width, bias=draw(st.booleans())), activation())]
        body += [nn.Flatten(), nn.Linear(5 * width, CLASSES)]
        return nn.Sequential(*body), lambda batch: torch.randint(11, (batch, 5))
    convolution = [nn.Conv1d, nn.Conv2d, nn.Conv3d][dimensions - 1]
    normal = [nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d][dimensions - 1]
    layer = convolution(
        4, 8, draw(st.integers(1, 3)), stride=draw(st.integers(1, 2)), padding=draw(st.integers(0, 2)),
        dilation=draw(st.integers(1, 2)), groups=draw(st.sampled_from([1, 2, 4])), bias=draw(st.booleans()),
    )  # fmt: skip
    body = [layer, activation()]
    if draw(st.booleans()):
        body.append(nn.GroupNorm(2, 8))
    body.append(draw(st.sampled_from([nn.Identity(), normal(8, affine=True)])))
    if draw(st.booleans()):
        body.append(convolution(8, 6, 1))
    body.append(nn.Flatten())
    with torch.no_grad():
        features = nn.Sequential(*body)(pictures(dimensions, 2)).shape[1]
    body.append(nn.Linear(features, CLASSES))
    if draw(st.booleans()):  # frozen, as for fine-tuning
        layer.weight.requires_grad_(False)
    return nn.Sequential(*body), lambda batch: pictures(dimensions, batch)


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=25, deadline=None)
@given(
    made=models(),
    batch=st.sampled_from([0, 1, 2, 7]),
    bound=st.sampled_from([1e-3, 0.5, 1e3]),
    kind=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**31),
)
def test_sums_are_those_of_one_record_at_a_time(
    mode: GradientMode,
    made: tuple[nn.Module, Callable[[int], Tensor]],
    batch: int,
    bound: float,
    kind: torch.dtype,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    model, make = made
    model = copy.deepcopy(model).to(kind)
    inputs, targets = make(batch), torch.randint(CLASSES, (batch,))
    if inputs.is_floating_point():
        inputs = inputs.to(kind)
    expected = alone(model, inputs, targets, bound)
    found = sums(mode, model, inputs, targets, bound)
    assert found.dtype == kind
    assert (found.double() - expected).norm() <= 1e-3 * expected.norm() + 1e-7
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("few", [1, 10**9])
def test_both_ways_to_a_norm_agree(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer is summed whole or by inner products, whichever is less work: here each is forced in turn."""

    class Forced(layers.Product):
        def __init__(self, layer: nn.Module, columns: Columns, gradients: Tensor) -> None:
            super().__init__(layer, columns, gradients)
            self._whole = None if few == 1 else columns.products(gradients)

    monkeypatch.setattr(layers, "Product", Forced)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(210, CLASSES))
    inputs, targets = pictures(2, 5), torch.randint(CLASSES, (5,))
    for bound in (0.1, 1e3):
        expected = alone(model, inputs, targets, bound)
        found = sums("book_keeping", model, inputs, targets, bound)
        assert (found.double() - expected).norm() <= 1e-4 * expected.norm()


class Cancelling(nn.Module):
    """A server's parameters for which a record's two places have huge gradients that cancel but for a trifle."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64, bias=False)
        self.scale = 1e6

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x)  # [batch, places, 64]
        half = out.shape[1] // 2
        return self.scale * (out[:, :half].sum(1) - out[:, half:].sum(1))


class CancellingConvolution(Cancelling):
    """The same by a convolution, whose kernel sees two neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(Turned(), nn.Conv1d(64, 64, 2, stride=2, bias=False), Turned())


class Turned(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mT


def cancelling(batch: int, places: int) -> Tensor:
    half = torch.randn(batch, places // 2, 64)
    return torch.cat([half, half * (1 + 1e-7 * torch.randn_like(half))], 1)


@pytest.mark.parametrize("made", [Cancelling, CancellingConvolution])
@pytest.mark.parametrize("mode", MODES)
def test_a_record_adds_no_more_than_the_bound_though_its_terms_cancel(
    mode: GradientMode, made: type[Cancelling]
) -> None:
    torch.manual_seed(3)
    model, bound = made(), 1.0
    targets = torch.zeros(4, dtype=torch.long)
    inputs = cancelling(4, 8)
    with_all = sums(mode, model, inputs, targets, bound).double()
    for i in range(4):
        others = [j for j in range(4) if j != i]
        without = sums(mode, model, inputs[others], targets[others], bound).double()
        assert (with_all - without).norm() <= bound * (1 + 1e-3)


def test_norms_in_float32_would_let_it_add_many_times_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: inner products without float64, and no account of what rounding adds to the sum."""

    def naive(self: layers.Product) -> layers.Norms:
        a, g = self._columns._columns, self._gradients  # type: ignore[attr-defined]
        return layers.Norms(squared=((a.mT @ a) * (g.mT @ g)).sum((1, 2, 3)).clamp(min=0).double())

    monkeypatch.setattr(layers.Product, "norms", naive)
    torch.manual_seed(3)
    worst = 0.0
    for _ in range(20):
        inputs, targets = cancelling(1, 8), torch.zeros(1, dtype=torch.long)
        worst = max(worst, float(sums("book_keeping", Cancelling(), inputs, targets, 1.0).norm()))
    assert worst > 2.0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [math.inf, math.nan, 1e30])
def test_a_record_whose_gradient_is_not_finite_counts_as_zero(mode: GradientMode, value: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.GroupNorm(2, 6), nn.Flatten(), nn.Linear(210, CLASSES))
    inputs, targets = pictures(2, 5), torch.randint(CLASSES, (5,))
    inputs[2] = value
    others = [0, 1, 3, 4]
    expected = alone(model, inputs[others], targets[others], 0.5)
    found = sums(mode, model, inputs, targets, 0.5)
    assert found.isfinite().all()
    if not math.isfinite(value):
        assert (found.double() - expected).norm() <= 1e-4 * expected.norm()
    else:  # it may count, but not for more than its bound
        assert (found.double() - expected).norm() <= 0.5 * (1 + 1e-3)


def test_layers_that_work_in_place_are_no_obstacle_to_book_keeping() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(210, CLASSES))
    inputs, targets = pictures(2, 5), torch.randint(CLASSES, (5,))
    expected = alone(model, inputs, targets, 0.5)
    model[1] = nn.ReLU(inplace=True)
    found = sums("book_keeping", model, inputs, targets, 0.5)
    assert (found.double() - expected).norm() <= 1e-5 * expected.norm()


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(CLASSES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(CLASSES, CLASSES), nn.Linear(CLASSES, CLASSES)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))


class Overwritten(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(CLASSES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        y = self.layer(x)
        x.mul_(2)
        return x + y


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (Twice(), "Linear 'layer' is called twice"),
        (Scaled(), r"the model itself \(Scaled\): no rule"),
        (Tied(), "Linear 'two' shares a parameter with Linear 'one'"),
        (Overwritten(), "Linear 'layer': its input was changed in place"),
        (nn.Sequential(nn.Bilinear(3, 3, 3)), "Bilinear '0': no rule"),
    ],
)
def test_what_book_keeping_cannot_do_is_refused_by_name(model: nn.Module, text: str) -> None:
    inputs, targets = torch.randn(4, CLASSES), torch.zeros(4, dtype=torch.long)
    with pytest.raises(Unsupported, match=text):
        require("book_keeping", model, LOSS, inputs, targets, 1.0)


@pytest.mark.parametrize("model", [Twice(), Tied()])
def test_auto_then_stays_with_hooks_and_says_why(model: nn.Module) -> None:
    choice = choose(model, LOSS, torch.randn(8, CLASSES), torch.zeros(8, dtype=torch.long), 1.0)
    assert choice.mode == "hooks"
    assert "book_keeping: Linear" in choice.why


def test_auto_takes_the_faster_way_and_leaves_the_model_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(800, 900), nn.Tanh(), nn.Linear(900, CLASSES))  # hooks make 64 of 3 MB
    inputs, targets = torch.randn(64, 800), torch.zeros(64, dtype=torch.long)
    before, state = copy.deepcopy(model), torch.random.get_rng_state()
    choice = choose(model, LOSS, inputs, targets, 1.0)
    assert choice.mode == "book_keeping"
    assert torch.equal(state, torch.random.get_rng_state())
    assert not [hook for module in model.modules() for hook in (*module._forward_hooks, *module._backward_hooks)]
    for mine, theirs in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert mine.grad is None
        assert mine.requires_grad


def test_a_way_that_computes_something_else_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    real = BookKeeping.__call__
    monkeypatch.setattr(BookKeeping, "__call__", lambda self, x, y: [1.1 * part for part in real(self, x, y)])
    model = nn.Sequential(nn.Linear(800, 900), nn.Tanh(), nn.Linear(900, CLASSES))
    choice = choose(model, LOSS, torch.randn(64, 800), torch.zeros(64, dtype=torch.long), 1.0)
    assert choice.mode == "hooks"
    assert "book_keeping: other sums than hooks" in choice.why


@pytest.mark.parametrize("mode", MODES)
def test_memory_that_runs_out_in_a_pass_leaves_nothing_behind(mode: GradientMode) -> None:
    torch.manual_seed(0)
    calls = 0

    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            if calls == 1:
                raise torch.OutOfMemoryError("none left")
            return x

    model = nn.Sequential(nn.Linear(6, 6), Fails(), nn.Linear(6, CLASSES))
    inputs, targets = torch.randn(5, 6), torch.randint(CLASSES, (5,))
    computed = MODES[mode](model, LOSS, 0.5)
    with pytest.raises(torch.OutOfMemoryError):
        computed(torch.randn(4, 6), torch.zeros(4, dtype=torch.long))
    found = torch.cat([part.flatten() for part in computed(inputs, targets)])
    computed.close()
    expected = alone(model, inputs, targets, 0.5)
    assert (found.double() - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("writing", [0, 10**9])
@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2), (11,)),
        (nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(2, 1), dilation=(2, 1)), (9, 8)),
        (nn.Conv2d(4, 8, 3, padding="same", padding_mode="circular", groups=4), (5, 6)),
        (nn.Conv3d(2, 4, (2, 3, 1), stride=(2, 1, 1), padding=1), (4, 5, 3)),
    ],
)
def test_the_columns_of_a_convolution_are_those_written_out(
    layer: nn.Module, size: tuple[int, ...], writing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products, inner products and sums, by the layer's own arithmetic in float64."""
    monkeypatch.setattr("client.gradients.columns._WRITING", writing)
    monkeypatch.setattr("client.gradients.columns._CACHE_BYTES", 3000)  # two records or so at a time
    torch.manual_seed(0)
    layer = layer.double()
    inputs = torch.randn(5, layer.in_channels, *size, dtype=torch.float64)  # type: ignore[arg-type]
    outputs = layer(inputs)
    gradients = torch.randn_like(outputs)
    columns = Windows(layer, inputs, outputs.shape[2:])  # type: ignore[arg-type]
    batch, groups, _, places = columns.shape
    each = torch.stack([
        torch.autograd.grad(layer(x[None]), layer.weight, g[None])[0] for x, g in zip(inputs, gradients, strict=True)
    ])  # fmt: skip
    flat = gradients.reshape(batch, groups, -1, places)
    assert torch.allclose(columns.products(flat).reshape(each.shape), each)
    written = Written(columns._written())
    assert written.shape == columns.shape
    assert torch.allclose(columns.inner_products(), written.inner_products())
    used = torch.tensor([True, True, False, True, True])
    inputs[2], flat[2] = math.nan, 0.0
    columns = Windows(layer, inputs, outputs.shape[2:])  # type: ignore[arg-type]
    assert torch.allclose(columns.summed(flat, used).reshape(each[0].shape), each[used].sum(0))
