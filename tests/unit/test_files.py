"""Files and folders that are either whole or absent."""

import errno
import os
import resource
import stat

import pytest
import torch

from launch import run_folder
from megatron_fp16rl.utils import files


def test_a_text_replaces_the_old_one_with_the_mode_asked_for(tmp_path):
    path = tmp_path / "deep" / "secret.json"
    files.write_json(path, {"a": 1}, mode=0o600)
    files.write_json(path, {"a": 2}, mode=0o600)
    assert path.read_text() == '{\n "a": 2\n}\n'
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(path.parent) == ["secret.json"]


def test_a_failed_write_leaves_the_old_text(tmp_path, monkeypatch):
    path = tmp_path / "file"
    files.write_text(path, "old")

    def full(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        files.write_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_what_is_no_file_is_not_replaced(tmp_path):
    """`--out /dev/stdout` of root would have left a file there for everybody."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="no plain file"):
        files.write_text(tmp_path / "pipe", "x")
    with pytest.raises(NotADirectoryError, match="is no folder"):
        files.write_text(tmp_path / "file" / "x", "x")
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "it is empty"),
        (b'{"a": ', "Expecting value"),
        (b"[1]", "no JSON value that is an object"),
        (b"null", "no JSON value that is an object"),
        (b"\x00\xff\x80", "can't decode byte"),
        ('{"a": 1}'.encode("utf-16"), "can't decode byte"),
        (b'{"a": NaN}', "NaN is no number"),
        (b'{"a": ' * 100_000, "nested too deeply"),
        (b'{"a": ' + b"1" * 5000 + b"}", "Exceeds the limit"),
        (None, "No such file"),
    ],
)
def test_json_that_is_not_what_was_written_is_named(content, said, tmp_path):
    file = tmp_path / "a.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(files.Unreadable, match=f"{file} cannot be read: .*{said}"):
        files.read_json(file)
    with pytest.raises(files.Unreadable, match="Is a directory"):
        files.read_json(tmp_path)


def test_a_disk_a_quota_and_a_limit_on_files_may_be_full():
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        assert files.is_full(OSError(number, os.strerror(number)))
        assert files.is_full(RuntimeError(f"a rank said: {os.strerror(number)}"))
    assert not files.is_full(OSError(errno.EIO, os.strerror(errno.EIO)))
    with pytest.raises(RuntimeError) as torchs:  # as Megatron writes a checkpoint's first file
        torch.save(torch.zeros(1 << 12), "/dev/full")
    assert files.is_full(torchs.value)
    assert files.is_full(RuntimeError("basic_ios::clear: iostream error"))


@pytest.fixture
def small_files():
    """No file may have more than 64 KiB."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_limit_on_the_size_of_files_is_a_full_disk_whoever_writes(tmp_path, small_files):
    with pytest.raises(run_folder.Unwritable) as refusal, run_folder.writable(tmp_path):
        files.write_text(tmp_path / "large", "x" * (1 << 17))
    with (
        pytest.raises((OSError, RuntimeError)) as torchs,
        (tmp_path / "weights").open("wb") as file,
    ):
        torch.save(torch.zeros(1 << 16), file)
    assert files.is_full(torchs.value), "as Megatron's checkpoints are written"
    said = str(refusal.value)
    assert f"no space left: {tmp_path} has" in said
    assert "no file may have more than 0.1 MiB here: raise ulimit -f" in said
    assert f"fp16rl train --resume {tmp_path}" in said


def make(path, content, breaks_off=False, keep_old=False):
    with files.new_folder(path, keep_old=keep_old) as folder:
        assert folder != path
        (folder / "weights").write_text(content)
        if breaks_off:
            raise RuntimeError("half way")


def test_a_folder_appears_whole_and_replaces_the_old_one(tmp_path):
    model = tmp_path / "model"
    for content in ("old", "new"):
        make(model, content)
        assert (model / "weights").read_text() == content
    with pytest.raises(RuntimeError, match="half way"):
        make(model, "broken", breaks_off=True)
    make(model, "of another process, for a cache", keep_old=True)
    assert (model / "weights").read_text() == "new"
    assert os.listdir(tmp_path) == ["model"]
