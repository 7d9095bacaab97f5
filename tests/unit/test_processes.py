"""Nothing outlives the launcher or a stopped server: Ctrl-C, SIGTERM, SIGKILL."""

import os
import signal
import socket
import subprocess
import sys
import uuid
from pathlib import Path

import psutil

from megatron_fp16rl.rollout import server as servers
from megatron_fp16rl.rollout.discovery import Endpoint
from megatron_fp16rl.rollout.server import Server
from megatron_fp16rl.tools.rehearse.run import started_with
from megatron_fp16rl.utils.processes import free_port, spawn, stop
from tests.conftest import ROOT, python
from tests.runs import wait_for


def is_alive(process):
    """Not gone, not a zombie, and not another process with the same number."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def nothing_is_left(family, folder, seconds=20):
    """Of these processes, nor of orphans, which keep their TMPDIR. SGLang's overwrite it with a title."""
    wait_for(
        lambda: not any(map(is_alive, family)) and not started_with(str(folder)),
        seconds,
        "the end of all processes",
    )


def test_ctrl_c_while_servers_and_ranks_come_up_leaves_nothing_behind(tmp_path):
    """SIGKILL in the middle of a run: tests/e2e/test_rehearsal.py."""
    output = tmp_path / "output"
    settings = ("trainer.steps=100000", "warm_start=null", f"trainer.run_root={tmp_path}")
    command = [sys.executable, "-m", "megatron_fp16rl.cli", "train"]
    command += ["recipes/tiny/dense-grpo-fp16.yaml", *(f"--set={s}" for s in settings)]
    with output.open("w") as file:
        launcher = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "TMPDIR": str(tmp_path)},
            stdout=file,
            stderr=subprocess.STDOUT,
            # A shell without job control starts what is in the background deaf to Ctrl-C.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    family = []

    def is_there():
        assert launcher.poll() is None, output.read_text()  # else nothing would come for minutes
        family[:] = psutil.Process(launcher.pid).children(recursive=True)
        return len(family) >= 3  # two ranks and a server

    try:
        wait_for(is_there, 240, "the start of the children")
        launcher.send_signal(signal.SIGINT)
        launcher.wait(240)
        nothing_is_left(family, tmp_path)
        assert launcher.returncode == 1
        assert "error: interrupted" in output.read_text()
    finally:
        for process in (launcher, *started_with(str(tmp_path))):
            process.kill()


def test_a_child_that_ignores_sigterm_is_killed_with_its_children(tmp_path):
    code = (
        "import signal, subprocess, sys, time;"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
        "print('ready', flush=True); time.sleep(600)"
    )
    log = tmp_path / "child.log"
    child = spawn([sys.executable, "-c", code], log, {"TMPDIR": str(tmp_path)})
    wait_for(lambda: "ready" in log.read_text(), 120, "the start")
    family = started_with(str(tmp_path))
    assert len(family) == 2
    stop([child], patience_s=0.5)
    nothing_is_left(family, tmp_path, 5)


def test_a_child_whose_parent_died_before_it_was_ready_ends(tmp_path):
    code = "from megatron_fp16rl.utils.processes import die_with_parent; die_with_parent(); print('ran on')"
    done = python("-c", code, environment={"FP16RL_PARENT_PID": "1"}, check=False)
    assert done.returncode == 1
    assert "ran on" not in done.stdout
    assert "the launcher died" in done.stderr


def test_free_ports_differ_and_are_out_of_the_way_of_outgoing_connections():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        ports = [free_port("127.0.0.1") for _ in range(200)]
        assert taken.getsockname()[1] not in ports
    assert len(set(ports)) == 200
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert all(1024 < port < lowest for port in ports)


def test_a_server_that_is_stopped_leaves_no_counters_of_its_own_and_touches_no_others(tmp_path):
    names = [f"sglang_loads_test_{uuid.uuid4().hex}.shm" for _ in range(2)]
    mine, another = (Path("/dev/shm", name) for name in names)
    another.touch()
    code = (
        "import subprocess, sys; held = open(sys.argv[1], 'w'); print('open', flush=True)\n"
        "subprocess.run(['sleep', '600'], pass_fds=[held.fileno()])"
    )
    process = spawn(
        [sys.executable, "-c", code, str(mine)], tmp_path / "log", stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "open\n"
    try:
        servers.stop_servers([Server(Endpoint("", "", ""), process, tmp_path / "log", tmp_path)])
        assert not mine.exists()
        assert another.exists()
    finally:
        another.unlink()
