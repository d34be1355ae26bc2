"""The cache: whole or not there, made again where damaged, safe for several processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kronsae.support.cache import MANIFEST, cache_root, cached_folder, is_whole
from kronsae.support.errors import UserError


def writer(text: str, calls: list[str] | None = None) -> Callable[[Path], None]:
    def make(into: Path) -> None:
        if calls is not None:
            calls.append(text)
        (into / "inner").mkdir()
        (into / "inner" / "a.txt").write_text(text)
        (into / "b.txt").write_text("b")

    return make


def text_in(folder: Path) -> str:
    return (folder / "inner" / "a.txt").read_text()


class TestRoot:
    def test_the_variable_comes_first(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        monkeypatch.setenv("KRONSAE_CACHE", "~/mine")
        assert cache_root() == Path.home() / "mine"
        monkeypatch.delenv("KRONSAE_CACHE")
        assert cache_root() == tmp_path / "xdg" / "kronsae"
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert cache_root() == Path.home() / ".cache" / "kronsae"

    def test_a_relative_one_is_from_here(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("KRONSAE_CACHE", "here")
        assert cache_root() == Path.cwd() / "here"


class TestFolder:
    def test_it_is_made_once(self, tmp_path: Path) -> None:
        calls: list[str] = []
        folder = tmp_path / "deep" / "entry"
        assert not is_whole(folder)
        assert cached_folder(folder, writer("one", calls)) == folder
        assert cached_folder(folder, writer("two", calls)) == folder
        assert (calls, text_in(folder)) == (["one"], "one")
        assert is_whole(folder)

    @pytest.mark.parametrize(
        "damage",
        [
            lambda folder: (folder / "b.txt").unlink(),
            lambda folder: (folder / "b.txt").write_text("c"),
            lambda folder: (folder / "b.txt").write_text("bb"),
            lambda folder: (folder / "inner" / "a.txt").write_text(""),
            lambda folder: (folder / MANIFEST).unlink(),
            lambda folder: (folder / MANIFEST).write_text("{"),
            lambda folder: (folder / MANIFEST).write_text('{"files": {}}'),
            lambda folder: (folder / MANIFEST).write_text("[]"),
        ],
    )
    def test_a_damaged_one_is_made_again(self, damage: Callable[[Path], object], tmp_path: Path) -> None:
        folder = cached_folder(tmp_path / "entry", writer("one"))
        damage(folder)
        assert not is_whole(folder)
        cached_folder(folder, writer("two"))
        assert is_whole(folder)
        assert text_in(folder) == "two"
        assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == ["entry"]

    def test_a_failure_leaves_nothing(self, tmp_path: Path) -> None:
        def make(into: Path) -> None:
            writer("one")(into)
            raise UserError("no")

        with pytest.raises(UserError, match="no"):
            cached_folder(tmp_path / "entry", make)
        assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == []

    def test_what_a_killed_process_left_goes(self, tmp_path: Path) -> None:
        left = tmp_path / ".entry.abc.part"
        left.mkdir()
        (left / "half").write_text("half")
        other = tmp_path / ".entry-2.abc.part"
        other.mkdir()
        cached_folder(tmp_path / "entry", writer("one"))
        assert not left.exists()
        assert other.exists()

    def test_others_may_read_it_as_far_as_the_umask_lets_them(self, tmp_path: Path) -> None:
        def make(into: Path) -> None:
            (into / "a").write_text("a")
            (into / "a").chmod(0o600)

        before = os.umask(0o022)
        try:
            folder = cached_folder(tmp_path / "entry", make)
        finally:
            os.umask(before)
        assert (folder / "a").stat().st_mode & 0o777 == 0o644
        assert folder.stat().st_mode & 0o777 == 0o755

    def test_a_place_that_cannot_be_written_to(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match=r"^KRONSAE_CACHE must be a folder"):
            cached_folder(tmp_path / "file" / "entry", writer("one"))


SCRIPT = """
import sys, time
from pathlib import Path
from kronsae.support.cache import cached_folder

def make(into):
    Path(sys.argv[2]).open("a").write("made\\n")
    (into / "a.txt").write_text("a" * 1000)
    time.sleep(0.5)

folder = cached_folder(Path(sys.argv[1]), make)
print((folder / "a.txt").read_text() == "a" * 1000)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no locks")
def test_two_processes_at_once_make_it_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "cache" / "entry"), str(log)]
    at_work = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate(timeout=120)[0].strip() for process in at_work] == ["True"] * 3
    assert log.read_text() == "made\n"


def test_without_locks_the_quicker_one_stays(tmp_path: Path) -> None:
    def make(into: Path) -> None:
        writer("slow")(into)
        if not folder.exists():  # meanwhile another process comes to its end
            (tmp_path / "elsewhere").mkdir()
            cached_folder(tmp_path / "elsewhere" / "entry", writer("quick")).rename(folder)

    folder = tmp_path / "entry"
    cached_folder(folder, make)
    assert text_in(folder) == "quick"
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".part")] == []
