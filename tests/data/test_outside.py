"""Files that name others: none leads out of the folder that was given, and archives write nothing."""

import io
import json
import tarfile

import pytest
from PIL import Image

from data.benchmark_sets import _hateful_memes
from data.tar_files import TarFile
from utils.errors import UserError


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "img/../../secret.png"])
def test_hateful_memes(tmp_path, name):
    rows = [{"img": "img/1.png", "label": 0}, {"img": name, "label": 1}]
    (tmp_path / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="which is not below"):
        _hateful_memes(tmp_path, tmp_path, "test")


def test_members_of_archives_that_lead_elsewhere(tmp_path):
    """Nothing is unpacked: members are read where they lie in the archive, links and devices not at all."""
    image = io.BytesIO()
    Image.new("RGB", (2, 2)).save(image, "PNG")
    path = tmp_path / "pool" / "a.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as archive:
        for name in ("../up.png", "/abs.png", "fine.png"):
            member = tarfile.TarInfo(name)
            member.size = len(image.getvalue())
            archive.addfile(member, io.BytesIO(image.getvalue()))
        for name, kind in (("link.png", tarfile.SYMTYPE), ("hard.png", tarfile.LNKTYPE), ("zero.png", tarfile.CHRTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
    found = TarFile(path, {"png"}, "images")
    assert len(found) == 3 and {found.raw(row) for row in range(3)} == {image.getvalue()}
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["a.tar", "pool"]
