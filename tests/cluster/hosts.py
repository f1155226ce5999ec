"""Hosts on one machine, for what has to cross a network: each has its own address, name, processes and files.

They are Linux namespaces, so this needs root. The machine's own network is not touched, and all that runs on a host
ends with it. Of the checkout, the desk sees all, the others what was installed; /tmp, /dev/shm and /home are their own.
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
LIFE = "trap '' CHLD; exec sleep infinity"  # orphans are not to stay as zombies

# Arguments: name, lines of /etc/hosts, what is seen of the checkout.
OWN_FILES = r"""
mkdir -p /run/kept && mount -t tmpfs none /run && mkdir /run/kept && mount --bind "$3" /run/kept
mount -t tmpfs none /tmp && mount -t tmpfs none /home && mount -t tmpfs -o size=4g none /dev/shm
mkdir -p "$4" && mount -t tmpfs none "$4" && mkdir -p "$3" && mount --bind /run/kept "$3"
echo "$1" > /proc/sys/kernel/hostname
printf '127.0.0.1 localhost\n%s\n' "$2" > /run/hosts && mount --bind /run/hosts /etc/hosts
: > /run/resolv.conf && mount --bind /run/resolv.conf /etc/resolv.conf
ip link set lo up && mkdir -p /home/gru && chmod 1777 /tmp /home/gru
"""


class Network:
    """A switch, and the hosts on it by their names."""

    def __init__(self, addresses: dict[str, str], logs: Path) -> None:
        self.hosts = {name: Host(name, address, logs) for name, address in addresses.items()}
        self._life = subprocess.Popen(["unshare", "--net", "--kill-child", "--fork", "sleep", "infinity"])
        self._pid = _child(self._life)

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
        self._life.kill()
        self._life.wait()

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
        seen = CHECKOUT if self.name == "desk" else INSTALLED
        self._life = subprocess.Popen([*NAMESPACES, "sh", "-c", LIFE])
        self.pid = _child(self._life)
        subprocess.run([*self._enter(), "sh", "-euc", OWN_FILES, "sh", self.name, known, seen, CHECKOUT], check=True)

    def stop(self) -> None:
        if self.pid:
            self._life.kill()  # its child with it, and with that all others
            self._life.wait()

    def run(self, command: str) -> str:
        """Output of a command, with the host's environment, in its home. Raises CalledProcessError."""
        done = subprocess.run(self._command(command), env=self._environment(), stdout=subprocess.PIPE, check=True)
        return done.stdout.decode()

    def python(self, program: str) -> str:
        return self.run(shlex.join(["python", "-c", program]))

    def spawn(self, command: str, name: str) -> "Running":
        """A process that goes on beside this one; `name` is that of its logs."""
        out, err = (self.logs / f"{self.name}-{name}.{kind}" for kind in ("out", "err"))
        with out.open("ab") as told, err.open("ab") as logged:
            started = subprocess.Popen(
                self._command(command), env=self._environment(), stdin=subprocess.DEVNULL, stdout=told, stderr=logged
            )
        return Running(started, out, err)

    def write(self, name: str, text: str) -> str:
        """A file in the host's home; its path."""
        subprocess.run(self._command(f"umask 077; cat > {name}"), input=text.encode(), check=True)
        return f"{HOME}/{name}"

    def processes(self, words: str) -> list[psutil.Process]:
        """Those on this host whose command line has these words."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                here = Path(f"/proc/{process.pid}/ns/pid").readlink() == Path(f"/proc/{self.pid}/ns/pid").readlink()
                if here and words in " ".join(process.cmdline()):
                    found.append(process)
        return found

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
        """With all that it started."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self.process.kill()
        self.process.wait()


def _child(parent: subprocess.Popen[bytes]) -> int:
    def found() -> list[psutil.Process]:
        assert parent.poll() is None, "unshare failed: it needs root"
        return psutil.Process(parent.pid).children()

    return wait_until("a namespace", found, 10)[0].pid
