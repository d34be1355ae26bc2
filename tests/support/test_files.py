"""Test that files are replaced atomically."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from kronsae.support import files
from kronsae.support.errors import UserError
from kronsae.support.files import LOCK_FILE, atomic_path, folder_lock, read_json, write_json, write_marked, write_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_only_what_stands_between_the_marks_is_replaced(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- x -->\nold\n<!-- / -->\nb\n<!-- y -->\nkept\n<!-- / -->\nc\n", encoding="utf-8")
    write_marked(page, "<!-- x -->", "<!-- / -->", "new")
    assert page.read_text("utf-8") == "a\n<!-- x -->\nnew\n<!-- / -->\nb\n<!-- y -->\nkept\n<!-- / -->\nc\n"
    with pytest.raises(UserError, match="must hold the marks '<!-- z -->' and '<!-- / -->'"):
        write_marked(page, "<!-- z -->", "<!-- / -->", "new")
    assert "new" in page.read_text("utf-8")


def test_text_and_json_round_trip(tmp_path: Path) -> None:
    write_text(tmp_path / "new" / "folder" / "a.txt", "Ünïcödé\n")
    assert (tmp_path / "new" / "folder" / "a.txt").read_bytes() == "Ünïcödé\n".encode()
    value = {"b": [1, 2.5, None, True], "a": "ö"}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json", "the test") == value
    assert (tmp_path / "a.json").read_text(encoding="utf-8").endswith("}\n")
    assert names(tmp_path) == ["a.json", "new"]


def test_a_failure_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def write_half() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            assert path.read_text() == "old"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_killed_process_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    # kronsae.support.files without kronsae/__init__.py, which imports PyTorch: seconds for nothing
    code = (
        "import os, sys, types; from pathlib import Path\n"
        "sys.modules['kronsae'] = types.ModuleType('kronsae'); sys.modules['kronsae'].__path__ = [sys.argv[2]]\n"
        "from kronsae.support.files import atomic_path\n"
        "with atomic_path(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('half'); os._exit(9)\n"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code, str(path), str(Path(files.__file__).parents[1])], check=False
        ).returncode
        == 9
    )
    assert path.read_text() == "old"
    write_text(path, "new")
    assert path.read_text() == "new"


def test_the_file_replaced_is_another_file(tmp_path: Path) -> None:
    """Whoever has the old one open reads it to its end."""
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with path.open() as reader:
        write_text(path, "new")
        assert reader.read() == "old"


@pytest.mark.skipif(os.name != "posix", reason="permission bits are POSIX")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_permissions_follow_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    """A temporary file is 0600; a run folder that nobody else can read would be a surprise."""
    before = os.umask(umask)
    try:
        write_text(tmp_path / "a.txt", "")
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == mode


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_json_has_no_nan_and_no_inf(tmp_path: Path, value: float) -> None:
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"x": value})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}
    assert names(tmp_path) == ["a.json"]


def test_reading_what_is_not_there_says_what_it_was_for(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        read_json(tmp_path / "a.json", "the run")
    assert str(error.value) == f"the run: {tmp_path / 'a.json'} does not exist."


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"a": 1,}', b"{} {}"])
def test_reading_damaged_json(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError) as error:
        read_json(tmp_path / "a.json", "the run")
    assert str(error.value).startswith(f"the run: {tmp_path / 'a.json'} cannot be read as JSON (")


def test_reading_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^the run: .* must be a file; it is a folder\.$"):
        read_json(tmp_path, "the run")


class TestOnlyWriter:
    def test_a_second_one_is_kept_out_until_the_first_is_done(self, tmp_path: Path) -> None:
        folder = tmp_path / "a" / "b"
        with folder_lock(folder):
            with pytest.raises(UserError) as caught, folder_lock(folder):
                pass
            assert str(caught.value) == (
                f"out must be a folder without another writer; another kronsae process is writing to {folder}. "
                "Wait until it ends, or name another folder."
            )
            (folder / "kept").touch()
        assert names(folder) == ["kept"]
        with folder_lock(folder):
            assert names(folder) == [LOCK_FILE, "kept"]

    def test_what_it_made_is_removed_where_nothing_was_written(self, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        for folder in (tmp_path / "a" / "b", tmp_path / "empty"):
            with pytest.raises(KeyError), folder_lock(folder):
                raise KeyError
        assert names(tmp_path) == ["empty"]

    def test_one_that_was_killed_keeps_nobody_out(self, tmp_path: Path) -> None:
        script = "import sys, time, pathlib\nfrom kronsae.support.files import folder_lock\n"
        script += "with folder_lock(pathlib.Path(sys.argv[1])):\n    print(flush=True)\n    time.sleep(600)"
        command = [sys.executable, "-c", script, str(tmp_path / "r")]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            with pytest.raises(UserError), folder_lock(tmp_path / "r"):
                pass
            process.send_signal(signal.SIGKILL)
        assert names(tmp_path / "r") == [LOCK_FILE]
        with folder_lock(tmp_path / "r"):
            pass
        assert names(tmp_path / "r") == []

    def test_without_locks_it_goes_on(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def none_here(*_: object) -> None:
            raise OSError(95, "Operation not supported")

        monkeypatch.setattr("fcntl.flock", none_here)
        with folder_lock(tmp_path), folder_lock(tmp_path):
            pass
        assert names(tmp_path) == []
