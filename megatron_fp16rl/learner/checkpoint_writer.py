"""Writes a rank's part of a checkpoint: `python -m ... FOLDER NAME MEMORY FILE...`; see background.py.

Copies the open file number MEMORY to FOLDER/NAME, syncs it and every FILE in FOLDER to disk, and prints
their sizes and checksums, or the error of the disk, as JSON. Imports no torch: it is up in a moment.
"""

import contextlib
import hashlib
import json
import os
import sys
from pathlib import Path

from megatron_fp16rl.learner.checkpoint_files import Digest, digest
from megatron_fp16rl.utils.processes import die_with_parent

_CHUNK_BYTES = 1 << 22


def main() -> None:
    die_with_parent()
    _yield_processors()
    folder, name, memory = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    try:
        # What is checksummed is what was in memory: a disk that changes a byte is found out at the next start.
        digests = {file: digest(folder / file) for file in sys.argv[4:]}
        digests[name] = _copy(memory, folder / name)
    except OSError as error:
        print(json.dumps({"errno": error.errno, "file": error.filename or str(folder / name)}))
    else:
        print(json.dumps({"digests": digests}))


def _yield_processors() -> None:
    """Leaves the processors to ranks and servers, but for a tenth: a rank may have to wait for this one."""
    os.nice(10)
    # Linux shares processors among sessions first, and this process is one of its own.
    with contextlib.suppress(OSError):
        Path("/proc/self/autogroup").write_text("10")


def _copy(memory: int, file: Path) -> Digest:
    checksum, position = hashlib.sha256(), 0
    with file.open("xb") as target:
        while chunk := os.pread(memory, _CHUNK_BYTES, position):
            checksum.update(chunk)
            target.write(chunk)
            position += len(chunk)
        target.flush()
        os.fsync(target.fileno())
    return {"bytes": position, "sha256": checksum.hexdigest()}


if __name__ == "__main__":
    main()
