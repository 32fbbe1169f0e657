"""The commands of the study: each is one that its script takes, and each set has the pairs that its row says."""

import os
from pathlib import Path

import pytest

from methods.pair_sources import named_file
from methods.vldd import CONFIGS
from tests.benchmarks.study import HEADS, ROWS, commands
from utils.config import idle_options, parse

DATA = ["--image_root", "IMAGES", "--ann_root", "ANN", "--trunk_images", "NPZ"]


@pytest.mark.parametrize("pairs", [50, 100])
def test_its_commands_fit_each_other(pairs, monkeypatch):
    monkeypatch.chdir(Path(__file__).resolve().parents[1])
    learned, judged = {}, []
    for done, (script, *words) in commands(pairs, DATA):
        configs = dict(CONFIGS)
        verb = os.path.splitext(script)[0]
        config = configs.pop(verb)
        cfg, _ = parse(config, verb, words, peers=tuple(configs.values()))
        assert not idle_options(cfg) and cfg.data.image_root == "IMAGES"
        heads = "_heads" in str(done.parents[3] if verb == "buffer" else done)
        if verb == "distill":
            learned[cfg.show.save_dir] = cfg
            assert done == Path(cfg.show.save_dir, f"distilled_{cfg.outer.iterations}.pt")
            fewer = cfg.pairs.sim_type != "identity"  # the similarity is paid for by a pair
            assert cfg.pairs.total == pairs - fewer
            heads = cfg.towers.image_projection
            assert cfg.match.buffer_path == f"runs/study/buffers{'_heads' if heads else ''}"
        elif verb == "eval":
            assert done.parent == Path(cfg.source.save_dir)
            sets = dict(map(named_file, cfg.source.compare))
            assert list(sets) == list(HEADS if heads else ROWS) and cfg.source.num_pairs == pairs
            judged += [str(path.parent) for path in sets.values()]
            assert all(learned[str(path.parent)].towers == cfg.towers for path in sets.values())
    assert judged == list(learned) and len(judged) == len(ROWS) + len(HEADS)
