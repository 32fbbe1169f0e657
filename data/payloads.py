"""What a record of a TSV file carries: a feature, an encoded image, or a caption."""

from __future__ import annotations

import base64
import binascii
import json
from functools import cache
from typing import Any

import numpy as np

from utils.errors import UserError
from utils.parsing import is_utf8


def vector_payload(vector: np.ndarray) -> bytes:
    """A feature, (d,), as a payload: base64 of float32 numbers, low byte first."""
    return base64.b64encode(np.ascontiguousarray(vector, dtype="<f4").tobytes())


def read_vector(payload: bytes, where: str, dim: int | None = None) -> np.ndarray:
    """The feature in a payload, (d,) float32; UserError naming `where` when it is none or has not `dim` numbers."""
    content = _decoded(payload, where, "a feature")
    if not content or len(content) % 4:
        raise UserError(f"{where} has {len(content)} bytes, which are no float32 numbers; extract the features again")
    vector = np.frombuffer(content, dtype="<f4").astype(np.float32, copy=False)
    if dim is not None and len(vector) != dim:
        half = " (as float16 numbers read as float32 have)" if len(vector) * 2 == dim else ""
        raise UserError(f"{where} has {len(vector)} numbers{half}, not {dim}; extract the features again")
    return vector


def image_payload(content: bytes) -> bytes:
    """An encoded image file as a payload: its base64."""
    return base64.b64encode(content)


def read_image_payload(payload: bytes, where: str) -> bytes:
    """The encoded image file in a payload; UserError naming `where` when it is not base64."""
    return _decoded(payload, where, "an image")


def caption_of(payload: bytes, chance: float = 0.0) -> str:
    """The caption in a payload: JSON as in `caption_in`, and anything that is no JSON as it is.

    chance  in [0, 1), picks one of several captions and templates

    JSON of a number, of true or of null is a caption that only looks like it, and taken as it is. UnicodeDecodeError
    for what is not UTF-8, ValueError for objects without a caption.
    """
    text = payload.decode()
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = text
    return caption_in(value if isinstance(value, (str, list, dict)) else text, chance)


def caption_in(value: Any, chance: float = 0.0) -> str:
    """The caption that a JSON value holds, `[unused0]` of it read as person.

    A text is one; a list has one in its first item. An object has a text or a list of texts, from which one is picked,
    as `captions`, `caption` or `text`; or `tags`, or, where its `task` is classification, a `class_name`, which fill a
    template. Empty lists and null are the empty caption. ValueError for an object that has none of them.
    """
    if isinstance(value, list):
        value = value[0] if value else ""
    if isinstance(value, dict):
        for field in ("captions", "caption"):
            if field in value:
                return caption_in(_pick(value[field], chance)[0])
        if "tags" in value:
            return _filled(value["tags"], chance)
        if value.get("task") == "classification" and "class_name" in value:
            return _filled(value["class_name"], chance)
        if "text" in value:
            return caption_in(_pick(value["text"], chance)[0])
        raise ValueError("it has none of captions, caption, tags, class_name and text")
    return _words(value).replace("[unused0]", "person")


def _filled(names: Any, chance: float) -> str:
    """One of a class's names in one of the 80 templates of CLIP, or alone before a full stop."""
    name, chance = _pick(names, chance)
    words = _words(name).replace(",", "").replace("+", " ")
    fill, _ = _pick(_templates(), chance)
    return fill(words).replace("[unused0]", "person")


@cache
def _templates() -> list[Any]:
    from open_clip import OPENAI_IMAGENET_TEMPLATES

    return [*OPENAI_IMAGENET_TEMPLATES, "{}.".format]


def _pick(values: Any, chance: float) -> tuple[Any, float]:
    """One of several values, and the chance that is left for another pick."""
    if not isinstance(values, list):
        return values, chance
    if not values:
        return "", chance
    place = chance * len(values)
    return values[min(int(place), len(values) - 1)], place % 1


def _words(value: Any) -> str:
    text = value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)
    if not is_utf8(text):
        raise ValueError("it has half a character")
    return text


def _decoded(payload: bytes, where: str, what: str) -> bytes:
    """The bytes that base64 stands for. Letters that are none of base64's would be skipped, and show in the length."""
    try:
        content = binascii.a2b_base64(payload)
    except binascii.Error:
        content = b""
    if len(payload) % 4 or len(content) != len(payload) // 4 * 3 - payload[-2:].count(b"="):
        raise UserError(f"{where} is not base64, as {what} of a TSV file is; pack the file again")
    return content
