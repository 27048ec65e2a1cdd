"""Child processes: one `unmask train` or `unmask sft` for each run, as many at a time as there are cores for."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unmask.comparison.planning import Run
from unmask.config import dump_toml
from unmask.errors import ConfigError
from unmask.run_log import StopRequest
from unmask.runs import write_atomic

POLL_SECONDS = 0.25


@dataclass(frozen=True)
class Machine:
    """What the children share."""

    num_cores: int
    devices: tuple[str, ...] = ()
    """CUDA devices as CUDA_VISIBLE_DEVICES names them; a child sees one."""

    def share(self, num_runs: int, jobs: int | None, most_threads: int | None) -> tuple[int, int]:
        """(processes at a time, threads of each). By default one for each device, or for each core where there is none.

        Raises: ConfigError for fewer than one, or for more than there are cores.
        """
        wanted = jobs if jobs is not None else len(self.devices) or self.num_cores
        if not 1 <= wanted <= self.num_cores:
            raise ConfigError(
                f"--jobs {wanted}: must be from 1 to {self.num_cores}, the cores of this machine; with more, "
                "processes would wait for each other and their times mean nothing. Leave it out for the default."
            )
        wanted = max(1, min(wanted, num_runs))
        return wanted, min(self.num_cores // wanted, most_threads or self.num_cores)

    def environment(self, slot: int, threads: int) -> dict[str, str]:
        """Of the child in `slot`."""
        env = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        if self.devices:
            env["CUDA_VISIBLE_DEVICES"] = self.devices[slot % len(self.devices)]
        return env


def this_machine(num_devices: int) -> Machine:
    """The cores that this process may use, and the first `num_devices` CUDA devices that it sees."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # a container may be given the time of fewer ("max" for no limit)
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = max(1, min(cores, int(quota) // int(period)))
    seen = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return Machine(cores, tuple((seen or [str(i) for i in range(num_devices)])[:num_devices]))


def most_threads() -> int | None:
    """What the user allows a process by OMP_NUM_THREADS."""
    text = os.environ.get("OMP_NUM_THREADS", "")
    return int(text) if text.isdecimal() and int(text) else None


@dataclass
class Child:
    """A process that makes one run, its log, and the most memory it was seen to hold."""

    run: Run
    slot: int
    process: subprocess.Popen[bytes]
    log_start: int
    peak_bytes: int = 0
    started: float = field(default_factory=time.monotonic)

    def observe(self) -> None:
        """The high-water mark of its memory, where the system tells it (Linux)."""
        with suppress(OSError, ValueError, IndexError):
            status = Path(f"/proc/{self.process.pid}/status").read_text()
            self.peak_bytes = max(self.peak_bytes, int(status.split("VmHWM:")[1].split()[0]) * 1024)

    def has_ended(self) -> bool:
        """Collects the process once it is over."""
        number, status, usage = os.wait4(self.process.pid, os.WNOHANG)
        if not number:
            return False
        self.process.returncode = os.waitstatus_to_exitcode(status)  # nobody else may wait for it
        if not self.peak_bytes:  # counts what the process was before it became ours, so it comes second
            self.peak_bytes = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return True

    def error(self) -> str:
        """The last line that it wrote, or the signal that ended it."""
        code = int(self.process.returncode)
        with open(self.run.beside("log"), "rb") as file:
            file.seek(self.log_start)
            lines = [line.strip() for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
        if code < 0:
            hint = " (the system may be short of memory)" if code == -signal.SIGKILL else ""
            return f"killed by signal {-code}{hint}"
        return lines[-1] if lines else f"ended with code {code} and wrote nothing"

    def record(self, *, is_stopped: bool) -> None:
        """Keep what is in no log of the run: memory over all its parts, and why it failed if it did."""
        record = read_record(self.run)
        has_failed = not (self.run.is_finished or is_stopped)
        content = {
            "peak_memory_bytes": max(self.peak_bytes, record.get("peak_memory_bytes", 0)),
            "process_seconds": time.monotonic() - self.started + record.get("process_seconds", 0.0),
            "parts": record.get("parts", 0) + 1,
            "error": self.error() if has_failed else None,
        }
        write_atomic(self.run.beside("json"), json.dumps(content, indent=2) + "\n")


def read_record(run: Run) -> dict[str, Any]:
    """What `Child.record` kept; empty before."""
    file = run.beside("json")
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def arguments(run: Run) -> list[str]:
    """The command of the child: a new run, or the rest of one that was stopped."""
    if run.is_begun:
        return [run.arm.command, "--resume", str(run.path), "--quiet"]
    shutil.rmtree(run.path, ignore_errors=True)  # a run that was killed before it had written its recipe
    write_atomic(run.beside("toml"), dump_toml(run.arm.with_seed(run.seed).tree()))
    return [run.arm.command, str(run.beside("toml")), "--output", str(run.path), "--quiet"]


def start(run: Run, slot: int, environment: Mapping[str, str], lock: int) -> Child:
    """A child in a session of its own: Ctrl-C on the terminal reaches this process alone, which then tells all."""
    run.folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "unmask", *arguments(run)]
    with open(run.beside("log"), "ab") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            pass_fds=(lock,),
        )
        return Child(run, slot, process, log.tell())


def run_all(
    runs: Sequence[Run],
    num_jobs: int,
    environment: Callable[[int], Mapping[str, str]],
    lock: int,
    stop: StopRequest,
    *,
    on_poll: Callable[[], None],
    on_end: Callable[[Run], None],
) -> None:
    """Make these runs, `num_jobs` at a time. When `stop` is asked for, children write checkpoints and end.

    A child that fails does not stop the others. Whatever ends this function, no child is left.
    """
    waiting, children, has_told = deque(runs), list[Child](), False
    try:
        while children or (waiting and not stop.signal_number):
            while waiting and len(children) < num_jobs and not stop.signal_number:
                slot = min(set(range(num_jobs)) - {child.slot for child in children})
                children.append(start(waiting.popleft(), slot, environment(slot), lock))
            if stop.signal_number and not has_told:
                has_told = True
                for child in children:
                    os.kill(child.process.pid, signal.SIGTERM)  # Popen's own would collect a process that has ended
            for child in list(children):
                child.observe()
                if child.has_ended():
                    children.remove(child)
                    child.record(is_stopped=bool(stop.signal_number))
                    on_end(child.run)
            on_poll()
            time.sleep(POLL_SECONDS)
    finally:
        for child in children:
            child.process.kill()
            child.process.wait()
