"""Captions: what is asked, what is made of an answer, and a log that survives being killed anywhere."""

import json

import pytest
import torch

from data.catalogue import CatalogueConfig, build_catalogue
from data.metadata import read_metadata
from methods import prototype_captions
from methods.prototype_captions import CaptionConfig, ask, clean, write_captions
from utils.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory):
    """12 drawn images of 6 shapes."""
    return build_catalogue(
        CatalogueConfig(dataset="toy", toy_images=12, toy_size=16, cache_dir=str(tmp_path_factory.mktemp("cache")))
    )


class Speaker:
    """Stands in for a model: answers with its number in the batch, so that another batch is another answer."""

    def __init__(self, until: int | None = None) -> None:
        self.asked, self.until = [], until

    def __call__(self, images, questions, seeds, max_new_tokens, temperature, top_p, num_beams):
        if len(self.asked) == self.until:
            raise KeyboardInterrupt
        self.asked.append(questions)
        assert all(image.mode == "RGB" for image in images)
        return [
            f'Nr. {i}, {seed}: "{q}"' for i, (q, seed) in enumerate(zip(questions, seeds or questions, strict=True))
        ]


@pytest.fixture
def speak(catalogue, monkeypatch):
    """speak(folder, until=None, **options) captions with a `Speaker` that dies before its batch number `until`."""

    def run(folder, until=None, **options):
        speaker = Speaker(until)
        monkeypatch.setattr(prototype_captions, "load_captioner", lambda *args: speaker)
        cfg = CaptionConfig(**{"caption_model": "tiny", "caption_batch": 5} | options)
        try:
            return speaker, write_captions(cfg, catalogue, folder, CPU, torch.float32, 0)
        except KeyboardInterrupt:
            return speaker, None

    return run


def test_answers_are_cleaned_as_published():
    assert clean(" The dog's \"red\"  collar\nis 5's. ") == "The dog red collar is 5."


def test_every_image_is_asked_about_by_its_label(catalogue):
    questions = ask(CaptionConfig(caption_prompt="What of the {label}?"), catalogue)
    assert [question.number for question in questions] == list(range(12))
    assert [question.file for question in questions] == sorted(file for names in catalogue.train for file in names)
    assert all(question.text == f"What of the {question.file.split('/')[0]}?" for question in questions)


def test_captions_and_log_have_the_published_layout(speak, tmp_path):
    speaker, captions = speak(tmp_path, temperature=0.2)
    assert list(map(len, speaker.asked)) == [5, 5, 2]
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert list(rows[0]) == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
    meta = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert {row["file_name"]: row["text"] for row in meta} == captions and len(captions) == 12
    assert captions[rows[7]["metadata"]["image"]] == clean(rows[7]["text"]) and captions[meta[0]["file_name"]]
    seeds = {row["text"].split(": ")[0].split(", ")[1] for row in rows}
    assert len(seeds) == 12  # each image has its own


@pytest.mark.parametrize(("until", "tail"), [(0, b""), (1, b'{"question_id": 5, "pro'), (2, b""), (2, b"{")])
def test_a_killed_run_ends_in_the_same_files(speak, tmp_path, until, tail):
    speak(tmp_path / "whole")
    speak(tmp_path / "killed", until)
    log = tmp_path / "killed" / "answers.jsonl"
    log.write_bytes(log.read_bytes() + tail)
    speaker, _ = speak(tmp_path / "killed")
    assert len(speaker.asked) == 3 - until
    for name in ("answers.jsonl", "metadata.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("cut", [1, 7, 30])
def test_batches_are_cut_from_the_full_list(speak, tmp_path, cut):
    """Killed in the middle of a batch: the batch is asked again whole, and only what lacks is appended."""
    speak(tmp_path)
    log = tmp_path / "answers.jsonl"
    whole, lines = log.read_bytes(), log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:7]) + lines[7][:-cut])
    speaker, _ = speak(tmp_path)
    assert list(map(len, speaker.asked)) == [5, 2] and log.read_bytes() == whole


def test_chunks_give_what_one_command_gives(speak, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, whole = speak(tmp_path / "one")
    results = [speak(tmp_path / "many", num_chunks=2, chunk_idx=index, answers_file="bare.jsonl") for index in (1, 0)]
    assert [captions for _, captions in results] == [None, whole]
    assert [len(speaker.asked) for speaker, _ in results] == [1, 2]
    assert sorted(path.name for path in tmp_path.glob("bare*")) == ["bare.0-of-2.jsonl", "bare.1-of-2.jsonl"]
    again, captions = speak(tmp_path / "many", answers_file="bare.jsonl")  # nothing is left for a single command
    assert captions == whole and not again.asked


def test_published_answers_and_questions_are_taken(speak, catalogue, tmp_path):
    asked, answers = tmp_path / "output.json", tmp_path / "answer-file-our.jsonl"
    speak(tmp_path / "first", questions_out=str(asked))
    rows = [json.loads(line) for line in asked.read_text().splitlines()]
    assert list(rows[0]) == ["question_id", "image", "text", "category"] and rows[0]["category"] == "detail"
    for row in rows:
        row["question_id"] += 100
    rows.append({"question_id": 1, "image": "n01440764/1.JPEG", "text": "of a class that is not here"})
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = [{"question_id": row["question_id"], "prompt": row["text"], "text": "seen"} for row in rows[:12]]
    answers.write_text("\n".join(json.dumps(row | {"metadata": {}}) for row in told))
    speaker, captions = speak(tmp_path / "second", question_file=str(asked), answers_file=str(answers))
    assert not speaker.asked and set(captions.values()) == {"seen"}


def test_an_image_without_words_is_called_by_its_class(speak, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Speaker, "__call__", lambda self, images, *rest: ["'s"] * len(images))
    _, captions = speak(tmp_path)
    assert all(text == file.split("/")[0] for file, text in captions.items()) and "12 images" in capsys.readouterr().out


def test_labels_in_place_of_a_model(speak, catalogue, tmp_path):
    speaker, captions = speak(tmp_path, caption_model="label")
    assert not speaker.asked and not (tmp_path / "answers.jsonl").exists()
    assert captions == {file: file.split("/")[0] for names in catalogue.train for file in names}
    assert read_metadata(tmp_path, catalogue) == captions
    assert "caption_prompt" in CaptionConfig(caption_model="label").idle()


def test_the_tiny_captioner_says_something(catalogue, tmp_path):
    cfg = CaptionConfig(caption_model="tiny", max_new_tokens=6)
    captions = write_captions(cfg, catalogue, tmp_path, CPU, torch.float32, 0)
    assert len(captions) == 12 and all(len(text.split()) >= 3 for text in captions.values())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1 of question file .* is not valid JSON"),
        ('["a"]', "is not an object"),
        ('{"image": "circle/00000.png"}', "line 1 of .* lacks question_id, image or text"),
        ('{"question_id": 1, "image": "circle/none.png", "text": "what?"}', "circle/none.png, which is no training"),
        ('{"question_id": 1, "image": "circle/00000.png", "text": " "}', "line 1 of .* has an empty question"),
        ('{"question_id": 1, "image": "circle/00000.png", "text": "?"}', "asks nothing about 11 training images"),
    ],
)
def test_faulty_question_files_are_refused(catalogue, tmp_path, line, message):
    path = tmp_path / "questions.json"
    path.write_text(line + "\n")
    with pytest.raises(UserError, match=message):
        ask(CaptionConfig(question_file=str(path)), catalogue)


def test_corrections_are_not_run_over(speak, tmp_path):
    speak(tmp_path)
    path = tmp_path / "metadata.jsonl"
    path.write_text(path.read_text().replace("Nr. 3", "Mine"))
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"metadata.jsonl has other captions .* by --stages finetune, or delete"):
        speak(tmp_path)
    assert path.read_bytes() == before
    path.unlink()
    assert len(speak(tmp_path)[1]) == 12 and path.read_bytes() != before


def test_answers_to_other_questions_are_refused(speak, tmp_path):
    speak(tmp_path)
    with pytest.raises(UserError, match=r"line 1 of .*answers another question.*new --answers_file"):
        speak(tmp_path, caption_prompt="Who is the {label}?")
    log = tmp_path / "answers.jsonl"
    log.write_text("[]\n" + log.read_text())
    with pytest.raises(UserError, match=r"line 1 of log of answers .* is not an object"):
        speak(tmp_path)


def test_a_damaged_answer_is_refused(speak, tmp_path):
    """As long as an answer lacks, for afterwards the captions tell."""
    speak(tmp_path, 1)
    log = tmp_path / "answers.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    lines[2]["text"] += "!"
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match=r"line 3 of .*answers.jsonl is damaged: its text has another digest; drop"):
        speak(tmp_path)
    del lines[2]["metadata"]["digest"]  # as older ones, and published ones
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    speak(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_chunks": 2, "chunk_idx": 2}, "--chunk_idx is 2"),
        ({"top_p": 1.5}, "--top_p is 1.5"),
        ({"caption_prompt": "What is {lable}?"}, "holds {lable}"),
        ({"caption_prompt": " "}, "--caption_prompt is empty"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        CaptionConfig(**options).check()
