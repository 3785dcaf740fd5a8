"""The gates for files, names and texts of strangers."""

import os
import socket
from pathlib import Path

import pytest

from carft_ray.errors import DataError, RecipeError, StorageError
from carft_ray.untrusted import (
    csv_cell,
    html,
    is_name,
    latex,
    markdown,
    of_csv_cell,
    read_regular,
    read_text,
    require_nothing_outside,
    visible,
)


def test_a_regular_file_is_read_whole_through_links_and_text_must_be_utf_8(tmp_path):
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbfgr\xc3\xbcn")
    (tmp_path / "link").symlink_to("a")
    assert read_regular(tmp_path / "link") == b"\xef\xbb\xbfgr\xc3\xbcn"
    assert read_text(tmp_path / "link") == "grün"
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "b")
    (tmp_path / "a").write_bytes(b"abc\xff")
    with pytest.raises(DataError, match="must be text in UTF-8, but byte 3 is not"):
        read_text(tmp_path / "a")


def test_what_is_no_regular_file_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    os.mkfifo("pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        with pytest.raises(OSError):  # noqa: PT011  # the system's own, ENXIO
            read_regular(tmp_path / "socket")
    special = "a pipe, device or socket"
    for name, kind in (("pipe", special), ("/dev/zero", special), (".", "a folder")):
        with pytest.raises(RecipeError, match=f"must be a regular file, but got {kind}$"):
            read_regular(tmp_path / name, error=RecipeError)
    with pytest.raises(DataError, match=r"a\\x00b: must be the name of a file"):
        read_regular(tmp_path / "a\0b")


def test_a_file_over_the_limit_is_not_read(tmp_path):
    (tmp_path / "sparse").touch()
    os.truncate(tmp_path / "sparse", 10**12)
    with pytest.raises(DataError, match="at most 67,108,864 bytes, since it is read whole, but got 1,000,000,000,000"):
        read_regular(tmp_path / "sparse")
    (tmp_path / "small").write_bytes(b"123")
    assert read_regular(tmp_path / "small", most_bytes=3) == b"123"
    for path in (tmp_path / "small", "/proc/self/status"):  # whose size is said to be 0
        with pytest.raises(DataError, match="at most 2 bytes"):
            read_regular(path, most_bytes=2)


def test_what_may_leave_a_folder_is_no_name():
    assert all(map(is_name, ("t0001-ab", "a", "A.b_c-9", "x" * 200)))
    others = ("", ".", "..", ".a", "-a", "a/b", "../a", "/a", "a\n", "a\0", "ü", "a b", "x" * 201)
    assert not any(map(is_name, others))


def test_a_folder_from_which_a_link_leads_out_is_refused_and_a_link_within_it_is_not(tmp_path):
    folder, victim = tmp_path / "study", tmp_path / "victim"
    (folder / "trials" / "t0").mkdir(parents=True)
    victim.mkdir()
    (folder / "latest").symlink_to("trials/t0")
    (tmp_path / "linked").symlink_to(folder)
    for place in (folder, tmp_path / "linked", tmp_path / "not there"):
        require_nothing_outside(place, StorageError)
    for target in (victim, Path("../../../victim/new"), Path("/etc")):
        (folder / "trials" / "t0" / "log.txt").symlink_to(target)
        with pytest.raises(StorageError, match=r"t0/log.txt: must not lead out of .*, but got a link to /"):
            require_nothing_outside(tmp_path / "linked", StorageError)
        (folder / "trials" / "t0" / "log.txt").unlink()
    os.mkfifo(folder / "trials" / "result.json")
    with pytest.raises(
        StorageError, match=r"result.json: must be a file or a folder, but got a pipe, device or socket"
    ):
        require_nothing_outside(folder, StorageError)


# how a text is shown, the text, and what is written
SHOWN = [
    (visible, "a\tb\nüñ 日本 [red] e\u0301", "a\tb\nüñ 日本 [red] e\u0301"),
    (visible, "\x1b]0;x\x07", r"\x1b]0;x\x07"),
    (visible, "a\u202eb\u2066c\u200fd\r\x9b\ud800\u2028", r"a\u202eb\u2066c\u200fd\r\x9b\ud800\u2028"),
    (latex, r"50 % of {a}_b\input{x}", r"50 \% of \{a\}\_b\textbackslash{}input\{x\}"),
    (latex, "~^$&#", r"\textasciitilde{}\textasciicircum{}\$\&\#"),
    (latex, "[red]\n\n<a|b>", r"{}[red] \textless{}a\textbar{}b\textgreater{}"),
    (markdown, "a\n# <b> [x](y) `c` $x$", r"a # \<b\> \[x\](y) \`c\` \$x\$"),
    (markdown, "_a_ id_val __b", r"\_a\_ id_val \_\_b"),
    (html, "</script>\x1b\" '&", r"&lt;/script&gt;\x1b&quot; &#x27;&amp;"),
    *((csv_cell, text, f"'{text}") for text in ("=1+1", "+1", "-1", "@a")),
    (csv_cell, "a=1", "a=1"),
    (csv_cell, "", ""),
]


@pytest.mark.parametrize(("show", "text", "written"), SHOWN)
def test_a_text_is_shown_as_it_is_and_steers_nothing(show, text, written):
    assert show(text) == written


def test_a_cell_is_read_back_as_it_was():
    for text in ("=1", "'=1", "''-", "'tis", "'", "a", ""):
        assert of_csv_cell(csv_cell(text)) == text
