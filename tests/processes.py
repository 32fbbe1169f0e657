"""Several processes of one run: forked from the test, which costs no import, or started by torchrun itself."""

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from methods.command import command
from tests.conftest import ROOT
from utils.errors import run_main
from utils.ranks import Ranks, open_ranks

_QUIET = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}

_HOLD = "import sys, time; from utils.locks import hold; it = hold(sys.argv[1], ''); print(flush=1); time.sleep(60)"


@contextmanager
def held(folder: Path | str) -> Iterator[subprocess.Popen]:
    """Another process, which fills a folder as long as the block runs."""
    words = [sys.executable, "-c", _HOLD, str(Path(folder).absolute())]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        try:
            yield other
        finally:
            other.kill()


@dataclass(frozen=True)
class Ended:
    rc: int
    stdout: str
    stderr: str


def together(work: Callable[[Ranks], None], world: int = 2, timeout: float = 60) -> list[Ended]:
    """Call `work(ranks)` in so many processes that find each other, as a command would; how each of them ended."""

    def main(words: object) -> None:
        with open_ranks(torch.device("cpu")) as ranks:
            work(ranks)

    return _forked(lambda: run_main(main, [], "x.py"), world, timeout)


def verb(name: str, *words: object, world: int = 2, timeout: float = 60) -> list[Ended]:
    """The script of this name with its flags in so many processes, as torchrun would start them; how each ended."""
    return _forked(lambda: command(name, [str(word) for word in words]), world, timeout)


def alone(name: str, *words: object, cwd: Path, timeout: float = 300) -> Ended:
    """The script of this name with its flags in one process of its own, which stands in `cwd`; how it ended."""

    def work() -> int:
        os.chdir(cwd)
        return command(name, [str(word) for word in words])

    return _forked(work, 1, timeout)[0]


def killed(name: str, words: Sequence[str], target: str) -> None:
    """The script of this name in another interpreter, killed at the very moment when it moves a whole file to
    `target`."""
    code = f"""
import os, signal, sys
real = os.replace
def replace(source, to):
    if os.path.basename(to) == {target!r}:
        os.kill(os.getpid(), signal.SIGKILL)
    real(source, to)
os.replace = replace
import torch
torch.set_num_threads(1)
from methods.command import command
sys.exit(command({name!r}, {list(words)!r}))
"""
    env = os.environ | _QUIET | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]


def _forked(code: Callable[[], int], world: int, timeout: float) -> list[Ended]:
    """As under torchrun, the store in which they meet is not one of theirs."""
    env = {"WORLD_SIZE": str(world)}
    if world > 1:
        keeper = torch.distributed.TCPStore("127.0.0.1", 0, world, True, wait_for_workers=False)
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(keeper.port)}
        env |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    with tempfile.TemporaryDirectory() as folder:
        gate = os.pipe()
        children = [
            _fork(code, Path(folder), env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, gate) for rank in range(world)
        ]
        for end in gate:
            os.close(end)
        codes = _wait(children, time.monotonic() + timeout)
        said = [[(Path(folder) / f"{rank}.{name}").read_text() for name in ("out", "err")] for rank in range(world)]
    return [Ended(code, *texts) for code, texts in zip(codes, said, strict=True)]


def _fork(work: Callable[[], int], folder: Path, env: dict[str, str], gate: tuple[int, int]) -> int:
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        # The store's thread is idle as long as nobody calls it: what it locked in a fork would be locked for ever.
        os.close(gate[1])
        os.read(gate[0], 1)
        os.environ.update(env)
        tqdm.set_lock(threading.RLock())  # its own is one of all forks: who is killed with it would stop them all
        sys.stdout, sys.stderr = ((folder / f"{env['RANK']}.{name}").open("w", buffering=1) for name in ("out", "err"))
        code = work()
    except BaseException as error:
        print(repr(error), file=sys.stderr)
    finally:
        os._exit(code)  # nothing of the test's own may happen twice


def _wait(children: Sequence[int], until: float) -> list[int]:
    codes: dict[int, int] = {}
    while len(codes) < len(children):
        late = time.monotonic() > until
        for child in (child for child in children if child not in codes):
            if late:
                os.kill(child, signal.SIGKILL)
            done, status = os.waitpid(child, 0 if late else os.WNOHANG)
            if done:
                codes[child] = os.waitstatus_to_exitcode(status)
        if late:
            raise AssertionError("a process hangs")
        time.sleep(0.01)
    return [codes[child] for child in children]


def torchrun(*words: object, world: int = 2, cwd: object = None, timeout: float = 300) -> Ended:
    """torchrun of a script and its flags."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", world, "--master_port", port]
    options = {"env": os.environ | _QUIET | {"PYTHONPATH": str(ROOT)}, "cwd": cwd, "timeout": timeout}
    done = subprocess.run([str(word) for word in (*launcher, *words)], capture_output=True, text=True, **options)
    return Ended(done.returncode, done.stdout, done.stderr)


def told(ended: list[Ended]) -> list[str]:
    """All that the processes said on standard error, in lines, but for progress bars."""
    lines = (line.strip() for end in ended for line in re.split(r"[\r\n]+|\x1b\[A", end.stderr))
    return [line for line in lines if line and "%|" not in line]
