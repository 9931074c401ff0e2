"""Runs Python in a process of its own, for what an environment variable or a fork decides."""

import contextlib
import fcntl
import os
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@contextlib.contextmanager
def exclusive(name: str):
    """Only one of the pytest workers at a time enters: for what is written inside the source tree."""
    (ROOT / "build").mkdir(exist_ok=True)
    with open(ROOT / "build" / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def run(command: list[str], env: dict[str, str] | None = None, timeout: float = 240, cwd: Path = ROOT):
    """The finished process; standard output and error come as text."""
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, cwd=cwd, env={**os.environ, **(env or {})}
    )


def run_python(code: str, env: dict[str, str] | None = None, timeout: float = 120) -> str:
    """Runs `code` (indentation is removed) and returns what it printed; fails with its error output."""
    done = run([sys.executable, "-c", textwrap.dedent(code)], env, timeout)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def run_pytest(*arguments: str, env: dict[str, str] | None = None, timeout: float = 280) -> int:
    """Runs tests in a new process and returns how many passed; fails when one fails or none runs."""
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts="]
    done = run([sys.executable, "-m", "pytest", *options, *arguments], env, timeout)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    words = done.stdout.strip().splitlines()[-1].replace(",", "").split()
    return int(words[words.index("passed") - 1])
