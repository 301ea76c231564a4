"""Runs many commands of kd-bench quickly: torch and lmms-eval are imported once, then forked.

`python -m tests.docs.shell` reads a JSON line {"arguments", "folder", "env"} and answers with
{"code", "output"}; `Shell` is its other end.
"""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[2]
PLAIN = set("|&;<>()$`*?~{}")
"""A command with one of these outside of quotes is the shell's business."""


class Shell:
    """A user's shell in one folder.

    Attributes:
        folder: where commands run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._environment = {
            **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
            "COLUMNS": "100",
        }  # fmt: skip
        self._environment.pop("GITHUB_ACTIONS", None)
        self._environment.pop("GITHUB_STEP_SUMMARY", None)
        self._plain = dict(self._environment)
        self._server: subprocess.Popen[str] | None = None

    def enter(self, folder: Path) -> None:
        """Go to another folder with the environment that the shell began with."""
        self.folder, self._environment = folder, dict(self._plain)

    def run(self, command: str) -> tuple[int, str]:
        """Exit code and output of one command line."""
        words = shlex.split(command)
        if words[0] == "export":
            self._environment.update(word.split("=", 1) for word in words[1:])
            return 0, ""
        bare = "".join(shlex.split(command, posix=False)) if not {"'", '"'} & set(command) else ""
        if words[0] == "kd-bench" and not PLAIN & set(bare):
            return self._ask(words[1:])
        with tempfile.TemporaryDirectory() as place:
            script = Path(place) / "kd-bench"
            script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m kd_bench "$@"\n')
            script.chmod(0o755)
            path = os.pathsep.join([place, str(Path(sys.executable).parent), os.environ["PATH"]])
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", command],
                cwd=self.folder, env={**self._environment, "PATH": path},
                capture_output=True, text=True, check=False,
            )  # fmt: skip
        return done.returncode, done.stdout + done.stderr

    def python(self, code: str) -> tuple[int, str]:
        """Exit code and output of a Python program."""
        return self._ask(["-c", code])

    def _ask(self, arguments: list[str]) -> tuple[int, str]:
        if self._server is None:
            self._server = subprocess.Popen(
                [sys.executable, "-m", "tests.docs.shell"],
                cwd=ROOT, env=self._plain, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        asked = {"arguments": arguments, "folder": str(self.folder), "env": self._environment}
        json.dump(asked, self._server.stdin)
        self._server.stdin.write("\n")
        self._server.stdin.flush()
        answer = json.loads(self._server.stdout.readline())
        return answer["code"], answer["output"]

    def close(self) -> None:
        """End the process that runs the commands."""
        if self._server is not None:
            assert self._server.stdin is not None
            self._server.stdin.close()
            self._server.wait(timeout=60)


def _child(arguments: list[str], folder: str, output: int, environment: Any) -> NoReturn:
    os.chdir(folder)
    os.environ.update(environment)
    signal.alarm(300)  # a block that takes longer belongs behind `<!-- needs: hours -->`
    for stream in (1, 2):
        os.dup2(output, stream)
    code: Any = 0
    try:
        if arguments[:1] == ["-c"]:
            exec(compile(arguments[1], "<block>", "exec"), {"__name__": "__main__"})
        else:
            from kd_bench.cli import main

            sys.argv = ["kd-bench", *arguments]
            main()
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


def serve() -> None:
    """Answer commands until the other end closes."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what imports print is no answer
    import lmms_eval.evaluator
    import matplotlib.figure
    import pandas
    import torch
    import transformers.trainer

    assert all((lmms_eval.evaluator, matplotlib.figure, pandas, torch, transformers.trainer))
    from kd_bench.distill import train  # noqa: F401
    from kd_bench.evals import run  # noqa: F401

    for line in sys.stdin:
        asked = json.loads(line)
        with tempfile.TemporaryFile() as output:
            child = os.fork()
            if not child:
                _child(asked["arguments"], asked["folder"], output.fileno(), asked["env"])
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            output.seek(0)
            text = output.read().decode(errors="replace")
        print(json.dumps({"code": code, "output": text}), file=answers, flush=True)


if __name__ == "__main__":
    serve()
