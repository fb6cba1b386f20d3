"""What is read from users' files: regular ones only, JSON of any bytes, folders as they were written."""

import os
import socket
import subprocess
import sys

import pytest

from vlm_jax.files import (
    HEADER,
    ChecksumError,
    JsonError,
    NotRegular,
    check_checksums,
    lock,
    open_regular,
    parse_json,
    read_regular,
    write_checksums,
)


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(tmp_path / "socket"))
    (tmp_path / "real").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for name in ("fifo", "/dev/zero"):
        with pytest.raises(NotRegular, match="is not a regular file"):
            open_regular(tmp_path / name)
    with pytest.raises(OSError, match="socket"):
        open_regular(tmp_path / "socket")
    with pytest.raises(IsADirectoryError):
        open_regular(tmp_path)
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "none")
    assert read_regular(tmp_path / "link") == b"x"


def test_no_file_stays_open_where_one_is_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    before = len(os.listdir("/proc/self/fd"))
    for name in ("fifo", "."):
        with pytest.raises(OSError):
            open_regular(tmp_path / name)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("raw", "cause"),
    [
        (b'{"a": }', "is not JSON: Expecting value at column 7"),
        (b"[1,\n2,\n}", "is not JSON: Expecting value at line 3, column 1"),
        (b'"\xff"', r"is not UTF-8 \(invalid start byte at byte 1\)"),
        (b"[" * 100_000 + b"]" * 100_000, "is nested too deeply"),
        (b"1" * 5_000, "has a number of more than 4,300 digits"),
        (b"", "is not JSON: Expecting value at column 1"),
    ],
)
def test_bytes_that_are_not_json(raw, cause):
    with pytest.raises(JsonError, match=f"^{cause}$"):
        parse_json(raw)


def test_line_separators_stand_in_strings():
    assert parse_json('{"a": "\u2028\u0085"}'.encode()) == {"a": "\u2028\u0085"}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("a.json", "sub/b.txt"):
        (tmp_path / name).write_text(name)
    write_checksums(tmp_path)
    return tmp_path


def test_a_folder_as_it_was_written(folder):
    (folder / "more").write_text("may be added")
    check_checksums(folder, advice="")
    subprocess.run(["sha256sum", "--check", "--quiet", "checksums.sha256"], cwd=folder, check=True)


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (lambda folder: (folder / "sub" / "b.txt").write_text("sub/c.txt"), "sub/b.txt: is not the file that was written"),
        (lambda folder: (folder / "a.json").unlink(), "a.json: No such file"),
        (lambda folder: (folder / "checksums.sha256").write_text(f"{HEADER}0"), "checksums.sha256 is damaged"),
        (lambda folder: (folder / "checksums.sha256").write_text(f"{HEADER}{64 * '0'}  ../x\n"), "checksums.sha256 is damaged"),
    ],
)
def test_a_folder_that_was_changed(folder, damage, cause):
    damage(folder)
    with pytest.raises(ChecksumError, match=f"{cause}.*Copy it again"):
        check_checksums(folder, advice="Copy it again")


def test_somebody_elses_checksums_are_not_ours(folder):
    (folder / "checksums.sha256").write_text(f"{64 * '0'} *a.json\n")
    check_checksums(folder, advice="")


def test_only_some_names_are_compared(folder):
    (folder / "a.json").write_text("other")
    check_checksums(folder, advice="", only=lambda name: name.startswith("sub/"))
    with pytest.raises(ChecksumError):
        check_checksums(folder, advice="", only=lambda name: name == "a.json")


def test_a_lock_is_held_by_one_process_and_goes_with_it(tmp_path):
    script = """
import sys
from vlm_jax.files import lock
file = open(sys.argv[1], "a")
lock(file, "")
print("held", flush=True)
input()
"""
    command = [sys.executable, "-c", script, str(tmp_path / "lock")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with (tmp_path / "lock").open("a") as file:
        with pytest.raises(BlockingIOError, match="busy with it"):
            lock(file, "busy with it")
        process.kill()
        process.wait()
        lock(file, "busy with it")
