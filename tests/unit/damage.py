"""What a kill, a full disk or a person does to a file or folder of a run."""

import shutil


def remove(file):
    shutil.rmtree(file) if file.is_dir() else file.unlink(missing_ok=True)


def put(file, content):
    remove(file)
    file.write_bytes(content)


DAMAGE = {
    "empty": lambda file: put(file, b""),
    "cut": lambda file: put(file, file.read_bytes()[:-9] if file.is_file() else b"{"),
    "rubbish": lambda file: put(file, b"\x00\xff\xfe\x80{[\n" * 50),
    "gone": remove,
    "folder": lambda file: (remove(file), file.mkdir()),
    "dangling": lambda file: (remove(file), file.symlink_to("nowhere")),
}
