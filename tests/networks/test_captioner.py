"""The captioner: one answer an image, whatever it shares a batch with."""

import numpy as np
import pytest
import torch

from networks.captioner import OwnDraws, load_captioner
from networks.tiny import WORDS, tiny_llava
from utils.errors import UserError

QUESTIONS = [
    "Describe how the dog in this picture looks: its shape, pose, colours and any distinctive features.",
    "Describe the red circle.",
    "What is <image> this?",
]


@pytest.fixture(scope="module")
def captioner(tmp_path_factory):
    return load_captioner("tiny", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def images():
    from PIL import Image

    rng = np.random.default_rng(0)
    shapes = ((40, 50, 3), (64, 64, 3), (30, 90))  # the last one in grey
    return [Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)) for shape in shapes]


def test_answers_are_words(captioner, images):
    answers = captioner(images, QUESTIONS)
    for answer in answers:
        assert 3 <= len(answer.split()) < 40 and set(answer.split()) <= {*WORDS, *".,?:", "user", "assistant"}
    assert answers == captioner(images, QUESTIONS)
    assert max(len(answer.split()) for answer in captioner(images, QUESTIONS, max_new_tokens=4)) <= 4


@pytest.mark.parametrize("question", QUESTIONS)
def test_an_answer_follows_the_image(captioner, question):
    from PIL import Image

    flat = [Image.new("RGB", (40, 40), colour) for colour in ("red", "white", "black", "blue")]
    assert len({*captioner(flat, [question] * 4)}) > 2


def test_an_answer_follows_the_question(captioner, images):
    for image in images:
        assert len({*captioner([image] * 3, QUESTIONS)}) > 1


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7}, {"temperature": 1.0, "top_p": 0.5}, {"num_beams": 3}], ids=str
)
def test_an_answer_is_the_same_alone_and_in_a_batch(captioner, images, options):
    seeds = [11, 12, 13]
    together = captioner(images, QUESTIONS, seeds, max_new_tokens=12, **options)
    for index in (2, 0, 1):
        one = slice(index, index + 1)
        alone = captioner(images[one], QUESTIONS[one], seeds[one], max_new_tokens=12, **options)
        assert alone == together[one]


def test_drawn_answers_follow_the_seed(captioner, images):
    def ask(*seeds: int) -> list[str]:
        return captioner([images[0]] * 2, QUESTIONS[:1] * 2, seeds, max_new_tokens=12, temperature=1.0)

    one, two = ask(1, 2)
    assert one != two and ask(2, 1) == [two, one] and ask(1, 1) == [one, one]


def test_words_are_drawn_from_the_softmax_of_what_top_p_leaves():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    count = 20_000

    def shares(temperature: float, top_p: float | None) -> torch.Tensor:
        draws = OwnDraws(range(count), temperature, top_p)
        return draws(None, logits.expand(count, 4)).argmax(1).bincount(minlength=4) / count

    assert torch.allclose(shares(1.0, None), torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.015)
    squared = torch.tensor([0.25, 0.09, 0.0225, 0.0025])
    assert torch.allclose(shares(0.5, None), squared / squared.sum(), atol=0.015)
    assert torch.allclose(shares(1.0, 0.6), torch.tensor([0.625, 0.375, 0.0, 0.0]), atol=0.015)
    assert shares(1.0, 1e-6).tolist() == [1.0, 0.0, 0.0, 0.0]


def test_a_chat_template_words_the_question(captioner):
    assert captioner._prompt(QUESTIONS[2]) == "USER: <image>\nWhat is  this? ASSISTANT:"
    captioner.processor.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{% for part in m.content %}"
        "{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}[answer]{% endif %}"
    )
    try:
        assert captioner._prompt("What is it?") == "[user]<image>What is it?[answer]"
    finally:
        captioner.processor.chat_template = None


def test_it_is_refused_in_one_line(captioner, images, tmp_path, capsys):
    with pytest.raises(UserError, match=r"--num_beams 2 searches and --temperature 0\.2 draws; give one"):
        captioner(images, QUESTIONS, [1, 2, 3], temperature=0.2, num_beams=2)
    with pytest.raises(UserError, match=r"no captioner at \./nowhere; --caption_model takes"):
        load_captioner("./nowhere", tmp_path)
    with pytest.raises(UserError, match=r"the weights of llava-hf/llava-1.5-7b-hf are not here.*--caption_model tiny"):
        load_captioner("liuhaotian/llava-v1.5-7b", tmp_path)
    assert "using llava-hf/llava-1.5-7b-hf, the same weights" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"liuhaotian/llava-v1\.6-34b is in a format of its own"):
        load_captioner("liuhaotian/llava-v1.6-34b", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"captioner folder .*empty cannot be loaded"):
        load_captioner(str(tmp_path / "empty"), tmp_path)


def test_a_folder_is_loaded_in_the_precision_asked_for_and_silently(images, tmp_path, capfd):
    captioner = load_captioner(str(tiny_llava(tmp_path)), tmp_path, dtype=torch.bfloat16)
    assert captioner.net.dtype == torch.bfloat16
    assert captioner(images[:1], QUESTIONS[:1], max_new_tokens=3)[0]
    assert capfd.readouterr() == ("", "")
