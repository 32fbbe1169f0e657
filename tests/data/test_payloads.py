"""Payloads of TSV files, to the byte, and captions in all the forms that stopped the published reader."""

import base64
import json

import numpy as np
import pytest

from data.payloads import caption_of, image_payload, read_image_payload, read_vector, vector_payload
from utils.errors import UserError

VECTOR = np.array([1.0, -2.0, 0.5])


def refused(work, *arguments):
    with pytest.raises(UserError) as caught:
        work(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_worked_bytes_of_a_feature():
    assert VECTOR.astype("<f4").tobytes().hex() == "0000803f000000c00000003f"
    assert vector_payload(VECTOR) == b"AACAPwAAAMAAAAA/"
    assert read_vector(b"AACAPwAAAMAAAAA/", "here").tolist() == VECTOR.tolist()
    assert read_vector(vector_payload(VECTOR), "here").dtype == np.float32
    wide = vector_payload(np.zeros(768))
    assert len(wide) == 4096 and b"=" not in wide


@pytest.mark.parametrize("payload", [b"AACAPwAAAMAAAAA", b"AACAPwAA MAAAAA/", b"AACAPwAAAMAAAAA\xff", b"A"])
def test_what_is_no_base64(payload):
    assert "line 3 of x.tsv is not base64, as an image" in refused(read_image_payload, payload, "line 3 of x.tsv")


def test_a_feature_of_another_width():
    payload = vector_payload(VECTOR)
    assert read_vector(payload, "line 3", 3).tolist() == VECTOR.tolist()
    assert "line 3 has 3 numbers, not 4" in refused(read_vector, payload, "line 3", 4)
    half = base64.b64encode(np.zeros(768, dtype=np.float16).tobytes())
    assert "has 384 numbers (as float16 numbers read as float32 have), not 768" in refused(read_vector, half, "x", 768)
    assert "has 5 bytes, which are no float32" in refused(read_vector, base64.b64encode(b"12345"), "x")
    assert "has 0 bytes" in refused(read_vector, b"", "x")


def test_an_image_is_as_it_was():
    content = bytes(range(256))
    assert image_payload(content) == base64.b64encode(content)
    assert read_image_payload(image_payload(content), "x") == content


@pytest.mark.parametrize(
    ("payload", "caption"),
    [
        ('{"captions": ["a cat"]}', "a cat"),
        ('{"captions": "a cat"}', "a cat"),
        ('{"caption": "a cat", "tags": "x"}', "a cat"),
        ('{"caption": ["a cat"]}', "a cat"),
        ('"a cat"', "a cat"),
        ('["a cat", "a dog"]', "a cat"),
        ('[{"caption": "a cat"}]', "a cat"),
        ('{"file_name": "0.png", "text": "a cat"}', "a cat"),
        ("a [unused0] with [unused0]", "a person with person"),
        ('{"caption": "a [unused0]"}', "a person"),
        ("a “café” {", "a “café” {"),
        ('{"caption": "caf\\u00e9"}', "café"),
        # What stopped the published reader.
        ("2012", "2012"),
        ("null", "null"),
        ("1.50", "1.50"),
        ("true", "true"),
        ('"captions"', "captions"),
        ('"no captions here"', "no captions here"),
        ("[]", ""),
        ('{"captions": []}', ""),
        ('{"caption": null}', ""),
        ('{"captions": [2012]}', "2012"),
        ("", ""),
        ('""', ""),
        ("[" * 100_000, "[" * 100_000),
    ],
)
def test_captions(payload, caption):
    assert caption_of(payload.encode()) == caption


def test_chance_picks_among_captions():
    payload = json.dumps({"captions": ["a", "b", "c", "d"]}).encode()
    assert [caption_of(payload, chance) for chance in (0, 0.24, 0.25, 0.74, 0.75, 0.9999999999999999)] == list("aabcdd")


def test_class_names_fill_templates():
    payload = json.dumps({"task": "classification", "class_name": ["salt, pepper", "black+tan"]}).encode()
    found = [caption_of(payload, (place + 0.5) / 162) for place in range(162)]
    names = ["salt pepper", "black tan"]
    assert len(set(found)) == 162
    for number, name in enumerate(names):
        assert all(name in caption for caption in found[number * 81 : number * 81 + 81])
    assert found[80] == "salt pepper." and found[161] == "black tan."
    assert "a photo of a salt pepper." in found
    assert caption_of(b'{"tags": "a, b"}', 0.9999) == "a b."


def test_an_object_without_a_caption():
    with pytest.raises(ValueError, match="none of captions, caption, tags, class_name and text"):
        caption_of(b'{"task": "detection", "class_name": "cat"}')
