"""The processes of one run: started by torchrun, they share the work and end as one would have.

    torchrun --nproc_per_node 4 distill.py --method dimefm ...

Only the first one writes files and speaks. When one of them ends before its time, the others end too, and whichever
notices first says so in one line.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from utils.errors import Elsewhere, Lost, UserError, first_line

_LOST = (
    "a process of this run ended before its time (killed, or out of memory?); --resume goes on from the last checkpoint"
)


# One process may train the last network of a table for hours while the others wait for its score. Nobody waits in vain:
# the sockets of a process that is gone are closed, which the others notice at once.
_PATIENCE = timedelta(days=7)

Item = TypeVar("Item")


@dataclass(frozen=True)
class Ranks:
    """The processes of one run, and which of them this is. Alone, every method does the obvious and nothing more.

    local   which of its machine's processes this is
    """

    device: torch.device
    rank: int = 0
    world: int = 1
    local: int = 0
    _store: Any = None  # in which all can leave a word

    @property
    def first(self) -> bool:
        """Whether it is this one that writes and speaks."""
        return self.rank == 0

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """What is found ready, or else made, on disk: the first process runs the block before the others do; then the
        first of every other machine, which may have a disk of its own; then all that are left. The block may not share
        anything among them; an error in it ends them all."""
        turn = 0 if self.first else 1 if self.local == 0 else 2
        for _ in range(turn):
            self.all(None)
        yield
        for _ in range(turn, 2):
            self.all(None)

    def part(self, size: int, flag: str) -> slice:
        """Where this process's share of `size` rows lies; UserError naming `flag` where they cannot be shared."""
        if size % self.world:
            raise UserError(f"{flag} {size} cannot be shared by {self.world} processes; give a multiple of them")
        share = size // self.world
        return slice(self.rank * share, (self.rank + 1) * share)

    def gather(self, rows: Tensor, grad: bool = False) -> Tensor:
        """The rows (B, ...) of every process, in order (world · B, ...); all must give as many.

        grad   gradients flow back, but to this process's own rows only: summed over all processes (`add_`), those of
               the weights are what one process would have found
        """
        if self.world == 1:
            return rows
        found = rows.new_empty(self.world * len(rows), *rows.shape[1:])
        with _together():
            _meet(rows.device)
            dist.all_gather_into_tensor(found, rows.detach().contiguous())
        if grad:
            found[self.rank * len(rows) : (self.rank + 1) * len(rows)] = rows
        return found

    def add_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor, in place, by its sum over all processes: the same everywhere, to the bit."""
        if self.world > 1:
            self._at_once(tensors, dist.all_reduce)

    def copy_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor, in place, by the first process's."""
        if self.world > 1:
            self._at_once(tensors, lambda joined: dist.broadcast(joined, 0))

    def _at_once(self, tensors: Sequence[Tensor], work: Any) -> None:
        """Do `work` on one long vector of each type of number rather than on hundreds of short ones."""
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            some = [tensor for tensor in tensors if tensor.dtype == dtype]
            joined = torch.cat([tensor.detach().reshape(-1) for tensor in some])
            with _together():
                _meet(joined.device)
                work(joined)
            for tensor, part in zip(some, joined.split([tensor.numel() for tensor in some]), strict=True):
                tensor.detach().copy_(part.view_as(tensor))

    def most(self, number: int) -> int:
        """The largest of all processes' numbers."""
        if self.world == 1:
            return number
        found = torch.tensor(number)
        with _together():
            dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def broadcast(self, value: Any = None) -> Any:
        """The first process's value, a plain one."""
        if self.world == 1:
            return value
        box = [value]
        with _together():
            dist.broadcast_object_list(box, 0)
        return box[0]

    def all(self, value: Any) -> list[Any]:
        """Every process's value, a plain one, in their order."""
        found: list[Any] = [value] * self.world
        if self.world > 1:
            with _together():
                dist.all_gather_object(found, value)
        return found

    def same(self, value: Any) -> bool:
        """Whether all processes have this same value, a plain one."""
        return all(other == value for other in self.all(value))

    def share(self, items: Sequence[Item], what: str) -> Iterator[Item]:
        """The items in order, each given to one of the processes, the next that asks, so that nobody waits for a slower
        one; `what` names this sharing out, of which a run may have several."""
        if self.world == 1:
            yield from items
            return
        while True:
            with _together():
                place = self._store.add(f"share {what}", 1) - 1
            if place >= len(items):
                return
            yield items[place]


ALONE = Ranks(torch.device("cpu"))  # where the device makes no difference


def one_process(what: str) -> None:
    """UserError, told by one of them, where several processes were started for `what`, which is one's work."""
    if "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        if not speaks():
            raise Elsewhere
        raise UserError(f"{what} is the work of one process, and each would write the same files; leave out torchrun")


def neighbours() -> int:
    """How many processes of this run there are on this machine."""
    count = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(int(count), 1) if count.isdigit() else 1


def speaks() -> bool:
    """Whether this process is the one to say what all would say, told before they are joined."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def open_ranks(device: torch.device, local_rank: int = -1) -> Iterator[Ranks]:
    """The processes that torchrun started, joined while the block runs; without torchrun, this one alone.

    device      `cuda` becomes this process's own GPU
    local_rank  what an old launcher gave as a flag (-1: nothing); UserError where the environment says otherwise

    Of errors that end several processes one is told, the first; the others raise Elsewhere, which says nothing.
    """
    rank, world, local = _environment(local_rank)
    if world == 1:
        yield Ranks(device)
        return
    device = _own(device, local)
    with ExitStack() as stack:
        if rank:
            stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w", encoding="utf-8"))))
        stack.enter_context(_ended_by_signal())
        store = _join(rank, world, device)
        try:
            yield Ranks(device, rank, world, local, store)
        except (Exception, KeyboardInterrupt) as error:
            if isinstance(error, Elsewhere) or not _tells(store):
                raise Elsewhere from error
            raise
        finally:
            # After a failure the GPUs' group would wait for the one that is gone; the process ends anyway.
            if device.type != "cuda" or sys.exc_info()[0] is None:
                dist.destroy_process_group()


def _environment(local_rank: int) -> tuple[int, int, int]:
    """Rank, number of processes and rank on this machine, as torchrun notes them."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    found = [os.environ.get(name) for name in names]
    if found[0] is None or found[1] is None:
        if local_rank >= 0:
            raise UserError(f"--local_rank {local_rank} needs torchrun; start as torchrun --nproc_per_node N ...")
        return 0, 1, 0
    try:
        rank, world, local = (int(value or 0) for value in found)
    except ValueError:
        said = ", ".join(f"{name}={value}" for name, value in zip(names, found, strict=True))
        raise UserError(f"{said} are no process numbers; unset them, or start with torchrun") from None
    if not 0 <= rank < world:
        raise UserError(f"RANK={rank} is not one of WORLD_SIZE={world} processes; unset them, or start with torchrun")
    if local_rank not in (-1, local):
        raise UserError(f"--local_rank {local_rank} is not torchrun's LOCAL_RANK={local}; leave the flag out")
    return rank, world, local


def _own(device: torch.device, local: int) -> torch.device:
    """This process's own device of the kind."""
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise UserError(f"--device {device} is for one process; give --device cpu or cuda, or do without torchrun")
    if device.index is not None:
        raise UserError(f"--device {device} is one GPU for several processes; give --device cuda")
    if local >= torch.cuda.device_count():
        raise UserError(
            f"process {local} of this machine finds {torch.cuda.device_count()} GPUs; give --nproc_per_node no more"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def _join(rank: int, world: int, device: torch.device) -> dist.Store:
    """Meet the others; the store in which all can leave a word."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        store, _, _ = next(dist.rendezvous("env://", rank, world))
        meeting = {"store": dist.PrefixStore("run", store), "rank": rank, "world_size": world}
        dist.init_process_group(backend, timeout=_PATIENCE, **meeting)
    except (ValueError, RuntimeError) as error:
        reason = first_line(error)
        raise UserError(f"the {world} processes do not find each other ({reason}); start them with torchrun") from None
    return store


def _tells(store: dist.Store) -> bool:
    """Whether this process is the first to tell of a failure, as far as anyone can know."""
    try:
        return store.add("told", 1) == 1
    except RuntimeError:  # the store's keeper is gone, and can have told nothing
        return True


def _meet(device: torch.device) -> None:
    """Wait until all are here, by sockets: NCCL itself would not notice that one is gone, and never return."""
    if device.type == "cuda":
        dist.all_reduce(torch.zeros(()))


@contextmanager
def _together() -> Iterator[None]:
    """What all processes do at once; Lost where one of them is gone."""
    try:
        yield
    except RuntimeError as error:
        raise Lost(_LOST) from error


@contextmanager
def _ended_by_signal() -> Iterator[None]:
    """A launcher that has lost one process ends the others by a signal, perhaps before they notice: the same error."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: Any) -> None:
        raise Lost(_LOST)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
