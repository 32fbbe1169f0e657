"""Several processes: what they share, and how they end together."""

import os
import signal
import time
from dataclasses import replace

import pytest
import torch

from tests.processes import together, told
from tests.utils.test_run import command
from utils.errors import Elsewhere, UserError
from utils.ranks import Ranks, one_process, open_ranks
from utils.run import Run

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def test_alone():
    with open_ranks(CPU) as ranks:
        rows, before = torch.rand(3, 2, requires_grad=True), torch.ones(2)
        assert (ranks.rank, ranks.world, ranks.first, ranks.device) == (0, 1, True, CPU)
        assert ranks.gather(rows, grad=True) is rows
        ranks.add_([before])
        ranks.copy_([before])
        ranks.same(None)
        assert before.tolist() == [1, 1] and ranks.broadcast("a") == "a" and ranks.same("b") and ranks.all("c") == ["c"]
        with ranks.in_turn():
            pass
        assert ranks.part(7, "--batch_size") == slice(0, 7)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL and not torch.distributed.is_initialized()


def test_torchrun_with_one_process_is_alone(monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    with open_ranks(CPU, 0) as ranks:
        assert ranks.world == 1 and not torch.distributed.is_initialized()


def share(ranks):
    """Gathered rows are in order; their gradients, summed over processes, are those of one process."""
    rank, world = ranks.rank, ranks.world
    rows = torch.arange(12.0, dtype=torch.float64).reshape(6, 2)
    own = rows[ranks.part(6, "--batch_size")]
    weight = torch.tensor([[0.1, 0.2], [0.3, 0.5]], dtype=torch.float64, requires_grad=True)

    def loss(made):
        return (made @ made.T).sigmoid().sum() + made.pow(3).sum()

    (wanted,) = torch.autograd.grad(loss(rows @ weight), weight)
    made = ranks.gather(own @ weight, grad=True)
    assert torch.allclose(made, rows @ weight, rtol=1e-15) and torch.equal(ranks.gather(own), rows)
    loss(made).backward()
    assert not torch.allclose(weight.grad, wanted)
    other = torch.full((2,), float(rank), dtype=torch.float32)
    ranks.add_([weight.grad, other])
    assert torch.allclose(weight.grad, wanted, rtol=1e-14), weight.grad - wanted
    assert other.tolist() == [world * (world - 1) / 2] * 2
    ranks.copy_([own, other.fill_(rank)])
    assert own.tolist() == rows[: 6 // world].tolist() and other.tolist() == [0, 0]
    flags = torch.tensor([rank == 1] * 2, dtype=torch.uint8)
    assert ranks.gather(flags).tolist() == [0, 0, 1, 1, 0, 0][: 2 * world]
    assert ranks.broadcast({"rank": rank}) == {"rank": 0}
    assert ranks.same([1, "a"]) and not ranks.same(rank) and ranks.all(rank) == list(range(world))
    ranks.same(None)
    print("fine", rank)


@pytest.mark.parametrize("world", [2, 3])
def test_what_they_share(world):
    done = together(share, world)
    assert [(end.rc, end.stderr) for end in done] == [(0, "")] * world
    assert [end.stdout for end in done] == ["fine 0\n", *[""] * (world - 1)]  # the others keep quiet


def test_a_batch_that_cannot_be_shared():
    assert Ranks(CPU, 2, 4).part(8, "--batch_size") == slice(4, 6)
    with pytest.raises(UserError, match=r"--batch_size 10 cannot be shared by 4 processes; give a multiple of them"):
        Ranks(CPU, 2, 4).part(10, "--batch_size")


def test_the_first_makes_what_the_others_find(tmp_path):
    """Then the first of each other machine, here of the third process, and then the rest."""
    made = tmp_path / "made"

    def work(ranks):
        with replace(ranks, local=0 if ranks.rank == 2 else ranks.rank).in_turn():
            time.sleep(0.05 if ranks.rank in (0, 2) else 0)
            with open(made, "a") as file:
                file.write(str(ranks.rank))

    assert [end.rc for end in together(work, 3)] == [0, 0, 0]
    assert made.read_text() == "021"


def test_what_the_first_cannot_make_ends_all(tmp_path):
    def work(ranks):
        with ranks.in_turn():
            (tmp_path / f"begun {ranks.rank}").touch()
            raise UserError("the disk is full")

    done = together(work, 3)
    assert told(done) == ["x.py: error: the disk is full"] and sorted(end.rc for end in done) == [1, 1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["begun 0"]


LOST = "x.py: error: a process of this run ended before its time (killed, or out of memory?); --resume goes on from"


@pytest.mark.parametrize("victim", [0, 2])
def test_a_killed_process_ends_the_run_with_one_line(victim):
    def work(ranks):
        for step in range(10**6):
            if ranks.rank == victim and step == 20:
                os.kill(os.getpid(), signal.SIGKILL)
            ranks.add_([torch.ones(3)])

    done = together(work, 3)
    assert [end.rc for end in done] == [-signal.SIGKILL if rank == victim else 1 for rank in range(3)]
    (line,) = told(done)
    assert line.startswith(LOST)


def test_one_that_is_told_to_end():
    """A launcher that lost a process tells the others to end while they compute, before they could notice."""

    def work(ranks):
        ranks.same(None)
        if ranks.rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        ranks.same(None)

    done = together(work)
    (line,) = told(done)
    assert [end.rc for end in done] == [1, 1] and line.startswith(LOST)


@pytest.mark.parametrize("who", [(1,), (0, 1)])
@pytest.mark.parametrize("error, code", [(UserError("no such file"), 2), (ValueError("a bug"), 99)])
def test_what_ends_a_process_is_told_once(who, error, code):
    def work(ranks):
        if ranks.rank in who:
            raise error
        ranks.same(None)

    done = together(work)
    assert [line.replace("x.py: error: ", "") for line in told(done)] == ["no such file" if code == 2 else repr(error)]
    assert sorted(end.rc for end in done) == [1, code]


def test_an_interruption_is_told_once():
    def work(ranks):
        raise KeyboardInterrupt

    done = together(work)
    assert told(done) == ["x.py: interrupted; --resume goes on from the last checkpoint"]
    assert sorted(end.rc for end in done) == [1, 130]


def test_only_the_first_writes_a_run_folder(tmp_path):
    def work(ranks, resume=False):
        run = Run(tmp_path / "a", command(resume=resume), "distill", "--save_dir", ranks)
        assert run.device == ranks.device and run.resumed == resume
        run.pin(data="of the first" if ranks.first else "of another")
        for step in range(2):
            run.log(step, loss=step + float(ranks.rank))
        run.rewind(1)
        ranks.same(None)

    assert [(end.rc, end.stderr) for end in together(work)] == [(0, "")] * 2
    assert (tmp_path / "a" / "log.jsonl").read_text() == '{"step": 0, "loss": 0.0}\n'
    assert "of the first" in (tmp_path / "a" / "inputs.json").read_text()
    assert [end.rc for end in together(lambda ranks: work(ranks, resume=True))] == [0, 0]
    (line,) = told(together(work))
    assert "already holds a run; --resume goes on with it" in line


class TestMistakes:
    @pytest.mark.parametrize(
        ("env", "flag", "message"),
        [
            ({}, 0, r"--local_rank 0 needs torchrun; start as torchrun --nproc_per_node N"),
            ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, 0, r"--local_rank 0 is not torchrun's LOCAL_RANK=1"),
            ({"RANK": "x", "WORLD_SIZE": "2"}, -1, r"RANK=x, WORLD_SIZE=2, LOCAL_RANK=None are no process numbers"),
            ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, -1, r"RANK=2 is not one of WORLD_SIZE=2 processes"),
            ({"RANK": "0", "WORLD_SIZE": "2"}, -1, r"the 2 processes do not find each other \(.*\); start .* torchrun"),
        ],
    )
    def test_environments(self, monkeypatch, env, flag, message):
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name, raising=False)
        with pytest.raises(UserError, match=message), open_ranks(CPU, flag):
            pass

    def test_the_work_of_one(self, monkeypatch):
        one_process("eval.py")
        monkeypatch.setenv("WORLD_SIZE", "1")
        one_process("eval.py")
        monkeypatch.setenv("WORLD_SIZE", "2")
        one_process("eval.py")  # of whatever that is: there is no torchrun without RANK
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(UserError, match=r"eval.py is the work of one process, .*; leave out torchrun"):
            one_process("eval.py")
        monkeypatch.setenv("RANK", "1")
        with pytest.raises(Elsewhere):
            one_process("eval.py")

    def test_one_gpu_for_several(self, monkeypatch):
        for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
            monkeypatch.setenv(name, value)
        message = r"--device cuda:0 is one GPU for several processes; give --device cuda"
        with pytest.raises(UserError, match=message), open_ranks(torch.device("cuda:0")):
            pass
        message = r"--device mps is for one process; give --device cpu or cuda, or do without torchrun"
        with pytest.raises(UserError, match=message), open_ranks(torch.device("mps")):
            pass
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        message = r"process 1 of this machine finds 1 GPUs; give --nproc_per_node no more"
        with pytest.raises(UserError, match=message), open_ranks(torch.device("cuda")):
            pass
