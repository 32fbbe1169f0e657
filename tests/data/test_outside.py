"""Files that name others: none leads out of the folder that was given, and archives write nothing."""

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from data.benchmark_sets import LAYOUTS, _hateful_memes
from data.tar_files import TarFile
from utils.errors import UserError


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "img/../../secret.png"])
def test_hateful_memes(tmp_path, name):
    rows = [{"img": "img/1.png", "label": 0}, {"img": name, "label": 1}]
    (tmp_path / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="which is not below"):
        _hateful_memes(tmp_path, tmp_path, "test")


def write_lines(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b"])
def test_voc(tmp_path, name):
    write_lines(tmp_path / "VOC2007/ImageSets/Main/test.txt", "000001", name)
    with pytest.raises(UserError, match="which is no name of VOC's"):
        LAYOUTS["voc2007classification"].read(tmp_path, tmp_path / "VOC2007", "test")


@pytest.mark.parametrize("name", ["../secret", "/etc", ".."])
def test_objectnet(tmp_path, name):
    (tmp_path / "folder_to_objectnet_label.json").write_text(json.dumps({"chair": "Chair", name: "Secret"}))
    (tmp_path / "objectnet_to_imagenet_1k.json").write_text(json.dumps({"Chair": "chair", "Secret": "x"}))
    with pytest.raises(UserError, match="which is not below its images"):
        LAYOUTS["objectnet"].read(tmp_path, tmp_path, "test")


@pytest.mark.parametrize("name", ["../../../../secret", "/etc/secret"])
def test_lists_that_torchvision_reads(tmp_path, name):
    data = tmp_path / "fgvc-aircraft-2013b/data"
    write_lines(data / "variants.txt", "707-320")
    write_lines(data / "images_variant_test.txt", "0034309 707-320", f"{name} 707-320")
    (data / "images").mkdir()
    with pytest.raises(UserError, match="which is not below"):
        LAYOUTS["fgvc-aircraft-2013b"].read(tmp_path, data, "test")


@pytest.mark.parametrize("name", ["../up.png", "/abs.png", "link.png", "hard.png", "zero.png"])
def test_members_of_archives_that_lead_elsewhere(tmp_path, name):
    """Nothing is unpacked, and what could lead elsewhere is told: an image that lacks would shift all that follow."""
    kinds = {"link.png": tarfile.SYMTYPE, "hard.png": tarfile.LNKTYPE, "zero.png": tarfile.CHRTYPE}
    image = io.BytesIO()
    Image.new("RGB", (2, 2)).save(image, "PNG")
    path = tmp_path / "pool" / "a.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as archive:
        for each in ("fine.png", name):
            member = tarfile.TarInfo(each)
            if each in kinds:
                member.type, member.linkname = kinds[each], "/etc/passwd"
            else:
                member.size = len(image.getvalue())
            archive.addfile(member, io.BytesIO(image.getvalue()) if member.size else None)
    with pytest.raises(UserError, match=f"its member '{name}'"):
        TarFile(path, {"png"}, "images")
    assert len(TarFile(path, {"txt"}, "texts")) == 0  # of others' kinds
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["a.tar", "pool"]


def header(name: str, kind: bytes = tarfile.REGTYPE, body: bytes = b"", size: int | None = None) -> bytes:
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, len(body) if size is None else size
    return member.tobuf(tarfile.GNU_FORMAT) + body + bytes(-len(body) % 512)


def pax(line: str) -> bytes:
    return header("x", tarfile.XHDTYPE, f"{len(line) + 4} {line}\n".encode())


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (header("0.png", size=-512), "its member '0.png' claims -512 bytes"),  # the next one would be itself, for ever
        (pax("size=-512") + header("0.png"), "claims -512 bytes"),
        (pax("size=" + "9" * 30) + header("0.png"), "too large|cannot fit"),
        (header("l", tarfile.GNUTYPE_LONGNAME, b"0.png") * 3000 + header("0.png"), "recursion"),
        (pax("path=0.png") * 3000 + header("0.png"), "recursion"),
        (pax("GNU.sparse.map=a,b") + pax("GNU.sparse.size=9") + header("0.png"), "invalid literal"),
    ],
)
def test_headers_that_no_archive_has(tmp_path, content, told):
    (tmp_path / "a.tar").write_bytes(header("fine.png", body=b"x") + content + bytes(1024))
    with pytest.raises(UserError, match=told) as error:
        TarFile(tmp_path / "a.tar", {"png"}, "images")
    assert "a.tar cannot be read" in str(error.value) and "\n" not in str(error.value)
