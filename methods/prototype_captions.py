"""The caption stage of `--method vlcp`: a vision-language model says of every training image what it looks like.

There is one question an image, which names its class. Answers are appended to a log, one JSON line each as LLaVA's own
script lays them out, so that a killed run goes on behind the last whole line. Where every image has its answer, they
are cleaned as published and written to `metadata.jsonl`, which the later stages and the `datasets` library read.

The paper asks LLaVA-1.5-7B at temperature 0.2, unseeded; here decoding is greedy unless a temperature is given, and
then each image has its own seed. Batches are cut from the full list of images, whatever is answered already and into
how many chunks the work is split, so the captions are the same however they came about.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from data.cache import picture
from data.catalogue import Catalogue
from data.metadata import METADATA, read_metadata, write_metadata
from networks.captioner import Captioner, load_captioner
from utils.config import option
from utils.errors import UserError
from utils.files import digest, write_text
from utils.parsing import parse_json
from utils.progress import progress
from utils.rng import derive_seed

CATEGORY = "detail"  # of every published question
LABEL = "label"  # in place of a model


@dataclass(frozen=True)
class CaptionConfig:
    """How the training images are captioned."""

    caption_model: str = option(
        "llava-hf/llava-1.5-7b-hf",
        "image-to-text model: a hub id or a transformers folder; label is none: a class's name is the caption of its "
        "images, as in D4M; tiny needs no download and says random words",
        aliases=("model-path",),
    )
    caption_prompt: str = option(
        "Describe how the {label} in this picture looks: its shape, pose, colours and any distinctive features.",
        "question about each image; {label} is its class",
    )
    question_file: str = option(
        "", "JSON lines of question_id, image and text to ask instead", aliases=("question-file",)
    )
    questions_out: str = option("", "also write the questions to this file, as JSON lines", free=True)
    answers_file: str = option(
        "",
        "log of the answers, which is gone on with (empty: answers.jsonl in the run folder)",
        aliases=("answers-file",),
    )
    temperature: float = option(0.0, "0 takes the likeliest word each time; 0.2 draws, as published", low=0)
    top_p: float | None = option(None, "draw from the likeliest words of this total probability only", above=0)
    num_beams: int = option(1, "beams of the search for an answer", low=1)
    max_new_tokens: int = option(1024, "longest answer, in tokens", low=1)
    caption_batch: int = option(8, "images captioned at once", low=1)
    num_chunks: int = option(
        1, "split the images between so many commands of one run folder", aliases=("num-chunks",), low=1, free=True
    )
    chunk_idx: int = option(0, "which chunk this command captions, from 0", aliases=("chunk-idx",), low=0, free=True)

    def check(self) -> None:
        if self.chunk_idx >= self.num_chunks:
            raise UserError(f"--chunk_idx is {self.chunk_idx}; of --num_chunks {self.num_chunks} the first is 0")
        if self.top_p is not None and self.top_p > 1:
            raise UserError(f"--top_p is {self.top_p}; it is a probability, such as 0.9")
        if self.temperature and self.num_beams > 1:
            told = f"--num_beams {self.num_beams} searches and --temperature {self.temperature:g} draws"
            raise UserError(f"{told}; give one of them")
        unknown = [field for field in re.findall(r"\{[^{}]*\}", self.caption_prompt) if field != "{label}"]
        if unknown:
            raise UserError(f"--caption_prompt holds {unknown[0]}; only {{label}} is filled in")
        if not self.caption_prompt.strip():
            raise UserError("--caption_prompt is empty; ask something, such as 'Describe the {label}.'")

    def idle(self) -> dict[str, str]:
        if self.caption_model == LABEL:
            asked = (field.name for field in fields(self) if field.name != "caption_model")
            return dict.fromkeys(asked, "a --caption_model that looks at images")
        found = {} if self.temperature else {"top_p": "a --temperature above 0"}
        return found | ({"caption_prompt": "leaving out --question_file"} if self.question_file else {})


@dataclass(frozen=True)
class Question:
    """What is asked about one image; `file` is `<class>/<file>` below the training folder."""

    number: int
    file: str
    text: str


def write_captions(
    cfg: CaptionConfig,
    catalogue: Catalogue,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
) -> dict[str, str] | None:
    """Each training image's caption, by `<class>/<file>`; None as long as other chunks lack answers.

    Goes on with the log of answers and, once all are there, writes `folder`/metadata.jsonl. No model is loaded where
    nothing is missing.
    """
    if cfg.caption_model == LABEL:
        kinds = zip(catalogue.kinds, catalogue.train, strict=True)
        captions = {file: kind.label for kind, files in kinds for file in files}
        return _written(folder / METADATA, catalogue, captions)
    questions = ask(cfg, catalogue)
    if cfg.questions_out:
        _write_questions(Path(cfg.questions_out), questions)
    log = _log_path(cfg, folder)
    answers = _read_family(log, questions)
    batches = _batches(cfg, questions, answers)
    if batches:
        captioner = load_captioner(cfg.caption_model, catalogue.cache_dir, device, dtype)
        answers |= _answer(cfg, catalogue, captioner, log, batches, answers, seed)
    missing = len(questions) - len(answers)
    if missing:
        answers = _read_family(log, questions)  # another chunk may have ended since
        missing = len(questions) - len(answers)
    if missing:
        print(f"chunk {cfg.chunk_idx} of {cfg.num_chunks} is captioned; {missing:,} images are left to the others")
        return None
    return _written(folder / METADATA, catalogue, _captions(catalogue, questions, answers))


def ask(cfg: CaptionConfig, catalogue: Catalogue) -> list[Question]:
    """The question about each training image, in the order of the files' names, or of `--question_file`.

    UserError where that file leaves out an image or asks twice. Its lines about classes that are not used are passed
    over.
    """
    labels = {kind.ident: kind.label for kind in catalogue.kinds}
    files = sorted(file for names in catalogue.train for file in names)
    if not cfg.question_file:
        return [
            Question(number, file, cfg.caption_prompt.replace("{label}", labels[file.partition("/")[0]]))
            for number, file in enumerate(files)
        ]
    path, wanted, found, numbers = Path(cfg.question_file), set(files), {}, set()
    for number, row in _json_lines(path, "question file"):
        try:
            question = Question(int(row["question_id"]), str(row["image"]), str(row["text"]).strip())
        except (KeyError, TypeError, ValueError):
            raise UserError(f"line {number} of {path} lacks question_id, image or text; write it anew") from None
        if question.file not in wanted:
            if question.file.partition("/")[0] in labels:
                raise UserError(f"line {number} of {path} asks about {question.file}, which is no training image")
            continue
        if question.file in found or question.number in numbers or not question.text:
            what = "an empty question" if not question.text else "an image or question_id for the second time"
            raise UserError(f"line {number} of {path} has {what}; correct it")
        found[question.file] = question
        numbers.add(question.number)
    absent = [file for file in files if file not in found]
    if absent:
        raise UserError(f"{path} asks nothing about {len(absent):,} training images, such as {absent[0]}; complete it")
    return list(found.values())


def clean(answer: str) -> str:
    """An answer as a caption: no `"`, no `'s`, as published, and single spaces."""
    return " ".join(answer.replace('"', "").replace("'s", "").split())


def _batches(cfg: CaptionConfig, questions: Sequence[Question], answers: dict[int, str]) -> list[list[Question]]:
    """This chunk's batches that lack an answer, each whole: a model's rounding may hang on what is beside an image."""
    size = cfg.caption_batch
    batches = [list(questions[start : start + size]) for start in range(0, len(questions), size)]
    share = -(-len(batches) // cfg.num_chunks)
    mine = batches[share * cfg.chunk_idx : share * (cfg.chunk_idx + 1)]
    return [batch for batch in mine if any(question.number not in answers for question in batch)]


def _answer(
    cfg: CaptionConfig,
    catalogue: Catalogue,
    captioner: Captioner,
    log: Path,
    batches: Sequence[Sequence[Question]],
    known: dict[int, str],
    seed: int,
) -> dict[int, str]:
    """Ask about the images of these batches; append what is new to the log and return it."""
    found: dict[int, str] = {}
    log.parent.mkdir(parents=True, exist_ok=True)
    _drop_torn_line(log)
    with open(log, "a", encoding="utf-8") as file, progress(total=sum(map(len, batches)), what="captions") as bar:
        for batch in batches:
            images = []
            for question in batch:
                with picture(catalogue.train_root / question.file, catalogue.train_root) as image:
                    images.append(image.convert("RGB"))
            seeds = [derive_seed(seed, "caption", question.file) for question in batch]
            texts = captioner(
                images,
                [question.text for question in batch],
                seeds if cfg.temperature else None,
                cfg.max_new_tokens,
                cfg.temperature,
                cfg.top_p,
                cfg.num_beams,
            )
            for question, text in zip(batch, texts, strict=True):
                if question.number not in known:
                    file.write(_line(question, text, cfg.caption_model))
                    found[question.number] = text
            file.flush()
            os.fsync(file.fileno())
            bar.update(len(batch))
    return found


def _line(question: Question, text: str, model: str) -> str:
    """An answer as the log keeps it: the published keys, and the image, which a number alone does not tell."""
    row = {
        "question_id": question.number,
        "prompt": question.text,
        "text": text,
        "answer_id": digest(question.file, question.text, model)[:22],
        "model_id": model,
        "metadata": {"image": question.file, "digest": digest(text)[:22]},
    }
    return json.dumps(row, ensure_ascii=False) + "\n"


def _log_path(cfg: CaptionConfig, folder: Path) -> Path:
    """The log of this chunk: `answers.jsonl`, or `answers.<chunk>-of-<chunks>.jsonl`, which no other command writes."""
    path = Path(cfg.answers_file) if cfg.answers_file else folder / "answers.jsonl"
    if path.is_dir():
        raise UserError(f"--answers_file {path} is a folder; name a file, such as {path / 'answers.jsonl'}")
    if cfg.num_chunks == 1:
        return path
    return path.with_name(f"{path.stem}.{cfg.chunk_idx}-of-{cfg.num_chunks}{path.suffix}")


def _read_family(log: Path, questions: Sequence[Question]) -> dict[int, str]:
    """Every answer in a log and in those of other chunks beside it, by question; a torn last line counts for nothing.

    UserError where an answer is to a question that is not asked.
    """
    asked = {question.number: question for question in questions}
    stem = re.sub(r"\.\d+-of-\d+$", "", log.stem)
    family = re.compile(re.escape(stem) + r"(\.\d+-of-\d+)?" + re.escape(log.suffix))
    answers: dict[int, str] = {}
    for path in sorted(log.parent.iterdir()) if log.parent.is_dir() else []:
        if not family.fullmatch(path.name):
            continue
        for number, row in _json_lines(path, "log of answers", torn=True):
            try:
                ident, prompt, text = int(row["question_id"]), row["prompt"], str(row["text"])
                image = (row.get("metadata") or {}).get("image")
                told = (row.get("metadata") or {}).get("digest")
            except (KeyError, TypeError, ValueError, AttributeError):
                raise UserError(f"line {number} of {path} lacks question_id, prompt or text; drop the line") from None
            question = asked.get(ident)
            if question is None or question.text != prompt or image not in (None, question.file):
                raise UserError(
                    f"line {number} of {path} answers another question (question_id {ident}); name a new "
                    "--answers_file, or go on with the images and questions it began with"
                )
            if told not in (None, digest(text)[:22]):
                raise UserError(f"line {number} of {path} is damaged: its text has another digest; drop the line")
            answers.setdefault(ident, text)
    return answers


def _captions(catalogue: Catalogue, questions: Sequence[Question], answers: dict[int, str]) -> dict[str, str]:
    """Each image's cleaned caption; where nothing is left of it, its class."""
    labels = {kind.ident: kind.label for kind in catalogue.kinds}
    captions = {question.file: clean(answers[question.number]) for question in questions}
    empty = [file for file, text in captions.items() if not text]
    if empty:
        print(f"note: the model said nothing about {len(empty):,} images, such as {empty[0]}; their class stands in")
    return captions | {file: labels[file.partition("/")[0]] for file in empty}


def _written(path: Path, catalogue: Catalogue, captions: dict[str, str]) -> dict[str, str]:
    """The captions, which are in the file `path` then; UserError where others are: somebody's corrections, perhaps."""
    if path.exists() and read_metadata(path, catalogue, allow_missing=True) != captions:
        raise UserError(
            f"{path} has other captions than were found here, such as corrections; go on with these by --stages "
            "finetune, or delete the file to have it written again"
        )
    write_metadata(path, captions)
    return captions


def _write_questions(path: Path, questions: Sequence[Question]) -> None:
    rows = (
        {"question_id": question.number, "image": question.file, "text": question.text, "category": CATEGORY}
        for question in questions
    )
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _json_lines(path: Path, what: str, torn: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    """The number and the value of each line that is not empty; `torn`: a last one cut short is left out."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        raise UserError(f"no {what} at {path}") from None
    if torn and not _whole(lines[-1]):
        lines = lines[:-1]
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = parse_json(line)
            except ValueError as error:
                raise UserError(f"line {number} of {what} {path} is not valid JSON ({error})") from None
            if not isinstance(row, dict):
                raise UserError(f"line {number} of {what} {path} is not an object with names; correct it")
            yield number, row


def _drop_torn_line(log: Path) -> None:
    """End a log in a whole line."""
    content = log.read_bytes() if log.exists() else b""
    last = content.rfind(b"\n") + 1
    if content[last:] and _whole(content[last:]):
        with open(log, "ab") as file:
            file.write(b"\n")
    elif content[last:]:
        os.truncate(log, last)


def _whole(line: bytes) -> bool:
    """Whether a line without an end was cut short by nothing but its end."""
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False
