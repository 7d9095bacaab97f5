"""Files and folders that are either whole or absent."""

import os
import stat

import pytest

from megatron_fp16rl import files


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


def test_a_folder_appears_whole_and_replaces_the_old_one(tmp_path):
    for content in ("old", "new"):
        with files.new_folder(tmp_path / "model") as folder:
            (folder / "weights").write_text(content)
            assert folder != tmp_path / "model"
    assert (tmp_path / "model" / "weights").read_text() == "new"
    with pytest.raises(RuntimeError, match="half way"):
        break_off_in(tmp_path / "model")
    assert (tmp_path / "model" / "weights").read_text() == "new"
    assert os.listdir(tmp_path) == ["model"]


def test_a_cache_keeps_what_another_process_has_put_there_meanwhile(tmp_path):
    for content in ("first", "second"):
        with files.new_folder(tmp_path / "model", keep_old=True) as folder:
            (folder / "weights").write_text(content)
    assert (tmp_path / "model" / "weights").read_text() == "first"
    assert os.listdir(tmp_path) == ["model"]


def break_off_in(path):
    with files.new_folder(path) as folder:
        (folder / "weights").write_text("broken")
        raise RuntimeError("half way")
