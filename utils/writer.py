"""Writing while the computation goes on: copies of tensors on the host, and one thread that writes them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch
from torch import Tensor


class HostCopy:
    """Tensors as they are now, in nested dicts, lists and tuples; `get` gives the copies, on the host.

    A GPU copies into pinned memory by itself, after what it has still to compute, and whoever makes the copy does not
    wait for it: `get` does.
    """

    def __init__(self, tree: Any) -> None:
        self._device: torch.device | None = None
        self._tree = self._copied(tree)
        self._copied_by: torch.cuda.Event | None = None
        if self._device is not None:
            self._copied_by = torch.cuda.Event(blocking=True)
            self._copied_by.record(torch.cuda.current_stream(self._device))

    def get(self) -> Any:
        if self._copied_by is not None:
            self._copied_by.synchronize()
        return self._tree

    def _copied(self, tree: Any) -> Any:
        if isinstance(tree, dict):
            return {name: self._copied(part) for name, part in tree.items()}
        if isinstance(tree, (list, tuple)):
            return type(tree)(self._copied(part) for part in tree)
        return self._on_host(tree.detach()) if isinstance(tree, Tensor) else tree

    def _on_host(self, tensor: Tensor) -> Tensor:
        if tensor.device.type != "cuda":
            return tensor.to("cpu", copy=True)
        self._device = tensor.device
        return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


class Writer:
    """One thread that does jobs in the order in which they come, as a context: all are done when it ends.

    waiting   jobs that may wait for the one that is being done; who brings another waits himself, which bounds the
              memory that they hold

    A job that fails is the last that is done, and its error is raised to whoever brings the next, or at the end, there
    unless another error is under way. So what is on the disk is what a first few jobs have left, in order.
    """

    def __init__(self, waiting: int = 1) -> None:
        self._waiting, self._jobs, self._failed = waiting, deque[Future[None]](), False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="writer")

    def submit(self, job: Callable[[], None]) -> None:
        while self._jobs and (self._jobs[0].done() or len(self._jobs) > self._waiting):
            self._jobs[0].result()
            self._jobs.popleft()
        self._jobs.append(self._thread.submit(self._do, job))

    def _do(self, job: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            job()
        except BaseException:
            self._failed = True
            raise

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        wait(self._jobs)
        self._thread.shutdown()
        if kind is None:
            for job in self._jobs:
                job.result()
