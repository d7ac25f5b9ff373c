"""Memory on the CPU: what is free, how many records a pass then takes, and a real limit that is met in mid-step."""

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor, nn

from client import app, memory
from client.gradients import MODES
from client.gradients.hooks import Hooks
from client.memory import free_bytes, ran_out, rehearse
from client.policy import Refused
from client.training import train
from common.messages import Proposal, Reason, request
from common.tasks.digits import Digits
from tests.test_gpu import Untouched
from tests.test_inputs import policy
from tests.test_training import LOSS, RECORDS, Chosen, by_hand, data, flat, network, release, step

MB = 2**20
ALLOCATOR = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"

# What is free


def system(folder: Path, files: dict[str, str | int]) -> tuple[Path, Path]:
    for name, text in {"proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 8388608 kB\n", **files}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{text}\n")
    return folder / "proc", folder / "groups"


def v2(limit: str | int, use: int, files: int = 0) -> dict[str, str | int]:
    return {"memory.max": limit, "memory.current": use, "memory.stat": f"anon 5\ninactive_file {files}\nfile 7"}


def v1(limit: int, use: int, files: int = 0) -> dict[str, str | int]:
    return {
        "memory.limit_in_bytes": limit, "memory.usage_in_bytes": use,
        "memory.stat": f"inactive_file 3\ntotal_inactive_file {files}",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("groups", "member", "expected"),
    [
        ({}, "0::/", 8192),  # the machine's own
        ({"": v2("max", 5 * MB)}, "0::/", 8192),
        ({"": v2(900 * MB, 500 * MB)}, "0::/", 400),  # a container: its own group is the root that it sees
        ({"": v2(900 * MB, 500 * MB, files=100 * MB)}, "0::/", 500),  # what was read can be given up
        ({"a/b": v2("max", 300 * MB), "a": v2(700 * MB, 400 * MB)}, "0::/a/b", 300),  # the pod's limit, one further up
        ({"a/b": v2(MB, 2 * MB)}, "0::/a/b", 0),
        ({"memory": v1(2**63 - 4096, MB)}, "4:cpu,memory:/", 8192),
        ({"memory/x": v1(800 * MB, 600 * MB, files=50 * MB)}, "0::/\n4:memory:/x", 250),
        ({"memory": v1(800 * MB, 600 * MB)}, "4:memory:/docker/of-the-host", 200),  # a path of the host's
        ({"cpu": v1(MB, MB)}, "3:cpu:/", 8192),
    ],
)
def test_free_is_what_the_tightest_limit_leaves(
    groups: dict[str, dict[str, str | int]], member: str, expected: int, tmp_path: Path
) -> None:
    files: dict[str, str | int] = {"proc/self/cgroup": member}
    for group, content in groups.items():
        files |= {f"groups/{group}/{name}": text for name, text in content.items()}
    assert free_bytes(*system(tmp_path, files)) == expected * MB


def test_where_nothing_is_told_nothing_bounds(tmp_path: Path) -> None:
    assert free_bytes(tmp_path, tmp_path) > 2**60


def test_here_it_is_something() -> None:
    machine = 1024 * int(Path("/proc/meminfo").read_text().split("MemTotal:")[1].split()[0])
    assert 0 < free_bytes() < machine


# How many records


class Costly:
    """A pass that takes so many bytes of each record, and some of its own."""

    def __init__(self, per_record: int, constant: int = 0) -> None:
        self.per_record, self.constant = per_record, constant
        self.sizes: list[int] = []

    def __call__(self, inputs: Tensor, _: Tensor) -> None:
        self.sizes.append(len(inputs))
        torch.ones(self.constant + self.per_record * len(inputs), dtype=torch.uint8)


def fitting(passes: Callable[[Tensor, Tensor], object], *, most: int = 256, records: int = 10, workers: int = 1) -> int:
    inputs, targets = torch.zeros(5, 1000, dtype=torch.uint8), torch.zeros(5, dtype=torch.uint8)
    return rehearse(passes, inputs, targets, most=most, records=records, workers=workers)


@pytest.mark.parametrize(
    ("free", "workers", "records", "expected"),
    [
        (2000, 1, 10, 256),  # 256 MB are needed
        (200, 1, 10, 128),  # and of 200, 160 are used
        (200, 2, 10, 64),
        (200, 1, 70_000, 64),  # 70 MB of records lie beside it
        (30, 1, 10, 16),
        (8, 1, 10, 4),
        (2, 1, 10, 1),
    ],
)
def test_a_pass_takes_what_fits(
    free: float, workers: int, records: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda: int(free * MB))
    passes = Costly(MB)
    assert fitting(passes, workers=workers, records=records) == expected
    assert max(passes.sizes) <= 16  # found without a large pass


def test_the_part_that_does_not_grow_counts_at_small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda: 100 * MB)
    assert fitting(Costly(MB, constant=70 * MB)) == 8
    with pytest.raises(Refused, match="no memory for one record") as refused:
        fitting(Costly(MB, constant=90 * MB))
    assert refused.value.reason is Reason.MEMORY


def test_a_rehearsal_that_runs_out_of_memory_is_one_that_does_not_fit() -> None:
    def passes(inputs: Tensor, _: Tensor) -> None:
        if len(inputs) > 3:
            raise RuntimeError(ALLOCATOR)

    assert fitting(passes) == 2


def test_other_errors_of_a_rehearsal_stay_errors() -> None:
    def passes(*_: Tensor) -> None:
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        fitting(passes)


def test_without_the_kernels_word_the_policys_number_stands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "_PROC", tmp_path)
    assert fitting(Costly(MB)) == 256


def test_a_worker_plans_by_it_before_a_charge(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    terms = policy(Digits, tmp_path)
    monkeypatch.setattr(memory, "_used", lambda _passes, inputs, _targets: MB * len(inputs))
    monkeypatch.setattr(memory, "free_bytes", lambda: 200 * MB)
    _, size = app.Bench(policy=terms).plan(torch.device("cpu"))
    assert size == 64  # of 256, since two workers share 160 MB
    monkeypatch.setattr(memory, "free_bytes", lambda: 0)
    arrays = ArrayRecord({"1.weight": Array(torch.zeros(10, 64).numpy())})
    proposal = Proposal(task=terms.task, round=1, steps=1, learning_rate=1.0, anchor_sequence=0, anchor_head="")
    with pytest.raises(Refused) as refused:
        app.train_round(request(arrays, proposal), "m", app.Bench(policy=terms), terms.partitions[0], Untouched())
    assert refused.value.reason is Reason.MEMORY


# Memory that runs out in a step


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError(ALLOCATOR), True),
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("expected all tensors on one device"), False),
        (ValueError("DefaultCPUAllocator: can't allocate memory"), False),
    ],
)
def test_which_errors_are_want_of_memory(error: Exception, expected: bool) -> None:
    assert ran_out(error) is expected


def test_torch_says_it_in_these_words() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert ran_out(raised.value)


class Short(nn.Module):
    """A layer with memory for so many records, on the way forward or back."""

    def __init__(self, room: int, error: Exception, *, back: bool) -> None:
        super().__init__()
        self.room, self.error, self.back = room, error, back
        self.failures = 0

    def _check(self, tensor: Tensor) -> None:
        if len(tensor) > self.room:
            self.failures += 1
            raise self.error

    def forward(self, x: Tensor) -> Tensor:
        if self.back:
            x = x * 1
            if x.requires_grad:
                x.register_hook(self._check)
        else:
            self._check(x)
        return x


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("error", [RuntimeError(ALLOCATOR), MemoryError()])
@pytest.mark.parametrize("mode", MODES)
def test_memory_that_runs_out_in_a_layer_leaves_nothing_behind(mode: str, error: Exception, back: bool) -> None:
    batches = [list(range(RECORDS)), [3], [], [1, 5, 8, 20]]
    model = network()
    how = step(physical_batch_size=16, gradient_mode=mode)
    expected = by_hand(copy.deepcopy(model), data(), batches, how)
    layer = Short(3, error, back=back)
    tight = nn.Sequential(*list(model)[:2], layer, *list(model)[2:])
    train(tight, LOSS, data(), release=release(4), step=how, generator=Chosen(batches))
    assert layer.failures >= 2
    assert torch.allclose(flat(tight).double(), flat(expected), atol=2e-6)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 16, 25, 1000])
@pytest.mark.parametrize("mode", MODES)
def test_the_parts_change_nothing_about_a_step(mode: str, size: int) -> None:
    """Property: whatever fits, the sums of the drawn batch are those of the definition."""
    batches = [list(range(RECORDS)), [], [2, 3, 5, 7, 11]]
    model = network()
    how = step(physical_batch_size=size, gradient_mode=mode)
    expected = by_hand(copy.deepcopy(model), data(), batches, how)
    train(model, LOSS, data(), release=release(3), step=how, generator=Chosen(batches))
    assert torch.allclose(flat(model).double(), flat(expected), atol=2e-6)


def test_the_parts_test_notices_a_part_that_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: a part whose failure is forgotten, and not done again."""

    class Forgetful(Hooks):
        def __call__(self, inputs: Tensor, targets: Tensor) -> list[Tensor]:
            return super().__call__(inputs[:3], targets[:3])

    monkeypatch.setitem(MODES, "hooks", Forgetful)
    with pytest.raises(AssertionError):
        test_the_parts_change_nothing_about_a_step("hooks", 16)


# A real limit: a process that may have so much address space and no more

LIMITED = """
import json, resource, sys
import torch
torch.set_num_threads(1)
import logging
from client import memory
from client.gradients.hooks import Hooks
from client.training import train
from common.tasks import Data
from tests.test_memory import MB, wide
from tests.test_training import Chosen, LOSS, flat, release, step

logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
torch.manual_seed(1)
data = Data(inputs=torch.randn(64, 1000), targets=torch.randint(4, (64,)))

def trained(batches):
    model = wide()
    how = step(physical_batch_size=64)
    train(model, LOSS, data, release=release(len(batches)), step=how, generator=Chosen(batches))
    return flat(model).double()

trained([[0]])  # loads whatever is loaded in a first pass
taken = 1024 * memory._field(memory._PROC / "self/status", "VmSize:")
resource.setrlimit(resource.RLIMIT_AS, (taken + 200 * MB, resource.RLIM_INFINITY))
sums = Hooks(wide(), LOSS, 1.0)
most = memory.rehearse(sums, data.inputs, data.targets, most=64, records=0, workers=1)
sums.close()
batches = [list(range(64)), list(range(10, 40))]
tight = trained(batches)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print("the limit is gone", file=sys.stderr)
free = trained(batches)
print(json.dumps({"most": most, "apart": float((tight - free).norm()), "norm": float(free.norm())}))
"""


def wide() -> nn.Module:
    """4 MB of gradient for each record: 64 need 256 MB by hooks."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1000, 1000), nn.Tanh(), nn.Linear(1000, 4))


def test_a_real_limit_halves_the_pass_and_changes_nothing_else() -> None:
    done = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    under, _, after = done.stderr.partition("the limit is gone")
    assert "memory ran out: goes on with smaller passes" in under
    assert "memory ran out" not in after
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["apart"] < 1e-6 * found["norm"]
    assert 1 <= found["most"] <= 32  # a rehearsal would have found it before
