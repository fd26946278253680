"""Unpacking what was downloaded: nothing of an unsafe archive is written, and nothing outside the folder."""

from __future__ import annotations

import io
import os
import stat
import struct
import tarfile
import zipfile
import zlib
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.download import fetch
from data_prep.record import DataError
from tests.data_prep.archives import archive, deflated, noise, tree, zipped


def special_zip(mode: int, target: str = "../outside") -> bytes:
    info = zipfile.ZipInfo("member")
    info.create_system, info.external_attr = 3, mode << 16
    return zipped_infos([info], target)


def zipped_infos(infos: list[zipfile.ZipInfo], content: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for info in infos:
            file.writestr(info, content)
    return buffer.getvalue()


def nameless_zip() -> bytes:
    info = zipfile.ZipInfo("member")
    info.filename = "\0"  # readers end names there
    return zipped_infos([info], "")


def special_tar(name: str, kind: bytes = tarfile.REGTYPE, linkname: str = "") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, linkname
        file.addfile(info)
    return buffer.getvalue()


def encrypted_zip() -> bytes:
    content = bytearray(zipped({"member": b"secret"}))
    content[content.index(b"PK\1\2") + 8] |= 1
    return bytes(content)


ABSOLUTE = f"/tmp/member-of-{os.getpid()}"
UNSAFE = {
    "zip ..": ("a.zip", zipped({"good": b"1", "../x": b"2"}), "does not lie in"),
    "zip inner ..": ("a.zip", zipped({"a/../../x": b"2"}), "does not lie in"),
    "zip absolute": ("a.zip", zipped({ABSOLUTE: b"2"}), "does not lie in"),
    "zip backslash": ("a.zip", zipped({"..\\x": b"2"}), "does not lie in"),
    "zip without a name": ("a.zip", nameless_zip(), "does not lie in"),
    "zip link": ("a.zip", special_zip(stat.S_IFLNK | 0o777), "link"),
    "zip device": ("a.zip", special_zip(stat.S_IFBLK | 0o666), "device"),
    "zip pipe": ("a.zip", special_zip(stat.S_IFIFO | 0o666), "device"),
    "zip encrypted": ("a.zip", encrypted_zip(), "encrypted"),
    "zip bomb": ("a.zip", deflated("zeros", bytes(10_000_000)), "over 100 times"),
    "tar ..": ("a.tar", special_tar("../x"), "does not lie in"),
    "tar absolute": ("a.tar", special_tar(ABSOLUTE), "does not lie in"),
    "tar link": ("a.tar", special_tar("member", tarfile.SYMTYPE, "../outside"), "link"),
    "tar inner link": ("a.tar", special_tar("member", tarfile.SYMTYPE, "good"), "link"),
    "tar hard link": ("a.tar", special_tar("member", tarfile.LNKTYPE, "../outside"), "link"),
    "tar character device": ("a.tar", special_tar("member", tarfile.CHRTYPE), "device"),
    "tar block device": ("a.tar", special_tar("member", tarfile.BLKTYPE), "device"),
    "tar pipe": ("a.tar", special_tar("member", tarfile.FIFOTYPE), "device"),
    "not a zip": ("a.zip", b"<html>Log in</html>", "cannot be unpacked"),
    "cut tar": ("a.tar", special_tar("member")[:300], "cannot be unpacked"),
    "cut tar.gz": ("a.tar.gz", b"\x1f\x8b\x08\0\0\0\0\0\0\3", "cannot be unpacked"),
}


@pytest.mark.parametrize(("name", "content", "reason"), UNSAFE.values(), ids=UNSAFE)
def test_unsafe_archives_are_refused_and_nothing_of_them_is_written(tmp_path, name, content, reason):
    (tmp_path / "outside").write_text("precious")
    target = tmp_path / "target"
    target.mkdir()
    (target / name).write_bytes(content)
    with pytest.raises(DataError, match=reason):
        fetch([archive("https://none.invalid/", content, name=name)], target)
    assert tree(tmp_path) == {"outside": b"precious", f"target/{name}": content}
    assert not Path(ABSOLUTE).exists()


def test_a_compressed_tar_is_not_read_beyond_the_limit(tmp_path):
    """A member of a terabyte is refused by its header: looking for the next one would inflate it all."""
    info = tarfile.TarInfo("zeros")
    info.size = 1 << 40
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as file:
        file.fileobj.write(info.tobuf())  # type: ignore[union-attr]
    content = buffer.getvalue()
    (tmp_path / "a.tgz").write_bytes(content)
    with pytest.raises(DataError, match="1,099,511,627,776 bytes or more"):
        fetch([archive("https://none.invalid/", content, name="a.tgz")], tmp_path)


@pytest.mark.parametrize("forged", [False, True])
def test_a_zip_brings_no_more_than_it_declares(tmp_path, forged):
    """100,000 bytes declared to be ten would pass under the limit: they fail their checksum, or are cut to ten."""
    plain = noise(1000) * 100
    content = bytearray(deflated("member", plain))
    for place in (content.index(b"PK\3\4") + 14, content.index(b"PK\1\2") + 16):
        content[place + 8 : place + 12] = struct.pack("<I", 10)
        if forged:
            content[place : place + 4] = struct.pack("<I", zlib.crc32(plain[:10]))
    (tmp_path / "a.zip").write_bytes(content)
    with nullcontext() if forged else pytest.raises(DataError, match="cannot be unpacked: Bad CRC"):
        fetch([archive("https://none.invalid/", bytes(content))], tmp_path)
    assert tree(tmp_path).get("member", plain[:10]) == plain[:10]


NAMES = st.lists(st.sampled_from(["..", ".", "", "a", "b", "c\\d", "~", "é"]), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(names=st.lists(NAMES.map("/".join).filter(bool), min_size=1, max_size=3, unique=True), tar=st.booleans())
def test_no_name_leads_out_of_the_folder(names, tar):
    with TemporaryDirectory() as outer, pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "sync", lambda: None)
        deep = Path(outer, "1/2/3/4/5/target")
        deep.mkdir(parents=True)
        name = "x.tar" if tar else "x.zip"
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") if tar else zipfile.ZipFile(buffer, "w") as file:
            for member in names:
                if isinstance(file, tarfile.TarFile):
                    file.addfile(tarfile.TarInfo(member))
                else:
                    file.writestr(member, b"")
        (deep / name).write_bytes(buffer.getvalue())
        try:
            fetch([archive("https://none.invalid/", buffer.getvalue(), name=name)], deep)
            assert not any(".." in Path(member).parts or member.startswith("/") for member in names)
        except DataError:
            pass
        assert all(path.startswith("1/2/3/4/5/target/") for path in tree(Path(outer)))
