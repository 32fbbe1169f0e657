"""How the student learns: rates, what a step sees, interruptions, images that cannot be read."""

import json
from dataclasses import replace

import pytest
import torch

from data.views import normalised
from methods import clip_learning
from methods.clip_batches import Batch, BatchConfig
from methods.clip_learning import Learner, published_rate
from networks.clip_students import load_student
from tests.conftest import plain
from tests.methods.clip_world import ALONE, CFG, IMAGES, LOSSES, SEED, SPEC, World, student
from utils.errors import RunError, UserError
from utils.ranks import Ranks
from utils.run import read_log


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


class TestRates:
    def test_published_figures(self):
        """Spec section 5: 100 epochs of 10 steps."""
        steps = (0, 1, 2, 20, 39, 40, 41, 500, 999)
        rates = [published_rate(step, 1000, 40, 8e-4, 4e-6, 4e-5) for step in steps]
        wanted = [4e-6, 4e-6, 2.39e-5, 3.821e-4, 7.602e-4, 7.801e-4, 7.970036e-4, 4.211938e-4, 4.000750e-5]
        assert rates == pytest.approx(wanted, rel=1e-6)

    def test_no_warm_up(self):
        assert published_rate(0, 10, 0, 1.0, 0.5, 0.0) == 1.0

    def test_parts_of_epochs_warm_up_too(self):
        assert Learner(student(), LOSSES, replace(CFG, warmup_epochs=0.5), 5, 5, ALONE).warmup == 2

    def test_rates_that_only_rise_are_refused_or_told(self, world, capsys):
        with pytest.raises(UserError, match=r"--min_lr 0\.01 is above --base_lr 0\.002, so that rates"):
            replace(CFG, min_lr=0.01).check()
        world.run(cfg=replace(CFG, epochs=1, warmup_epochs=1.5))
        assert "note: the rate only rises: --warmup_epochs 1.5 is all of --epochs 1" in capsys.readouterr().out

    def test_the_log_has_the_rates_that_were_used(self, world):
        world.run(cfg=replace(CFG, print_freq=1))
        rates = {row["step"]: row["lr"] for row in read_log(world.root / "run") if "lr" in row}
        assert list(rates) == list(range(15))
        assert all(rate == published_rate(step, 15, 5, 2e-3, 4e-6, 4e-5) for step, rate in rates.items())


class TestBatches:
    def test_an_epoch_sees_each_image_at_most_once(self, world):
        feed = world.feed()
        assert (len(feed.held), feed.per_epoch, feed.per_pass) == (4, 5, 5)
        rows = world.features["images"].rows(range(IMAGES))
        seen = [
            [
                int((rows == image).all(1).nonzero()[0])
                for step in range(5 * epoch, 5 * epoch + 5)
                for image in feed.batch(step).images
            ]
            for epoch in range(2)
        ]
        assert all(len(set(epoch)) == 40 and not set(epoch) & set(feed.held.tolist()) for epoch in seen)
        assert seen[0] != seen[1]

    def test_sentences_begin_anew_when_they_run_out_and_with_each_epoch(self, world):
        feed = world.feed(cfg=replace(CFG, batches=replace(CFG.batches, text_batch=12)))  # 2 batches of 30 sentences
        texts = [feed.batch(step).texts for step in range(10)]
        for pair in (texts[0:2], texts[2:4], texts[5:7]):  # the fifth begins a third turn, the sixth a second epoch
            assert len(torch.unique(torch.cat(pair), dim=0)) == 24
        assert not torch.equal(texts[0], texts[2]) and not torch.equal(texts[0], texts[5])

    def test_chance_is_of_the_step_and_the_row(self, world):
        whole, threads = world.feed(), world.feed(workers=3)
        parts = [world.feed(ranks=Ranks(torch.device("cpu"), rank, 2)) for rank in range(2)]
        for step in (7, 2):
            wanted, found, shares = whole.batch(step), threads.batch(step), [part.batch(step) for part in parts]
            for name in ("views", "decoded", "images", "texts"):
                value = getattr(wanted, name)
                assert torch.equal(value, getattr(found, name))
                assert torch.equal(value, torch.cat([getattr(share, name) for share in shares])), name
        assert not torch.equal(whole.batch(0).views, whole.batch(5).views)

    def test_orders_and_views_have_a_chance_of_their_own(self, tmp_path):
        """As many sentences as images, all in a step: no image keeps its sentence, and none its view."""
        world = World(tmp_path, images=20, texts=20)
        feed = world.feed(cfg=replace(CFG, batches=BatchConfig(batch_size=20, held_out=0)))
        batches = [feed.batch(step) for step in range(2)]
        images, texts = (
            [
                [int((world.features[name].rows(range(20)) == row).all(1).nonzero()[0]) for row in getattr(batch, name)]
                for batch in batches
            ]
            for name in ("images", "texts")
        )
        orders = [*images, *texts]
        assert all(sorted(order) == list(range(20)) for order in orders) and len(set(map(tuple, orders))) == 4
        views = [batch.views[torch.tensor(order).argsort()] for batch, order in zip(batches, images, strict=True)]
        assert (views[0] != views[1]).flatten(1).any(1).all()

    def test_sentences_without_a_feature_are_left_out(self, world):
        world.features["texts"] = world.features["holes"]
        assert not {3, 40} & set(world.feed().texts.tolist()) and len(world.feed().texts) == 42

    def test_what_cannot_be_decoded_is_black_and_what_was_not_is_left_out(self, world):
        order = world.feed().batch(0)
        feed, known = world.feed(bad=range(0, IMAGES, 2)), world.feed(images="holes")
        batch = feed.batch(0)
        assert 0 < int(batch.decoded.sum()) < 8 and torch.equal(batch.images, order.images)
        there = batch.decoded.bool()
        assert torch.equal(batch.views[there], order.views[there]) and not batch.views[~there].any()
        assert "it is cut short" in feed.example()
        none = world.feed(bad=range(IMAGES)).batch(0)
        assert none.views.shape == (8, 3, 16, 16) and not none.decoded.any() and not none.views.any()
        assert not {3, 40} & set(torch.cat([known.rows, known.held]).tolist()) and len(known.rows) == 38

    def test_too_little(self, world):
        def having(**sizes):
            return replace(CFG, batches=replace(CFG.batches, **sizes))

        with pytest.raises(UserError, match="there are 40 images to learn from, fewer than a batch of 41; give a smal"):
            world.feed(cfg=having(batch_size=41))
        with pytest.raises(
            UserError, match="there are 30 sentences, fewer than a batch of 31; give --text_batch 30 or"
        ):
            world.feed(cfg=having(text_batch=31))
        with pytest.raises(UserError, match="--batch_size 9 cannot be shared by 2 processes"):
            world.feed(cfg=having(batch_size=9), ranks=Ranks(torch.device("cpu"), 0, 2))
        with pytest.raises(UserError, match="--text_batch 9 cannot be shared by 2 processes"):
            world.feed(cfg=having(text_batch=9), ranks=Ranks(torch.device("cpu"), 0, 2))


class TestLearning:
    def test_the_student_comes_to_agree_with_the_teacher(self, tmp_path):
        """Of ten sentences it picks the teacher's for most images that it never saw."""
        world = World(tmp_path, images=144, texts=10)
        sizes = BatchConfig(batch_size=26, text_batch=10, min_crop=0.9, held_out=14)
        done = world.run(cfg=replace(CFG, epochs=25, batches=sizes, base_lr=3e-3))
        losses = [row["vl"] for row in read_log(tmp_path / "run") if "vl" in row]
        assert done.steps == done.planned == 125 and losses[-1] < 0.1 * losses[0]
        assert len(done.agreements) == 26 and done.chance == 10 and sum(done.agreements[-5:]) / 5 > 60

    def test_the_last_student_is_kept_with_its_note(self, world):
        net = student()
        world.run(net=net, teacher="a big one")
        kept, spec, note = load_student(world.root / "run" / "student.pt")
        assert spec == SPEC and note == {"teacher": "a big one", "steps": 15, "epochs": 3.0}
        pixels = torch.randn(3, 3, 16, 16)
        assert torch.equal(kept(pixels), net(pixels)) and not net.training
        assert sorted(path.name for path in (world.root / "run").glob("checkpoint*")) == [
            "checkpoint_00000010.pt",
            "checkpoint_00000015.pt",
        ]

    def test_matrices_decay_alone(self, world):
        learner = Learner(student(), LOSSES, CFG, 5, 5, ALONE)
        decays = {id(p): group["weight_decay"] for group in learner.optimizer.param_groups for p in group["params"]}
        named = {name: decays[id(p)] for name, p in learner.net.named_parameters()}
        assert named["projection"] == named["visual.conv1.weight"] == 0.05
        assert (
            named["visual.class_embedding"] == named["visual.positional_embedding"] == named["visual.ln_pre.bias"] == 0
        )

    def test_the_student_sees_what_it_is_judged_on(self, world):
        learner, views = Learner(student(), LOSSES, CFG, 5, 5, ALONE), world.feed().batch(0).views
        assert torch.equal(learner._pixels(views), normalised(views))

    def test_it_is_judged_in_evaluation_mode_and_goes_on_in_training_mode(self, world):
        net, modes = student(0.3), []
        net.visual.register_forward_hook(lambda *_: modes.append(net.training))
        world.run(cfg=replace(CFG, epochs=2), net=net)
        assert modes == [False, *[True] * 5, False, *[True] * 5, False]

    def test_the_students_own_chance_is_of_the_step(self, world):
        drawn = []

        def taking(net):
            net.visual.register_forward_hook(lambda *_: drawn.append(float(torch.rand(()))) if net.training else None)
            return net

        world.run("once", net=taking(student()))
        once, drawn[:] = drawn[:], []
        world.run("again", replace(CFG, steps=7), net=taking(student()))
        world.run("again", net=taking(student()))
        assert len(set(once)) == 15 and once == drawn

    @pytest.mark.parametrize("broken", ["loss", "pvl"])
    def test_a_loss_that_is_not_finite_names_its_step(self, world, broken):
        calls = []

        def losses(images, texts, student):
            calls.append(1)
            return {"pvl": student.sum(), "loss": student.sum()} | (
                {broken: student.sum() / 0} if len(calls) == 4 else {}
            )

        with pytest.raises(RunError, match=r"^step 4: the loss is not finite; lower .*; --resume begins anew"):
            world.run(losses=losses, cfg=replace(CFG, print_freq=100))

    def test_half_precision_stays_in_the_student(self, world):
        seen = []

        def losses(images, texts, student):
            product = student @ texts.T
            seen.append((images.dtype, texts.dtype, student.dtype, product.dtype))
            return LOSSES(images, texts, student)

        world.run("half", cfg=replace(CFG, amp=True), losses=losses)
        assert set(seen) == {(torch.float32,) * 4}
        world.run("full", cfg=replace(CFG, amp=False))
        kept = [torch.load(world.root / name / "student.pt")["student"] for name in ("half", "full")]
        half, full = (weights["projection"] for weights in kept)
        assert half.dtype == torch.float32 and 0 < (half - full).abs().max() < 0.02


class TestInterruptions:
    @pytest.mark.parametrize("amp", [False, True])
    def test_killed_anywhere_it_ends_as_if_it_had_not(self, world, monkeypatch, amp):
        """Bit for bit, with dropout, undecodable images and a torn last line of the log."""
        cfg, bad = replace(CFG, amp=amp, checkpoint_every=0.4), (2, 9)
        whole = world.run("whole", cfg, bad, net=student(0.3))
        step, left = Learner.step, [4, 3, 6]  # steps that each attempt takes

        def deadly(self, batch):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return step(self, batch)

        monkeypatch.setattr(Learner, "step", deadly)
        while len(left) > 1:
            with pytest.raises(KeyboardInterrupt):
                world.run("cut", cfg, bad, net=student(0.3))
            left.pop(0)
            with (world.root / "cut" / "log.jsonl").open("a") as file:
                file.write('{"step": 9')
        monkeypatch.setattr(Learner, "step", step)
        done = world.run("cut", cfg, bad, net=student(0.3))
        assert done == whole and done.undecodable > 0
        assert world.files("cut") == world.files("whole")
        assert world.files("whole").keys() == {
            "checkpoint_00000014.pt",
            "checkpoint_00000015.pt",
            "student.pt",
            "log",
        }
        world.run("cut", cfg, bad, net=student(0.3))  # nothing is left to do
        assert world.files("cut") == world.files("whole")

    def test_steps_end_a_run_early_and_it_goes_on(self, world):
        world.run("whole")
        done = world.run("cut", replace(CFG, steps=7))
        assert (done.steps, done.planned) == (7, 15)
        assert world.run("cut").steps == 15
        whole, cut = (torch.load(world.root / name / "student.pt") for name in ("whole", "cut"))
        assert plain(whole) == plain(cut)

    def test_a_checkpoint_of_another_student(self, world):
        world.run("run", replace(CFG, steps=5))
        spec = replace(SPEC, options=SPEC.options | {"layers": 1})
        with pytest.raises(
            UserError, match=r"checkpoint_00000005\.pt does not fit this run \(.*\); delete it, or choose"
        ):
            world.run("run", replace(CFG, steps=5), spec=spec)


class TestUndecodable:
    def test_they_are_passed_over_and_counted(self, world):
        done = world.run(bad=(2, 9), share=0.1)
        rows = [row["undecodable"] for row in read_log(world.root / "run") if "undecodable" in row]
        assert done.seen == 120 and done.undecodable == rows[-1] == 6 and rows == sorted(rows)

    def test_they_are_no_part_of_the_loss(self, world):
        """Each image that is left keeps its own feature: what is learned is what a batch of them alone teaches."""
        batch, seen = world.feed(bad=range(0, IMAGES, 3)).batch(0), []
        there = batch.decoded.bool()
        only = Batch(batch.views[there], batch.decoded[there], batch.images[there], batch.texts)
        assert 0 < len(only.views) < 8

        def losses(*features):
            seen.append(features)
            return LOSSES(*features)

        for some in (batch, only):
            assert Learner(student(), losses, CFG, 5, SEED, ALONE).step(some) == len(only.views)
        for found, wanted in zip(*seen, strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)

    def test_in_a_long_epoch_they_are_judged_before_its_end(self, world, monkeypatch):
        monkeypatch.setattr(clip_learning, "_ENOUGH", 16)
        with pytest.raises(UserError, match=r"\d+ of (16|24|32) images cannot be decoded"):
            world.run(bad=range(0, IMAGES, 3), share=0.05)

    def test_too_many_stop_the_run(self, world):
        with pytest.raises(UserError, match=r"4 of 40 images cannot be decoded, such as .*cut short.*--bad_images"):
            world.run(bad=(2, 9, 17, 25), share=0.05)

    def test_a_step_without_a_single_one(self, world):
        with pytest.raises(UserError, match=r"no image of step 1 can be decoded, such as .*cut short"):
            world.run(bad=range(IMAGES))


def test_the_log_is_json_of_plain_numbers(world):
    world.run(cfg=replace(CFG, epochs=1))
    rows = [json.loads(line) for line in (world.root / "run" / "log.jsonl").read_text().splitlines()]
    assert rows[0].keys() == rows[-1].keys() == {"step", "agreement"}
    assert {"step", "loss", "vl", "pvl", "udist", "lr", "undecodable"} == rows[1].keys()
    assert [row["step"] for row in rows] == [0, 1, 3, 4, 4]
