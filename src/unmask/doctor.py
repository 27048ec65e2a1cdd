"""What this machine has and lacks for unmask: facts with the command that mends each. Imports no third-party package.

Anything that may be broken is tried in a process of its own, so that the answer comes all the same.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

from unmask.isolation import isolation_level, probe_isolation
from unmask.places import cache_directory, data_directory

GIB = 1 << 30

IMPORTS = {
    "matplotlib": "matplotlib", "datasets": "datasets", "peft": "peft",
    "math-verify": "math_verify", "lm-eval": "lm_eval",
}  # fmt: skip
"""Packages of the extras that unmask itself imports; the others are programs and test tools."""

TRACKERS = ("tensorboard", "wandb", "trackio")

SECONDS_TO_IMPORT = 180.0


@dataclass(frozen=True)
class Fact:
    """One line of the report. `is_required`: without it the embedded model cannot be trained."""

    section: str
    name: str
    status: Literal["ok", "missing", "warning"]
    text: str
    fix: str = ""
    is_required: bool = False


@dataclass(frozen=True)
class Requirement:
    """A line of the package's metadata, such as `matplotlib>=3.8; extra == "plot"`."""

    name: str
    range: str
    extra: str | None

    @property
    def text(self) -> str:
        return self.name + self.range


def diagnose() -> list[Fact]:
    """All facts, section by section."""
    wanted = requirements()
    packages = list(package_facts(wanted))
    check = self_check()
    return [
        python_fact(),
        *packages,
        *tracker_facts(wanted),
        training_fact(check, packages),
        *hardware_facts(check),
        *thread_facts(check),
        *isolation_facts(),
        *place_facts(),
    ]


def can_train(facts: Iterable[Fact]) -> bool:
    """Whether the main job, training the embedded model, can run."""
    return all(fact.status != "missing" for fact in facts if fact.is_required)


# ---- Python and packages


def python_fact() -> Fact:
    wanted = _own_metadata("Requires-Python") or ">=3.11"
    version = platform.python_version()
    text = f"{version} at {sys.executable}"
    if satisfies(version, wanted):
        return Fact("python", "version", "ok", text, is_required=True)
    return Fact("python", "version", "missing", f"{text}, {wanted} is required", f"install Python {wanted}", True)


def requirements() -> list[Requirement]:
    """The ranges of pyproject.toml as the installed metadata has them; empty if unmask runs without being installed."""
    try:
        lines = metadata.requires("unmask") or []
    except metadata.PackageNotFoundError:
        return []
    return [parse_requirement(line) for line in lines]


def parse_requirement(line: str) -> Requirement:
    """Name, version range and extra of a requirement line."""
    spec, _, marker = line.partition(";")
    name = re.match(r"\s*[A-Za-z0-9._-]+", spec)
    assert name, f"{line!r} is no requirement"
    extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)['\"]", marker)
    span = re.sub(r"\[[^\]]*\]|[()\s]", "", spec[name.end() :])
    return Requirement(name[0].strip(), span, extra[1] if extra else None)


def satisfies(version: str, wanted: str) -> bool:
    """Whether a version lies in a range such as ">=2.6,<3"; pre-release and local parts are not looked at."""
    for part in filter(None, wanted.split(",")):
        match = re.fullmatch(r"(>=|<=|==|!=|~=|>|<)(.+)", part)
        assert match, f"{wanted!r} is no version range"
        found, bound = _numbers(version), _numbers(match[2])
        pairs = list(zip_longest(found, bound, fillvalue=0))
        found, bound = [a for a, _ in pairs], [b for _, b in pairs]
        depth = len(_numbers(match[2])) - 1
        holds = {
            ">=": found >= bound,
            "<=": found <= bound,
            ">": found > bound,
            "<": found < bound,
            "==": found == bound,
            "!=": found != bound,
            "~=": found >= bound and found[:depth] == bound[:depth],
        }
        if not holds[match[1]]:
            return False
    return True


def _numbers(version: str) -> list[int]:
    """The release numbers: 2.13.0+cpu -> [2, 13, 0]."""
    match = re.match(r"v?(\d+(?:\.\d+)*)", version.strip())
    return [int(n) for n in match[1].split(".")] if match else []


def package_facts(wanted: list[Requirement]) -> Iterator[Fact]:
    """One fact for each required package, one for each extra."""
    if not wanted:
        text = "unmask runs from a folder without being installed, so the ranges of its packages are not known"
        yield Fact("packages", "unmask", "warning", text, pip("-e", "."))
    for requirement in wanted:
        if requirement.extra is None:
            yield required_fact(requirement)
    extras: dict[str, list[Requirement]] = {}
    for requirement in wanted:
        if requirement.extra is not None and requirement.name not in TRACKERS:  # these have lines of their own
            extras.setdefault(requirement.extra, []).append(requirement)
    broken = failing_imports(IMPORTS[r.name] for r in wanted if r.extra and r.name in IMPORTS and fits(r))
    for extra, members in extras.items():
        yield extra_fact(extra, members, broken)


def installed_version(name: str) -> str | None:
    """None if the package is not installed, or its metadata is damaged."""
    try:
        return metadata.version(name)
    except (metadata.PackageNotFoundError, KeyError):
        return None


def fits(requirement: Requirement) -> bool:
    version = installed_version(requirement.name)
    return version is not None and satisfies(version, requirement.range)


def required_fact(requirement: Requirement) -> Fact:
    version = installed_version(requirement.name)
    if fits(requirement):
        return Fact("packages", requirement.name, "ok", f"{version} ({requirement.range})", is_required=True)
    text = f"{version} is installed, {requirement.text} is required" if version else "not installed"
    return Fact("packages", requirement.name, "missing", text, pip(requirement.text), is_required=True)


def extra_fact(extra: str, members: list[Requirement], broken: dict[str, str]) -> Fact:
    """An extra is there when all its packages are, and can be imported."""
    lacking = [member.text for member in members if not fits(member)]
    if lacking:
        return Fact("extras", extra, "missing", f"optional: {', '.join(lacking)}", pip(*lacking))
    for member in members:
        if member.name in broken:
            text = f"{member.name} is installed but cannot be imported: {broken[member.name]}"
            return Fact("extras", extra, "warning", text, pip("--force-reinstall", member.text))
    return Fact("extras", extra, "ok", ", ".join(f"{m.name} {installed_version(m.name)}" for m in members))


def tracker_facts(wanted: list[Requirement]) -> Iterator[Fact]:
    """Experiment trackers, each of them optional."""
    texts = {requirement.name: requirement.text for requirement in wanted}
    broken = failing_imports(name for name in TRACKERS if installed_version(name))
    for name in TRACKERS:
        version = installed_version(name)
        if version is None:
            yield Fact("trackers", name, "missing", "optional: not installed", pip(texts.get(name, name)))
        elif name in broken:
            text = f"{version} is installed but cannot be imported: {broken[name]}"
            yield Fact("trackers", name, "warning", text, pip("--force-reinstall", texts.get(name, name)))
        else:
            yield Fact("trackers", name, "ok", version)


def failing_imports(names: Iterable[str]) -> dict[str, str]:
    """Modules that cannot be imported, with the error; each is tried in its own process, all at once."""
    started = {name: _start("-c", f"import {name}") for name in dict.fromkeys(names)}
    results = {name: _finish(process) for name, process in started.items()}
    return {name: error for name, (_, error) in results.items() if error}


def pip(*words: str) -> str:
    return shlex.join([sys.executable, "-m", "pip", "install", *words])


def _own_metadata(key: str) -> str | None:
    try:
        return metadata.metadata("unmask")[key]
    except (metadata.PackageNotFoundError, KeyError):
        return None


# ---- the main job


def self_check() -> dict[str, Any]:
    """What `python -m unmask.self_check` prints, or {"error": ...}."""
    return _printed_by("unmask.self_check")


def sandbox_check() -> dict[str, Any]:
    """What `python -m unmask.sandbox.probe` prints, or {"error": ...}."""
    return _printed_by("unmask.sandbox.probe")


def _printed_by(module: str) -> dict[str, Any]:
    output, error = _finish(_start("-m", module))
    try:
        return {"error": error} if error else dict(json.loads(output.splitlines()[-1]))
    except (ValueError, IndexError):
        return {"error": f"unexpected output {output[-80:]!r}"}


def training_fact(check: dict[str, Any], packages: list[Fact]) -> Fact:
    """Whether one update of an embedded model was made."""
    if "error" not in check:
        text = f"one update of a very small embedded model took {check['seconds']:.2f} s"
        return Fact("training", "self check", "ok", text, is_required=True)
    lacking = [fact.fix for fact in packages if fact.is_required and fact.status == "missing"]
    fix = lacking[0] if lacking else pip("--force-reinstall", "torch", "transformers", "accelerate")
    return Fact(
        "training", "self check", "missing", f"the embedded model cannot be trained: {check['error']}", fix, True
    )


def _start(*arguments: str) -> subprocess.Popen[str] | str:
    """A Python process that finds this very package and nothing of the working directory; or why it did not start."""
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    try:
        return subprocess.Popen(
            [sys.executable, "-P", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
    except OSError as error:
        return f"{sys.executable} cannot be started ({error.strerror})"


def _finish(process: subprocess.Popen[str] | str) -> tuple[str, str]:
    """(standard output, error in one line or "")."""
    if isinstance(process, str):
        return "", process
    try:
        output, errors = process.communicate(timeout=SECONDS_TO_IMPORT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return "", f"no answer within {SECONDS_TO_IMPORT:.0f} s"
    if process.returncode == 0:
        return output, ""
    lines = [line for line in errors.splitlines() if line.strip()]
    ended = f"ended by signal {-process.returncode}" if process.returncode < 0 else f"exit code {process.returncode}"
    return output, " ".join(lines[-1].split())[:200] if lines else ended


# ---- hardware and threads


def hardware_facts(check: dict[str, Any]) -> Iterator[Fact]:
    yield Fact("hardware", "cpu", "ok", f"{num_cpus()} usable of {os.cpu_count()} ({platform.machine()})")
    available = available_memory()
    if available is None:
        yield Fact("hardware", "memory", "warning", "size not known on this system")
    elif available < GIB:
        text = f"{available / GIB:.1f} GiB available, the embedded model wants 1 GiB"
        yield Fact("hardware", "memory", "warning", text, "end other programs, or raise the container's memory limit")
    else:
        yield Fact("hardware", "memory", "ok", f"{available / GIB:.1f} GiB available")
    names = check.get("accelerators")
    if names:
        yield Fact("hardware", "accelerator", "ok", ", ".join(names))
    elif names is not None and shutil.which("nvidia-smi") and not check.get("torch_cuda"):
        text = "an NVIDIA driver is installed, but this torch is built for the CPU"
        yield Fact(
            "hardware", "accelerator", "warning", text, "install torch as https://pytorch.org/get-started/locally says"
        )
    else:
        text = (
            "none: models run on the CPU, which is enough for the embedded one" if names == [] else "torch cannot tell"
        )
        yield Fact("hardware", "accelerator", "ok" if names == [] else "warning", text)


def num_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory() -> int | None:
    """Bytes available, the control group's limit included; None where the system does not tell."""
    try:
        found = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return None
    limits = [int(found[1]) * 1024] if found else []
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())  # "max" where there is none
        limits.append(limit - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return min(limits, default=None)


def thread_facts(check: dict[str, Any]) -> Iterator[Fact]:
    threads = check.get("threads")
    if threads is None:
        yield Fact("threads", "torch", "warning", "not known, torch cannot be asked")
    elif threads > num_cpus():
        text = f"torch uses {threads} threads on {num_cpus()} CPUs"
        yield Fact("threads", "torch", "warning", text, f"export OMP_NUM_THREADS={num_cpus()}")
    else:
        yield Fact("threads", "torch", "ok", f"{threads} on {num_cpus()} CPUs")
    policy = os.environ.get("OMP_WAIT_POLICY", "")
    if policy.upper() == "PASSIVE":
        yield Fact("threads", "OMP_WAIT_POLICY", "ok", "PASSIVE: waiting threads leave the CPU to others")
    else:
        text = f"{policy or 'not set'}: waiting threads spin, which slows everything down once a CPU is shared"
        yield Fact("threads", "OMP_WAIT_POLICY", "warning", text, "export OMP_WAIT_POLICY=PASSIVE")


# ---- isolation and places


def isolation_facts() -> Iterator[Fact]:
    mechanisms = probe_isolation()
    for m in mechanisms:
        yield Fact("isolation", m.name, "ok" if m.works else "missing", m.text, m.fix)
    if isolation_level(mechanisms):
        yield level_fact(sandbox_check())
    else:
        fixes = [m.fix for m in mechanisms if not m.works and m.fix]
        text = "none: rewards that run programs are not possible here, all others are"
        yield Fact("isolation", "level", "warning", text, fixes[-1] if fixes else "")


def level_fact(check: dict[str, Any]) -> Fact:
    """At which level the sandbox runs programs here, all attacks on itself refused, and why not at a better one."""
    reasons = " ".join(check.get("passed_over", [check.get("error", "")]))
    if check.get("level"):
        why = f"; passed over: {reasons}" if reasons else ""
        return Fact("isolation", "level", "ok", f"{check['level']}: enough for code rewards{why}")
    text = f"none: rewards that run programs are not possible here ({reasons})"
    return Fact("isolation", "level", "warning", text, "point task.sandbox.url at a server: docs/sandbox.md")


def place_facts() -> Iterator[Fact]:
    """The cache, which training needs, and the folder of published data, which it does not."""
    cache = cache_directory()
    fault = write_fault(cache)
    if fault:
        fix = "export UNMASK_CACHE=<a writable directory>"
        yield Fact("places", "cache", "missing", f"{cache} cannot be written: {fault}", fix, is_required=True)
    else:
        free = shutil.disk_usage(existing_parent(cache)).free
        text = f"{cache}, {free / GIB:.1f} GiB free"
        is_small = free < GIB
        fix = "free some space, or export UNMASK_CACHE=<a directory on another disk>" if is_small else ""
        yield Fact("places", "cache", "warning" if is_small else "ok", text, fix, is_required=True)
    data = data_directory()
    if data is None:
        text = "optional: UNMASK_DATA is not set, so tests on published task data are skipped"
        yield Fact("places", "data", "missing", text, "export UNMASK_DATA=<the folder of task data>")
    elif not data.is_dir():
        yield Fact("places", "data", "warning", f"UNMASK_DATA={data} is no directory", "unset UNMASK_DATA")
    else:
        yield Fact("places", "data", "ok", str(data))


def existing_parent(path: Path) -> Path:
    """The path itself or the nearest directory above that exists."""
    path = path.absolute()
    while not os.path.lexists(path) and path != path.parent:
        path = path.parent
    return path


def write_fault(path: Path) -> str:
    """Why nothing can be written at `path` (which need not exist yet); "" if it can. Leaves nothing behind."""
    parent = existing_parent(path)
    if not parent.is_dir():
        return f"{parent} is not a directory"
    try:
        with tempfile.TemporaryFile(dir=parent) as file:
            file.write(b"unmask")
    except OSError as error:
        return f"{error.strerror} in {parent}"
    return ""
