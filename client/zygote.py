"""The processes that train: a zygote that has imported everything once, and the workers it forks.

Invariant: the zygote has one thread, has touched no GPU and has opened no connection, so a fork of it is whole. It is
forked by the host before the host starts a thread or opens a channel. Each process dies with its parent.
"""

import gc
import importlib
import logging
import os
import select
import signal
import socket
import sys
import threading
import traceback
import warnings
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from common.code_pages import unmap_code
from common.config import Policy
from common.process import die_with_parent

log = logging.getLogger(__name__)

# Children of one parent with several BLAS or OpenMP threads hang in their first matrix product; Arrow's allocator
# starts a thread; asking for a GPU must not create a context that the children would share.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
}


WORK, COMPILE = b"work", b"compile"  # what a forked process is to do


def start_zygote(policy: Policy) -> socket.socket:
    """Forks the zygote; returns the socket through which `fork_worker` asks it. Call before any thread starts."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    parent = os.getpid()
    if os.fork() == 0:
        ours.close()
        _run_child(parent, _zygote, policy, theirs)
    theirs.close()
    return ours


def fork_worker(zygote: socket.socket, work: bytes = WORK) -> Connection:
    """A connection to a new worker, or to the one that compiles. Raises OSError when the zygote is gone."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with theirs:
        socket.send_fds(zygote, [work], [theirs.fileno()])
    return Connection(ours.detach())


def wait_for_end(zygote: socket.socket) -> None:
    """Returns once the zygote has ended, whatever it is asked for meanwhile."""
    end = select.poll()
    end.register(zygote, 0)  # POLLHUP is always told, and only the zygote holds the other end
    end.poll()


def _zygote(policy: Policy, requests: socket.socket) -> None:
    os.environ.update(_ENVIRONMENT)
    _say_no_values()
    importlib.import_module("client.lean_opacus")
    targets = {  # torch, opacus, flwr and the worker's own code
        WORK: importlib.import_module("client.job").serve,
        COMPILE: importlib.import_module("client.compiler").serve,
    }
    _preload(policy.task)
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        log.warning("the zygote has %d threads, expected 1: its workers may hang", threads)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # workers are reaped by the kernel
    gc.collect()
    gc.freeze()  # keeps the pages of what is loaded shared between workers
    unmap_code()
    log.info("ready to fork workers")
    parent = os.getpid()
    while True:
        word, fds, _, _ = socket.recv_fds(requests, 16, 1)
        if not word:
            return  # the host is gone
        (fd,) = fds
        if os.fork() == 0:
            requests.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _run_child(parent, targets[word], policy, Connection(fd))
        os.close(fd)


def _preload(task: str) -> None:
    """Imports what the task will need: seconds in each worker, once here. What is wrong with it, a worker will say."""
    from common.tasks import SHIPPED, TaskError, load_task  # numpy's threads: not before the environment is set

    if task in SHIPPED and task.endswith("_dirichlet"):
        importlib.import_module("flwr_datasets.partitioner")
    with suppress(TaskError):
        load_task(task, Path())


def _run_child(parent: int, target: Any, *arguments: Any) -> None:
    """Runs `target` as this process's whole life: nothing of the parent's stack is unwound or flushed."""
    status = 1
    try:
        die_with_parent()
        if os.getppid() != parent:  # it died before the line above
            return
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the host ends its children
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        target(*arguments)
        status = 0
    except BaseException as error:
        _log_error(error)
    finally:
        os._exit(status)


def _say_no_values() -> None:
    """What Python prints by itself of an error in a thread or a finalizer, or of a warning, may quote a record."""

    def show_warning(_: Any, category: type[Warning], filename: str, lineno: int, *__: Any) -> None:
        log.warning("%s at %s:%s", category.__name__, filename, lineno)

    threading.excepthook = lambda args: _log_error(args.exc_value)
    sys.unraisablehook = lambda args: _log_error(args.exc_value)
    warnings.showwarning = show_warning  # type: ignore[assignment]


def _log_error(error: BaseException | None) -> None:
    """The text of an error may quote a record: only its type and place are written."""
    trace = traceback.extract_tb(error.__traceback__) if error else None
    place = f"{trace[-1].filename}:{trace[-1].lineno}" if trace else "an unknown place"
    log.error("%s at %s", type(error).__name__, place)
