"""The host's side of the workers: at most `max_workers` jobs at a time, each on a forked process."""

import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from socket import socket
from typing import Any

from client.dialogue import Ask, Done, Job
from client.fleet import Inbound
from client.program import Program
from client.zygote import COMPILE, fork_worker
from common.config import GradientMode, Partition

log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.5  # whether to stop, while the step is compiled


class WorkerDied(Exception):
    """The worker's process ended in mid-job."""


class CannotCompile(Exception):
    """There is no compiled step to be had."""


class ZygoteDied(Exception):
    """No new worker can be had: this process must be started again."""


class Workers:
    """A pool that forks on demand and reuses who is idle, best one that served the same partition."""

    def __init__(self, zygote: socket, max_workers: int) -> None:
        self._zygote = zygote
        self._program: Program | None = None
        self._slots = threading.BoundedSemaphore(max_workers)
        self._lock = threading.Lock()
        self._idle: list[tuple[str, Connection]] = []  # (partition last served, connection)
        self._gpu_memory: dict[Connection, int] = {}
        self.deaths = 0
        self.gradient_mode: GradientMode | None = None  # what a worker chose, so that the next one need not try

    def gpu_memory_bytes(self) -> int:
        """Reserved by the workers that live."""
        with self._lock:
            self._drop_the_dead()
            return sum(self._gpu_memory.values())

    def compile(self, folder: Path, stop: threading.Event) -> None:
        """Has the step of the policy's task compiled into `folder`, for all workers; gives up when `stop` is set.

        Raises:
            CannotCompile: with the reason, one line.
        """
        log.info("compiles the training step, which takes a minute or so")
        try:
            with fork_worker(self._zygote, COMPILE) as compiler:
                compiler.send(folder)
                while not compiler.poll(_LOOK_SECONDS):
                    if stop.is_set():
                        return
                said = compiler.recv()
        except (EOFError, OSError):
            raise CannotCompile("the process that compiles has ended") from None
        if not isinstance(said, Program):
            raise CannotCompile(said)
        self._program = said

    def job(self, partition: Partition, inbound: Inbound) -> Job:
        """A message with what a worker needs to know of earlier ones."""
        return Job(partition=partition, inbound=inbound, gradient_mode=self.gradient_mode, program=self._program)

    def run(self, job: Job, answer: Callable[[Ask], Any]) -> Done:
        """Runs one job; `answer` serves the worker's questions.

        Raises:
            WorkerDied: the job may have been charged; it is not tried again once a question was asked.
            ZygoteDied: no worker could be forked.
        """
        with self._slots:
            while True:
                worker, fresh = self._take(job.partition.name)
                asked = False
                try:
                    worker.send(job)
                    while isinstance(said := worker.recv(), Ask):
                        asked = True
                        worker.send(answer(said))
                except (EOFError, OSError):
                    self._discard(worker)
                    if fresh or asked:
                        self.deaths += 1
                        raise WorkerDied from None
                    continue  # it had just ended, being idle: nothing was lost
                except BaseException:
                    self._discard(worker)
                    raise
                self.gradient_mode = said.gradient_mode
                with self._lock:
                    self._idle.append((job.partition.name, worker))
                    self._gpu_memory[worker] = said.gpu_memory_bytes
                return said

    def _take(self, partition: str) -> tuple[Connection, bool]:
        with self._lock:
            self._drop_the_dead()
            for index in [i for i, (name, _) in enumerate(self._idle) if name == partition] or range(len(self._idle)):
                return self._idle.pop(index)[1], False
        try:
            return fork_worker(self._zygote), True
        except OSError as error:
            raise ZygoteDied(str(error)) from None

    def _drop_the_dead(self) -> None:
        for entry in list(self._idle):
            if entry[1].poll():  # an idle worker says nothing: this is its end
                self._idle.remove(entry)
                self._close(entry[1])

    def _discard(self, worker: Connection) -> None:
        with self._lock:
            self._close(worker)

    def _close(self, worker: Connection) -> None:
        self._gpu_memory.pop(worker, None)
        with suppress(OSError):
            worker.close()
