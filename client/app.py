"""One training message in, one reply out: a Flower ClientApp, run in a worker.

The order is the promise: the proposal is held against the owner's terms, the parameters against the client's own
model, the worst case is charged, and only then is the first record read.
"""

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from client import gpu, memory
from client.accounting import Release
from client.fingerprint import fingerprint, owner_key
from client.gradients import Unsupported, choose, clipped_sums, require
from client.input_check import check_inputs
from client.ledger import Head
from client.model_check import ModelRefused, check_model
from client.noise import SecureGenerator
from client.policy import Refused, accept
from client.program import Program
from client.training import Step, train
from common import messages
from common.compression import pack
from common.config import GradientMode, Partition, Policy
from common.messages import MessageError, Proposal, Reason, Standing
from common.tasks import Data, Task, TaskError, load_task
from common.tasks.inputs import Inputs

log = logging.getLogger(__name__)

PROBE_RECORDS = 4
MOST_TRIED = 64  # records, to find the fastest gradient mode


class Budget(Protocol):
    """The partition's ledger, as a worker reaches it. Each call raises `Refused` where the answer is no."""

    def reserve(self, message: str, release: Release, head: Head) -> None: ...
    def commit(self, data: str) -> Standing: ...  # the fingerprint of what was trained on
    def standing(self) -> Standing | None: ...


@dataclass(kw_only=True)
class Bench:
    """What a worker keeps between jobs: the task, its checked model, and the data of the last partition."""

    policy: Policy
    round: int = 0  # of the last proposal
    gradient_mode: GradientMode | None = None  # once it is known
    program: Program | None = None  # of gradient_mode compiled
    _plan: tuple[GradientMode, int] | None = None
    run: str = ""  # of the last proposal, once it is accepted
    _task: Task | None = None
    fingerprint: str = ""  # of the data of the last partition
    _resident: tuple[Partition, Data] | None = field(default=None, repr=False)

    def task(self) -> Task:
        """The policy's task, its model checked once: a model that mixes records has no per-record bound."""
        if self._task is None:
            try:
                task = load_task(self.policy.task, self.policy.data_root)
                inputs, public = Inputs.of(task), task.test_data()
                few = public.inputs[:PROBE_RECORDS]
                check_inputs(inputs, few)
                check_model(task.model(), task.loss, _made(inputs, few), public.targets[:PROBE_RECORDS])
            except ModelRefused as error:
                raise Refused(Reason.MODEL, str(error)) from None
            except TaskError as error:
                log.error("%s", error)  # it may name this machine's paths
                raise Refused(Reason.MODEL, f"the task {self.policy.task} cannot be loaded here") from None
            self._task = task
        return self._task

    def plan(self, device: torch.device) -> tuple[GradientMode, int]:
        """How to compute clipped sums, and of how many records at once. Found with public records, before a charge.

        The mode is the policy's or, tried once, the fastest. The number is the policy's, less where memory is short.
        """
        if self._plan is None:
            training, task = self.policy.training, self.task()
            model, bound = task.model().to(device).train(), float(self.policy.privacy.max_grad_norm)
            public = task.test_data()
            tried = min(self.policy.privacy.batch_size, training.physical_batch_size, MOST_TRIED)
            raw, targets = (part[:tried].to(device) for part in (public.inputs, public.targets))
            inputs = Inputs.of(task)
            if self.gradient_mode is None:
                made = _made(inputs, raw)
                self.gradient_mode = self._choose(model, made, targets)
            sums = clipped_sums(self.gradient_mode, model, task.loss, bound, self.program)
            try:
                size = self._fitting(lambda part, of: sums(_made(inputs, part), of), raw, targets)
            finally:
                sums.close()
            self._plan = self.gradient_mode, size
        return self._plan

    def _choose(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> GradientMode:
        wanted, loss = self.policy.training.gradient_mode, self.task().loss
        bound = float(self.policy.privacy.max_grad_norm)
        try:
            if wanted == "auto":
                choice = choose(model, loss, inputs, targets, bound)
                log.info("gradient_mode: %s (%s)", choice.mode, choice.why)
                return choice.mode
            require(wanted, model, loss, inputs, targets, bound, self.program)
        except Unsupported as error:
            other = "compiled" if wanted == "auto" else "auto"
            raise Refused(Reason.MODEL, f"training.gradient_mode: {wanted}: {error} (try {other})") from None
        return wanted

    def _fitting(self, passes: gpu.Pass, raw: Tensor, targets: Tensor) -> int:
        """How many records a pass may take at once; a partition's records take their room beside it."""
        training, records = self.policy.training, self.policy.privacy.records
        most = training.physical_batch_size
        if gpu.is_shared(raw.device):
            return gpu.rehearse(passes, raw, targets, most=most, records=records)
        return memory.rehearse(passes, raw, targets, most=most, records=records, workers=training.max_workers)

    def data(self, partition: Partition, device: torch.device) -> Data:
        """The partition's records on `device`. Called only after the charge."""
        if self._resident is None or self._resident[0] != partition:
            self._resident = None
            try:
                loaded = self.task().train_data(partition.index, partition.of)
            except Exception as error:
                # The text of the error may quote a record.
                raise Refused(Reason.DATA, f"the data cannot be read: {type(error).__name__}") from None
            if len(loaded.inputs) * self.policy.privacy.delta >= 1:
                raise Refused(Reason.DATA, "delta is not below 1/n for the data of this partition")
            self.fingerprint = fingerprint(loaded, self._owner_key())
            self._resident = partition, Data(inputs=loaded.inputs.to(device), targets=loaded.targets.to(device))
        return self._resident[1]

    def _owner_key(self) -> bytes:
        try:
            return owner_key(self.policy.client.state)
        except (OSError, ValueError) as error:
            log.error("%s", error)
            raise Refused(Reason.DATA, "the data of this partition cannot be recognized") from None


def client_app(bench: Bench, partition: Partition, budget: Budget) -> ClientApp:
    """The app that answers one message for `partition`."""
    app = ClientApp()

    @app.train()
    def answer(message: Message, _: Context) -> Message:
        try:
            content = train_round(message.content, message.metadata.message_id, bench, partition, budget)
        except Refused as refused:
            log.info("%s: refused, %s: %s", partition.name, refused.reason, refused.detail)
            content = messages.refusal(refused.reason, refused.detail, budget.standing())
        return Message(content, reply_to=message)

    return app


def train_round(content: RecordDict, message_id: str, bench: Bench, partition: Partition, budget: Budget) -> RecordDict:
    """The reply to a training request. Raises `Refused` before any record is read, or with the charge spent."""
    policy = bench.policy
    proposal, arrays = _parse(content)
    bench.round = proposal.round
    release = accept(proposal, policy)
    bench.run = proposal.run
    try:
        device = pick_device(policy.training.device)
        gpu.keep_to_share(device, policy.training)
        model = _load(bench.task().model, arrays).to(device)
        mode, physical = bench.plan(device)
    except (torch.OutOfMemoryError, torch.AcceleratorError) as error:
        # A context that cannot be made for want of memory is an error of the other kind, which only its text tells.
        if not isinstance(error, torch.OutOfMemoryError) and "out of memory" not in str(error):
            raise
        raise Refused(Reason.MEMORY, "the GPU has no room for the model (fewer max_workers, or wait)") from None
    budget.reserve(message_id, release, Head(sequence=proposal.anchor_sequence, hash=proposal.anchor_head))

    # Dropout and the like draw from torch: a fork must not repeat its parent's draws.
    torch.manual_seed(int.from_bytes(os.urandom(8)))
    started = time.monotonic()
    train(
        model,
        bench.task().loss,
        bench.data(partition, device),
        release=release,
        step=Step(
            max_grad_norm=float(policy.privacy.max_grad_norm),
            batch_size=policy.privacy.batch_size,
            physical_batch_size=physical,
            learning_rate=proposal.learning_rate,
            gradient_mode=mode,
            program=bench.program,
        ),
        generator=SecureGenerator(),
        inputs=Inputs.of(bench.task()),
    )
    noised = {name: value.detach().cpu().numpy() for name, value in trainable(model).items()}
    trained = pack(noised, lambda name: arrays[name].numpy(), proposal.compression)  # type: ignore[arg-type]
    log.info("%s: round %d trained in %.2f s", partition.name, proposal.round, time.monotonic() - started)
    return messages.update(trained, budget.commit(bench.fingerprint), weight=float(policy.training.weight))


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that travel, by name: no buffers, no frozen ones."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def pick_device(wanted: str) -> torch.device:
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(wanted)


def _made(inputs: Inputs, raw: Tensor) -> Tensor:
    """What the model takes in training of the public records `raw`."""
    return inputs.training(raw.clone(), inputs.draw(len(raw), raw.device))


def _parse(content: RecordDict) -> tuple[Proposal, ArrayRecord]:
    if set(content) - {messages.ARRAYS, messages.CONFIG}:
        raise Refused(Reason.POLICY, f"request: expected no records but {messages.ARRAYS} and {messages.CONFIG}")
    try:
        proposal = Proposal.from_record(content.get(messages.CONFIG))
    except MessageError as error:
        raise Refused(Reason.POLICY, f"request: {error}") from None
    arrays = content.get(messages.ARRAYS)
    if not isinstance(arrays, ArrayRecord):
        raise Refused(Reason.MODEL, "request: no arrays")
    return proposal, arrays


def _load(make_model: Callable[[], nn.Module], arrays: ArrayRecord) -> nn.Module:
    """The client's own model with the server's parameters: same names, shapes and types, all finite."""
    model = make_model()
    own = trainable(model)
    if set(arrays) != set(own):
        raise Refused(Reason.MODEL, f"parameters: expected exactly {sorted(own)}")
    for name, parameter in own.items():
        expected = parameter.detach().cpu().numpy()
        array = arrays[name]
        if array.dtype != str(expected.dtype) or tuple(array.shape) != expected.shape:
            raise Refused(Reason.MODEL, f"parameters: expected {name} as {expected.dtype} {list(expected.shape)}")
        try:
            value = np.ascontiguousarray(array.numpy())
        except Exception as error:
            raise Refused(Reason.MODEL, f"parameters: {name} cannot be read: {type(error).__name__}") from None
        if value.shape != expected.shape or value.dtype != expected.dtype or not np.isfinite(value).all():
            raise Refused(Reason.MODEL, f"parameters: expected {name} finite and of its announced shape")
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(value))
    return model
