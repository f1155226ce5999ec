"""Simulated hosts on one machine, for tests that need a network: each has its own address, name, processes and files.

A host is a set of Linux namespaces, so this needs root. The machine's own network is not changed, and all processes of
a host end with it. The host `desk` sees the whole checkout, the others only the installed packages; each host has its
own /tmp, /dev/shm and /home.
"""

import contextlib
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.waiting import wait_until

CHECKOUT = Path(__file__).parents[2]
INSTALLED = Path(sys.prefix)
HOME = "/home/gru"

NAMESPACES = ["unshare", "--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"]
INIT = "trap '' CHLD; exec sleep infinity"  # ignoring CHLD: orphans do not stay as zombies

# Arguments: name, lines of /etc/hosts, directory to keep visible, directory of the checkout.
MOUNTS = r"""
mkdir -p /run/visible && mount -t tmpfs none /run && mkdir /run/visible && mount --bind "$3" /run/visible
mount -t tmpfs none /tmp && mount -t tmpfs none /home && mount -t tmpfs -o size=4g none /dev/shm
mkdir -p "$4" && mount -t tmpfs none "$4" && mkdir -p "$3" && mount --bind /run/visible "$3"
echo "$1" > /proc/sys/kernel/hostname
printf '127.0.0.1 localhost\n%s\n' "$2" > /run/hosts && mount --bind /run/hosts /etc/hosts
: > /run/resolv.conf && mount --bind /run/resolv.conf /etc/resolv.conf
ip link set lo up && mkdir -p /home/gru && chmod 1777 /tmp /home/gru
"""


class Network:
    """A switch, and the hosts on it by name."""

    def __init__(self, addresses: dict[str, str], logs: Path) -> None:
        self.hosts = {name: Host(name, address, logs) for name, address in addresses.items()}
        self._init = subprocess.Popen(["unshare", "--net", "--kill-child", "--fork", "sleep", "infinity"])
        self._pid = _child(self._init)

    def start(self) -> None:
        self._on_switch("ip link add switch type bridge && ip link set switch up")
        known = "\n".join([f"{host.address} {host.name}" for host in self.hosts.values()])
        for host in self.hosts.values():
            host.start(known)
            self._on_switch(
                f"ip link add name {host.name} type veth peer name eth0 netns {host.pid}"
                f" && ip link set dev {host.name} master switch up"
            )
            host.run(f"ip address add {host.address}/24 dev eth0 && ip link set eth0 up")

    def cut(self, name: str) -> None:
        self._on_switch(f"ip link set dev {name} down")

    def restore(self, name: str) -> None:
        self._on_switch(f"ip link set dev {name} up")

    def stop(self) -> None:
        for host in self.hosts.values():
            host.stop()
        self._init.kill()
        self._init.wait()

    def _on_switch(self, command: str) -> None:
        subprocess.run(["nsenter", f"--net=/proc/{self._pid}/ns/net", "sh", "-ec", command], check=True)


@dataclass
class Host:
    name: str
    address: str
    logs: Path
    environment: dict[str, str] = field(default_factory=dict)
    pid: int = 0

    def start(self, known: str) -> None:
        visible = CHECKOUT if self.name == "desk" else INSTALLED
        self._init = subprocess.Popen([*NAMESPACES, "sh", "-c", INIT])
        self.pid = _child(self._init)
        subprocess.run([*self._enter(), "sh", "-euc", MOUNTS, "sh", self.name, known, visible, CHECKOUT], check=True)

    def stop(self) -> None:
        if self.pid:
            self._init.kill()  # ends its child, the namespace's first process, and so all others
            self._init.wait()

    def run(self, command: str) -> str:
        """Run a command in the host's home, with its environment. Return the output. Raises CalledProcessError."""
        done = subprocess.run(self._command(command), env=self._environment(), stdout=subprocess.PIPE, check=True)
        return done.stdout.decode()

    def python(self, program: str) -> str:
        return self.run(shlex.join(["python", "-c", program]))

    def spawn(self, command: str, name: str) -> "Running":
        """Start a process in the background. `name` is part of the names of its logs."""
        out, err = (self.logs / f"{self.name}-{name}.{kind}" for kind in ("out", "err"))
        with out.open("ab") as stdout, err.open("ab") as stderr:
            process = subprocess.Popen(
                self._command(command), env=self._environment(), stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr
            )
        return Running(process, out, err)

    def write(self, name: str, text: str) -> str:
        """Write a file in the host's home. Return its path."""
        subprocess.run(self._command(f"umask 077; cat > {name}"), input=text.encode(), check=True)
        return f"{HOME}/{name}"

    def processes(self, words: str) -> list[psutil.Process]:
        """The processes on this host whose command line contains these words."""
        matching = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                here = Path(f"/proc/{process.pid}/ns/pid").readlink() == Path(f"/proc/{self.pid}/ns/pid").readlink()
                if here and words in " ".join(process.cmdline()):
                    matching.append(process)
        return matching

    def _enter(self) -> list[str]:
        return ["nsenter", f"--target={self.pid}", "--net", "--mount", "--uts", "--ipc", "--pid"]

    def _command(self, command: str) -> list[str]:
        return [*self._enter(), "sh", "-ec", f"cd {HOME}; {command}"]

    def _environment(self) -> dict[str, str]:
        return {"PATH": f"{INSTALLED / 'bin'}:{os.environ['PATH']}", "HOME": HOME, "LANG": "C.UTF-8"} | self.environment


@dataclass
class Running:
    process: subprocess.Popen[bytes]
    out: Path
    err: Path

    def kill(self) -> None:
        """Kill the process and its descendants."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self.process.kill()
        self.process.wait()


def _child(parent: subprocess.Popen[bytes]) -> int:
    def children() -> list[psutil.Process]:
        assert parent.poll() is None, "unshare failed: it needs root"
        return psutil.Process(parent.pid).children()

    return wait_until("a namespace", children, 10)[0].pid
