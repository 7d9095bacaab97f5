"""A real Slurm of several nodes on this machine, for tests.

Each node is a slurmd in network, UTS and mount namespaces of its own: its own address, host name and
ports on a bridge; ib0 stands for a second network that host names do not lead to. Wants root and Debian's
packages slurmctld slurmd slurm-client munge iproute2. The devices that nodes call GPUs are /dev/null under
another name: enough for Slurm to count and assign.
"""

import contextlib
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_fp16rl.utils.processes import free_port, tail

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "ip", "nsenter", "unshare", "setpriv")
_NETWORK, _FAST = "10.77", "10.78"
_NODE_PORT = 17_001  # each node has a network of its own


def missing() -> list[str]:
    """What this machine lacks for a cluster."""
    lacks = [program for program in PROGRAMS if shutil.which(program) is None]
    return lacks if os.geteuid() == 0 else [*lacks, "root"]


class Cluster:
    """Nodes node1, node2, ...; commands see it with `environment`."""

    def __init__(self, folder: Path, nodes: int, cpus: int = 4, gpus: int = 8) -> None:
        self.folder, self.cpus, self.gpus = folder, cpus, gpus
        self.nodes = [f"node{number}" for number in range(1, nodes + 1)]
        self.tag = f"fp{os.getpid()}"
        self.network = f"{_NETWORK}.{os.getpid() % 250}"
        self.fast_network = f"{_FAST}.{os.getpid() % 250}"
        self.port = free_port("0.0.0.0")  # of its controller: another cluster may run beside it
        self.daemons: dict[str, subprocess.Popen] = {}
        # UCX, which MPICH talks through, would take nodes of one machine for one node, and share memory.
        others = {"SLURM_CONF": str(folder / "slurm.conf"), "UCX_TLS": "tcp,self"}
        self.environment = {**os.environ, **others}

    def run(self, *command: str, timeout: float = 30, check: bool = True) -> str:
        """Runs a command, e.g. squeue, and returns what it printed."""
        done = subprocess.run(
            command,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if check and done.returncode:
            raise RuntimeError(f"{shlex.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout

    def start(self) -> None:
        """Returns when all nodes are idle."""
        for name in ("log", "state", "spool", "devices"):
            (self.folder / name).mkdir(parents=True)
        self.folder.chmod(0o755)
        (self.folder / "state").chmod(0o700)
        _remove_what_the_dead_left()
        self._make_key()
        self._make_devices()
        self._write_configuration()
        self._make_network()
        keys = self.folder / "munge"
        self._daemon(
            "munged",
            "munged",
            "--foreground",
            "--force",
            f"--key-file={keys}/key",
            f"--socket={keys}/socket",
            f"--pid-file={keys}/pid",
            f"--log-file={self.folder}/log/munged-own.log",
            f"--seed-file={keys}/seed",
        )
        self._wait(lambda: (keys / "socket").exists(), "munged")
        self._daemon("slurmctld", "slurmctld", "-D", "-c")
        for node in self.nodes:
            self.start_node(node)
        self._wait(lambda: self.states() == dict.fromkeys(self.nodes, "idle"), "slurmctld")

    def stop(self) -> None:
        """Ends every job, every daemon and every process of the nodes."""
        if "slurmctld" in self.daemons:
            self.run("scancel", "--full", f"--user={os.getuid()}", check=False)
        for node in self.nodes:
            self.kill_node(node)
            subprocess.run(["ip", "netns", "del", self._namespace(node)], check=False)
        for daemon in self.daemons.values():
            daemon.kill()
            daemon.wait()
        subprocess.run(["ip", "link", "del", f"{self.tag}br"], check=False)

    def start_node(self, node: str) -> None:
        """Starts a node's slurmd."""
        hosts = shlex.quote(str(self.folder / "hosts"))
        inside = f"hostname {node} && mount --bind {hosts} /etc/hosts && exec slurmd -D -N {node}"
        self._daemon(
            node,
            "nsenter",
            f"--net=/run/netns/{self._namespace(node)}",
            "unshare",
            "--uts",
            "--mount",
            "--propagation=private",
            "bash",
            "-c",
            inside,
        )

    def kill_node(self, node: str) -> None:
        """Kills all that runs on a node at once, as a power cut does."""
        command = ["ip", "netns", "pids", self._namespace(node)]
        for _ in range(20):  # what is killed may have been about to fork
            pids = subprocess.run(command, capture_output=True, text=True, check=False).stdout
            if not pids.split():
                break
            for pid in pids.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.05)
        if daemon := self.daemons.pop(node, None):
            daemon.wait()

    def states(self) -> dict[str, str]:
        """Each node's state in Slurm's words, e.g. idle, allocated, down."""
        lines = self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T", check=False).splitlines()
        return dict(line.split() for line in lines)

    def state_of(self, job: str) -> str:
        """A job's state in Slurm's words, e.g. PENDING, RUNNING, COMPLETED."""
        text = self.run("scontrol", "show", "job", job)
        return text.split("JobState=")[1].split()[0]

    def wait_for(self, job: str, *states: str, timeout: float = 60) -> str:
        """Waits until a job is in one of the states; returns which."""
        deadline = time.monotonic() + timeout
        while (state := self.state_of(job)) not in states:
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {job} is {state}, not {' or '.join(states)}")
            time.sleep(0.2)
        return state

    def _daemon(self, name: str, *command: str) -> None:
        with (self.folder / "log" / f"{name}.log").open("ab") as log:
            self.daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig=KILL", *command],  # whatever happens to the tests
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _wait(self, ready: object, daemon: str, timeout: float = 60) -> None:
        deadline = time.monotonic() + timeout
        while not ready():
            gone = [name for name, child in self.daemons.items() if child.poll() is not None]
            if gone or time.monotonic() > deadline:
                name = gone[0] if gone else daemon
                raise RuntimeError(
                    f"{name} {'ended' if gone else 'is not ready'}:\n"
                    + tail(self.folder / "log" / f"{name}.log")
                )
            time.sleep(0.1)

    def _namespace(self, node: str) -> str:
        return f"{self.tag}-{node}"

    def _address(self, number: int) -> str:
        return f"{self.network}.{number}"

    def _make_key(self) -> None:
        (self.folder / "munge").mkdir(mode=0o755)
        key = self.folder / "munge" / "key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)

    def _make_devices(self) -> None:
        for gpu in range(self.gpus):
            path = self.folder / "devices" / f"nvidia{gpu}"
            os.mknod(path, 0o666 | 0o020000, os.makedev(1, 3))

    def _make_network(self) -> None:
        bridge = f"{self.tag}br"
        commands = [
            f"ip link add {bridge} type bridge",
            f"ip addr add {self._address(254)}/24 dev {bridge}",
            f"ip link set {bridge} up",
        ]
        for number, node in enumerate(self.nodes, 1):
            space, port = self._namespace(node), f"{self.tag}v{number}"
            commands += [
                f"ip netns add {space}",
                f"ip link add {port} type veth peer name eth0 netns {space}",
                f"ip link set {port} master {bridge} up",
                f"ip -n {space} addr add {self._address(number)}/24 dev eth0",
                f"ip -n {space} link set lo up",
                f"ip -n {space} link set eth0 up",
                f"ip link add {port}i type veth peer name ib0 netns {space}",
                f"ip link set {port}i master {bridge} up",
                f"ip -n {space} addr add {self.fast_network}.{number}/24 dev ib0",
                f"ip -n {space} link set ib0 up",
            ]
        for command in commands:
            subprocess.run(command.split(), check=True)

    def _write_configuration(self) -> None:
        folder, host = self.folder, socket.gethostname().split(".")[0]
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
        settings = {
            "ClusterName": "local",
            "SlurmctldHost": f"{host}({self._address(254)})",
            "SlurmctldPort": self.port,
            "SlurmUser": "root",
            "SlurmdUser": "root",
            "AuthType": "auth/munge",
            # A requeued job waits for its credentials to expire: 120 s if this is not said.
            "AuthInfo": f"socket={folder}/munge/socket,cred_expire=5",
            "CredType": "cred/munge",
            "StateSaveLocation": folder / "state",
            "SlurmdSpoolDir": folder / "spool/%n",
            "SlurmctldPidFile": folder / "slurmctld.pid",
            "SlurmdPidFile": folder / "slurmd-%n.pid",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "SwitchType": "switch/none",
            "MpiDefault": "none",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_CPU",
            "SlurmdParameters": "config_overrides",  # more CPUs than this machine has
            "SchedulerParameters": "bf_interval=2,sched_interval=2,batch_sched_delay=0,"
            "sched_min_interval=0,requeue_delay=1",
            "SlurmctldTimeout": 10,
            "SlurmdTimeout": 10,
            "KillWait": 3,
            "MessageTimeout": 10,
            "ReturnToService": 2,
            "JobRequeue": 1,
            "AccountingStorageType": "accounting_storage/none",
            "JobAcctGatherType": "jobacct_gather/none",
            "GresTypes": "gpu",
            "PreemptType": "preempt/partition_prio",
            "PreemptMode": "REQUEUE",
        }
        lines = [f"{key}={value}" for key, value in settings.items()]
        for number, node in enumerate(self.nodes, 1):
            lines.append(
                f"NodeName={node} NodeHostname={node} NodeAddr={self._address(number)} "
                f"Port={_NODE_PORT} CPUs={self.cpus} RealMemory={memory} Gres=gpu:{self.gpus}"
            )
        for name, priority, default in (("main", 10, "YES"), ("low", 1, "NO")):
            lines.append(
                f"PartitionName={name} Nodes=ALL Default={default} MaxTime=INFINITE State=UP "
                f"PriorityTier={priority} GraceTime=10"
            )
        (folder / "slurm.conf").write_text("\n".join(lines) + "\n")
        devices = f"{folder}/devices/nvidia[0-{self.gpus - 1}]"
        (folder / "gres.conf").write_text(
            f"NodeName=node[1-{len(self.nodes)}] Name=gpu File={devices}\n"
        )
        hosts = ["127.0.0.1 localhost", f"{self._address(254)} {host}"]
        hosts += [f"{self._address(i)} {node}" for i, node in enumerate(self.nodes, 1)]
        (folder / "hosts").write_text("\n".join(hosts) + "\n")


@contextmanager
def cluster(folder: Path, nodes: int) -> Iterator[Cluster]:
    """A cluster inside the block, nothing of it after."""
    nodes_up = Cluster(folder, nodes)
    try:
        nodes_up.start()
        yield nodes_up
    finally:
        nodes_up.stop()


def _remove_what_the_dead_left() -> None:
    """Networks of clusters whose process was killed: another may be given the same addresses."""
    links = subprocess.run(["ip", "-br", "link"], capture_output=True, text=True, check=True).stdout
    for tag, pid in re.findall(r"^(fp(\d+))br\b", links, re.MULTILINE):
        if not Path(f"/proc/{pid}").exists():
            names = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True)
            for name in re.findall(rf"^{tag}-\S+", names.stdout, re.MULTILINE):
                subprocess.run(["ip", "netns", "del", name], check=False)
            subprocess.run(["ip", "link", "del", f"{tag}br"], check=False)
