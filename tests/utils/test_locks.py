"""A folder has one process at a time: who is refused, what dies with its holder, and what is left in the folder."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT
from utils import locks
from utils.errors import UserError
from utils.locks import LOCK, hold, release

HOLD = """
import sys, time
from utils.locks import hold
lock = hold(sys.argv[1], "--save_dir")
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def let_go():
    yield
    release()


@pytest.fixture
def other(tmp_path):
    """Another process, which holds `tmp_path / "run"`."""
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], cwd=ROOT, stdout=subprocess.PIPE) as it:
        assert it.stdout.readline() == b"held\n"
        yield it
        it.kill()


def refusal(folder):
    with pytest.raises(UserError) as caught:
        hold(folder, "--save_dir")
    return str(caught.value)


def test_the_second_is_refused_and_told_who_is_there(tmp_path, other):
    line = refusal(tmp_path / "run")
    assert line.startswith(f"{tmp_path / 'run'} is being filled by process {other.pid} on ")
    assert line.endswith("; wait until it ends, or choose another --save_dir")
    mine = hold(tmp_path / "elsewhere", "--save_dir")
    assert mine is hold(tmp_path / "elsewhere", "--save_dir") and (tmp_path / "elsewhere" / LOCK).exists()
    del mine
    assert (tmp_path / "run" / LOCK).exists() and not (tmp_path / "elsewhere" / LOCK).exists()


def test_a_killed_holder_leaves_no_lock(tmp_path, other):
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert (tmp_path / "run" / LOCK).exists()  # a file, which holds nobody back
    mine = hold(tmp_path / "run", "--save_dir")
    assert mine and f"process {os.getpid()} on" in (tmp_path / "run" / LOCK).read_text()
    release()
    assert list((tmp_path / "run").iterdir()) == []


def test_one_process_may_come_twice_and_its_forks_with_it(tmp_path):
    mine = hold(tmp_path, "--save_dir")
    assert mine is hold(tmp_path / "." / "", "--save_dir")
    child = os.fork()
    if not child:
        try:
            same = mine is hold(tmp_path, "--save_dir")
            del mine
            release()  # what its parent holds is not the fork's to let go
            os._exit(0 if same and (tmp_path / LOCK).exists() else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    release()
    assert not (tmp_path / LOCK).exists()


def come_and_go(folder):
    try:
        mine = hold(folder, "--save_dir")
    except UserError:
        return
    assert mine
    os.close(os.open(folder / "inside", os.O_CREAT | os.O_EXCL))  # fails where another is inside
    time.sleep(0.0005)
    os.unlink(folder / "inside")
    release()


def test_of_many_at_once_one_gets_in_at_a_time(tmp_path):
    """Each removes the file as it leaves, which must not let two others in; overlaps would show in the notes."""
    children = []
    for _ in range(4):
        child = os.fork()
        if not child:
            try:
                for _ in range(100):
                    come_and_go(tmp_path)
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0] * 4 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("trouble", ["no locks", "read-only", "windows"])
def test_a_disk_without_locks_holds_nobody_back(tmp_path, monkeypatch, trouble):
    def refuse(*_):
        raise OSError(45, "Operation not supported")

    if trouble == "windows":
        monkeypatch.setattr(locks, "fcntl", None)
    elif trouble == "no locks":
        monkeypatch.setattr(locks.fcntl, "flock", refuse)
    else:
        monkeypatch.setattr(locks.os, "open", refuse)
    assert hold(tmp_path, "--save_dir") is hold(tmp_path, "--save_dir") is None
