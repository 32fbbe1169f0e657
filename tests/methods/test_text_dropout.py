"""`--text_dropout`: experts see captions through the frozen text encoder's own dropout, as the released code has it."""

import shutil

import numpy as np
import pytest
import torch

from methods.core.training import Trainer
from networks.text import TransformerEncoder, build_text_encoder
from networks.towers import TowerConfig
from tests.conftest import contents, works
from tests.networks.test_text import CAPTIONS, bert
from tests.processes import told, verb
from utils.rng import seeded

__all__ = ["bert"]  # a fixture

TOY = ("--dataset", "toy", "--toy_images", "40", "--image_size", "8", "--image_encoder", "ConvNetD1W8")
TOY = (*TOY, "--device", "cpu", "--workers", "1", "--num_experts", "2", "--train_epochs", "2")
TOY = (*TOY, "--batch_size_train", "64", "--buffer_path", "b")


@pytest.fixture
def flags(bert, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return (*TOY, "--text_encoder", str(bert))


def snapshots(folder):
    return {name: text for name, text in contents(folder).items() if name.endswith(".safetensors")}


def test_it_is_the_library_in_training_mode(bert):
    from transformers import AutoModel, AutoTokenizer

    encoder, tokenizer = (
        build_text_encoder(TowerConfig(text_encoder=str(bert)), list),
        AutoTokenizer.from_pretrained(bert),
    )
    plain = encoder.encode(CAPTIONS[:5])
    state = torch.random.get_rng_state()
    found = encoder.encode_dropped(CAPTIONS[:5], 3)
    assert torch.equal(state, torch.random.get_rng_state())
    with seeded(3), torch.no_grad():
        tokens = tokenizer(CAPTIONS[:5], padding="longest", return_token_type_ids=False, return_tensors="pt")
        assert torch.equal(AutoModel.from_pretrained(bert).train()(**tokens).last_hidden_state[:, 0], found)
    assert torch.equal(encoder.encode_dropped(CAPTIONS[:5], 3), found) and not found.requires_grad
    assert not torch.equal(encoder.encode_dropped(CAPTIONS[:5], 4), found)
    assert not np.allclose(found.numpy(), plain, atol=1e-3)
    assert np.array_equal(encoder.encode(CAPTIONS[:5]), plain), "elsewhere it is off"


def test_experts_differ_by_it_alone(flags, tmp_path):
    works("buffer", *flags)
    plain = snapshots(tmp_path / "b")
    shutil.rmtree("b")
    works("buffer", *flags, "--text_dropout")
    found = snapshots(tmp_path / "b")
    assert found.keys() == plain.keys()
    same = {name.split("epoch_")[1] for name in found if found[name] == plain[name]}
    assert same == {"000.safetensors"}


def test_interrupted_and_shared_runs_draw_the_same(flags, tmp_path, monkeypatch):
    drawn, dropped = [], TransformerEncoder.encode_dropped

    def spy(self, captions, seed):
        drawn.append(seed)
        return dropped(self, captions, seed)

    monkeypatch.setattr(TransformerEncoder, "encode_dropped", spy)
    works("buffer", *flags, "--text_dropout")
    steps = drawn[2:]  # after a look whether there is any dropout
    assert len(steps) == len(set(steps)) == 2 * 2 * (40 * 5 // 64)
    whole = contents(tmp_path / "b")
    shutil.move("b", "whole")

    step = Trainer._step
    left = [4]  # of three a epoch: in the second epoch of expert 0

    def stop(self, batch):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return step(self, batch)

    monkeypatch.setattr(Trainer, "_step", stop)
    with pytest.raises(AssertionError):
        works("buffer", *flags, "--text_dropout")
    monkeypatch.setattr(Trainer, "_step", step)
    works("buffer", *flags, "--text_dropout", "--resume")
    again = contents(tmp_path / "b")
    assert {name: text for name, text in again.items() if "config" not in name} == {
        name: text for name, text in whole.items() if "config" not in name
    }
    shutil.rmtree("b")
    done = verb("buffer", *flags, "--text_dropout")
    assert [end.rc for end in done] == [0, 0], told(done)
    assert contents(tmp_path / "b") == whole


class TestRefused:
    def test_what_has_no_dropout(self, refused, own_folder):
        line = refused("buffer", *TOY, "--text_encoder", "tfidf", "--text_dropout")
        assert line == "--text_encoder tfidf has no dropout; leave out --text_dropout"
        line = refused("buffer", *TOY, "--text_cache", "texts", "--text_dropout")
        assert "--text_dropout embeds captions anew, and --text_cache has them ready; leave out one" in line

    def test_an_encoder_whose_dropout_is_off(self, flags, bert, refused, tmp_path):
        import json

        shutil.copytree(bert, tmp_path / "dry")
        config = json.loads((tmp_path / "dry" / "config.json").read_text())
        off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        (tmp_path / "dry" / "config.json").write_text(json.dumps(config | off))
        line = refused("buffer", *TOY, "--text_encoder", "dry", "--text_dropout")
        assert line == "--text_encoder dry has no dropout that --text_dropout could leave on; leave it out"
        assert not list(tmp_path.rglob("manifest.json"))
