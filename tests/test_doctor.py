"""`unmask doctor`: both verdicts, every status, and an answer whatever is broken."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from unmask import doctor, isolation, self_check
from unmask.cli import main
from unmask.doctor import Fact, Requirement, can_train, parse_requirement, satisfies
from unmask.isolation import Mechanism, isolation_level
from unmask.places import cache_directory

HEALTHY = {"updates": 1, "seconds": 0.05, "threads": 1, "accelerators": [], "torch_cuda": None}


@pytest.fixture
def healthy(monkeypatch, tmp_path):
    """The self check and the imports of extras pass without being made; cache and data lie in a temporary folder."""
    monkeypatch.setattr(doctor, "self_check", lambda: HEALTHY)
    monkeypatch.setattr(doctor, "failing_imports", lambda names: {})
    monkeypatch.setattr(doctor, "sandbox_check", lambda: {"level": "landlock(ABI 7)+seccomp", "passed_over": []})
    monkeypatch.setenv("UNMASK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("UNMASK_DATA", str(tmp_path))
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")


def report(capsys) -> tuple[int, dict[tuple[str, str], dict]]:
    """(exit code, facts by section and name)."""
    code = main(["doctor", "--json"])
    out = json.loads(capsys.readouterr().out)
    assert out["can_train"] == (code == 0)
    return code, {(fact["section"], fact["name"]): fact for fact in out["facts"]}


def lose(monkeypatch, name: str, version: str | None = None) -> None:
    """Pretend that a package has another version, or none."""
    real = metadata.version

    def pretended(package: str) -> str:
        if package != name:
            return real(package)
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", pretended)


def test_a_healthy_machine_gets_a_zero_and_a_line_for_each_required_package(healthy, capsys):
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "The embedded model can be trained here."
    assert all(line.split()[0] in ("ok", "missing", "warning") for line in lines[:-2])
    for name in ("torch", "transformers", "tokenizers", "accelerate", "safetensors", "numpy", "rich", "tomli-w"):
        assert any(line.split()[:3] == ["ok", "packages", name] for line in lines), name


def test_a_missing_required_package_is_named_with_its_pip_command_and_ends_in_a_one(healthy, monkeypatch, capsys):
    lose(monkeypatch, "safetensors")
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if "safetensors" in line]
    assert line.startswith("missing") and line.endswith(f"-> {sys.executable} -m pip install 'safetensors>=0.5'")
    assert out.endswith("The embedded model cannot be trained here.\n")


def test_a_required_package_out_of_its_range_ends_in_a_one(healthy, monkeypatch, capsys):
    lose(monkeypatch, "transformers", "4.57.1")
    code, facts = report(capsys)
    fact = facts["packages", "transformers"]
    assert code == 1 and fact["status"] == "missing"
    assert fact["text"] == "4.57.1 is installed, transformers>=5.6 is required"


def test_a_missing_extra_is_no_fault(healthy, monkeypatch, capsys):
    lose(monkeypatch, "matplotlib")
    code, facts = report(capsys)
    assert code == 0 and facts["extras", "plot"]["status"] == "missing"
    assert facts["extras", "plot"]["fix"].endswith("-m pip install 'matplotlib>=3.8'")
    assert facts["extras", "dev"]["status"] == "missing"  # it lists matplotlib too


def test_trackers_are_told_apart(healthy, monkeypatch, capsys):
    lose(monkeypatch, "tensorboard", "2.19.0")
    monkeypatch.setattr(doctor, "failing_imports", lambda names: {"tensorboard": "ImportError: x"} if names else {})
    _, facts = report(capsys)
    assert facts["trackers", "tensorboard"]["status"] == "warning"
    assert "ImportError: x" in facts["trackers", "tensorboard"]["text"]
    lose(monkeypatch, "tensorboard")
    assert (
        report(capsys)[1]["trackers", "tensorboard"]["fix"].split(" install ")[1].strip("'").startswith("tensorboard")
    )


def test_a_cache_that_cannot_be_written_ends_in_a_one(healthy, monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("UNMASK_CACHE", str(tmp_path / "file" / "cache"))
    code, facts = report(capsys)
    cache = facts["places", "cache"]
    assert code == 1 and cache["status"] == "missing" and "UNMASK_CACHE" in cache["fix"]
    assert f"{tmp_path / 'file'} is not a directory" in cache["text"]


def test_asking_creates_nothing_and_names_the_cache_that_runs_use(healthy, tmp_path, capsys):
    _, facts = report(capsys)
    assert facts["places", "cache"]["status"] == "ok"
    assert facts["places", "cache"]["text"].startswith(f"{cache_directory()}, ")
    assert list(tmp_path.iterdir()) == []


def test_data_folder(healthy, monkeypatch, tmp_path, capsys):
    assert report(capsys)[1]["places", "data"]["status"] == "ok"
    monkeypatch.setenv("UNMASK_DATA", str(tmp_path / "none"))
    assert report(capsys)[1]["places", "data"]["status"] == "warning"
    monkeypatch.delenv("UNMASK_DATA")
    code, facts = report(capsys)
    assert code == 0 and facts["places", "data"]["status"] == "missing"


def test_threads_and_accelerators_are_judged(healthy, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "num_cpus", lambda: 2)
    monkeypatch.setattr(doctor, "self_check", lambda: HEALTHY | {"threads": 8, "accelerators": ["H"]})
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    code, facts = report(capsys)
    assert code == 0
    assert facts["threads", "torch"]["fix"] == "export OMP_NUM_THREADS=2"
    assert facts["threads", "OMP_WAIT_POLICY"]["status"] == "warning"
    assert facts["hardware", "accelerator"] | {"status": "ok", "text": "H"} == facts["hardware", "accelerator"]


def test_little_memory_is_a_warning(healthy, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "available_memory", lambda: 300 << 20)
    code, facts = report(capsys)
    assert code == 0 and facts["hardware", "memory"]["status"] == "warning"
    assert facts["hardware", "memory"]["text"].startswith("0.3 GiB")


def test_without_metadata_the_ranges_are_unknown_and_said_to_be(healthy, monkeypatch, capsys):
    def requires(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", requires)
    code, facts = report(capsys)
    assert code == 0 and facts["packages", "unmask"]["status"] == "warning"


# ---- broken packages, for real


def test_a_torch_that_cannot_be_imported_still_gets_an_answer(tmp_path, monkeypatch, capsys):
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch.so: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(doctor, "failing_imports", lambda names: {})
    code, facts = report(capsys)
    assert code == 1
    assert "ImportError: libtorch.so: cannot open" in facts["training", "self check"]["text"]
    assert "--force-reinstall torch" in facts["training", "self check"]["fix"]
    assert facts["threads", "torch"]["status"] == "warning"


def test_an_extra_that_cannot_be_imported_is_a_warning(tmp_path, monkeypatch, capsys):
    (tmp_path / "matplotlib.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    monkeypatch.setenv("UNMASK_CACHE", str(tmp_path))
    monkeypatch.setattr(doctor, "self_check", lambda: HEALTHY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    lose(monkeypatch, "matplotlib", "3.9")
    code, facts = report(capsys)
    assert code == 0 and facts["extras", "plot"]["status"] == "warning"
    assert "ended by signal 9" in facts["extras", "plot"]["text"]


def test_damaged_metadata_counts_as_not_installed(tmp_path, monkeypatch):
    (tmp_path / "broken_thing-1.0.dist-info").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert doctor.installed_version("broken-thing") is None


def test_the_self_check_makes_one_update(capsys):
    self_check.main()
    check = json.loads(capsys.readouterr().out)
    assert check["updates"] == 1 and check.keys() == HEALTHY.keys()


@pytest.mark.slow  # a second interpreter imports torch
def test_the_self_check_answers_from_its_own_process():
    assert doctor.self_check()["updates"] == 1


@pytest.mark.parametrize(("code", "expected"), [("", "unexpected output"), ("1/0", "ZeroDivisionError")])
def test_a_self_check_without_an_answer_is_an_error(code, expected, monkeypatch):
    start = doctor._start
    monkeypatch.setattr(doctor, "_start", lambda *arguments: start("-c", code))
    assert expected in doctor.self_check()["error"]


def test_a_hanging_import_is_given_up(monkeypatch):
    monkeypatch.setattr(doctor, "SECONDS_TO_IMPORT", 0.2)
    process = doctor._start("-c", "import time; time.sleep(60)")
    assert doctor._finish(process) == ("", "no answer within 0 s")
    assert isinstance(process, subprocess.Popen) and process.returncode is not None


# ---- requirement lines and versions


def test_requirement_lines():
    assert parse_requirement("torch>=2.6") == Requirement("torch", ">=2.6", None)
    assert parse_requirement('tomli-w (>=1.0,<2) ; extra == "plot"') == Requirement("tomli-w", ">=1.0,<2", "plot")
    assert parse_requirement("accelerate[x,y]==1.0").range == "==1.0"
    assert parse_requirement("rich").text == "rich"


@pytest.mark.parametrize(
    ("version", "wanted", "expected"),
    [
        ("2.13.0+cpu", ">=2.6", True),  # as numbers: 13 > 6, though "1" < "6"
        ("2.5.1", ">=2.6", False),
        ("2.6", ">=2.6.0", True),
        ("3.0", ">=2.6,<3", False),
        ("2.9", ">=2.6,<3", True),
        ("1.4.5", "~=1.4.2", True),
        ("1.5.0", "~=1.4.2", False),
        ("1.0", "!=1.0.0", False),
        ("2.7.0rc1", ">2.6", True),
        ("", ">=1", False),
        ("1.0", "", True),
    ],
)
def test_version_ranges(version, wanted, expected):
    assert satisfies(version, wanted) is expected


def test_only_required_lines_decide():
    optional = Fact("extras", "plot", "missing", "")
    assert can_train([optional, Fact("packages", "torch", "ok", "", is_required=True)])
    assert can_train([Fact("places", "cache", "warning", "", is_required=True)])
    assert not can_train([optional, Fact("packages", "torch", "missing", "", is_required=True)])


# ---- isolation


@pytest.mark.parametrize(
    ("working", "level"),
    [
        ({"bubblewrap", "user namespaces", "landlock", "seccomp"}, "namespaces (bubblewrap) + seccomp"),
        ({"landlock", "seccomp"}, "landlock + seccomp"),
        ({"user namespaces", "seccomp"}, None),
        ({"bubblewrap", "landlock"}, None),
    ],
)
def test_isolation_levels(working, level, healthy, monkeypatch, capsys):
    names = ("bubblewrap", "user namespaces", "landlock", "seccomp")
    mechanisms = [Mechanism(name, name in working, "x", "mend it") for name in names]
    assert isolation_level(mechanisms) == level
    monkeypatch.setattr(doctor, "probe_isolation", lambda: mechanisms)
    code, facts = report(capsys)
    assert code == 0 and facts["isolation", "level"]["status"] == ("ok" if level else "warning")


def test_the_level_is_the_one_that_the_sandbox_found_and_says_why_not_a_better_one(healthy, monkeypatch, capsys):
    every = [Mechanism(name, True, "x") for name in ("bubblewrap", "user namespaces", "landlock", "seccomp")]
    monkeypatch.setattr(doctor, "probe_isolation", lambda: every)
    for check, status, text in (
        ({"level": "namespaces+seccomp", "passed_over": []}, "ok", "namespaces+seccomp: enough for code rewards"),
        ({"level": "landlock(ABI 7)+seccomp", "passed_over": ["bwrap fails."]}, "ok", "passed over: bwrap fails."),
        ({"level": None, "passed_over": ["a program can start a process."]}, "warning", "can start a process"),
        ({"error": "no answer within 180 s"}, "warning", "not possible here (no answer within 180 s)"),
    ):
        monkeypatch.setattr(doctor, "sandbox_check", lambda check=check: check)
        fact = report(capsys)[1]["isolation", "level"]
        assert fact["status"] == status and text in fact["text"]


def test_a_bubblewrap_that_is_refused_does_not_count(tmp_path, monkeypatch):
    bwrap = tmp_path / "bwrap"
    bwrap.write_text("#!/bin/sh\necho 'bwrap: setting up uid map: Permission denied' >&2\nexit 1\n")
    bwrap.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = isolation.bubblewrap()
    assert not found.works and "setting up uid map: Permission denied" in found.text and found.fix
    bwrap.write_text("#!/bin/sh\nexit 0\n")
    assert isolation.bubblewrap().works
    bwrap.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert isolation.bubblewrap() == Mechanism(
        "bubblewrap", False, "bwrap is not installed", "install bubblewrap with the system's package manager"
    )


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux system calls")
def test_landlock_answers_by_abi_or_by_errno(monkeypatch):
    monkeypatch.setattr(isolation, "_system_call", lambda *a: (4, 0))
    assert isolation.landlock() == Mechanism("landlock", True, "ABI 4")
    monkeypatch.setattr(isolation, "_system_call", lambda *a: (-1, errno.EOPNOTSUPP))
    assert not isolation.landlock().works and "lsm=" in isolation.landlock().fix


@pytest.mark.skipif(not Path("/proc/sys/kernel/seccomp/actions_avail").exists(), reason="the kernel does not tell")
def test_the_seccomp_probe_agrees_with_the_kernel():
    actions = Path("/proc/sys/kernel/seccomp/actions_avail").read_text().split()
    assert isolation.seccomp().works == ("kill_process" in actions)


def test_other_systems_have_no_level(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert isolation_level(isolation.probe_isolation()) is None
