"""What a training says while it runs: a live bar on a terminal, plain lines elsewhere."""

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column
from transformers import TrainerCallback

from kd_bench.files import write_text

TERM = "term_"


def duration(seconds: float) -> str:
    """`4s`, `3m 20s`, `2h 05m`."""
    whole = max(round(seconds), 0)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"


class LogWriter(TrainerCallback):
    """Appends one JSON object a logging step to `train_log.jsonl`.

    Args:
        samples: samples of one optimizer step.
    """

    def __init__(self, path: Path, stage: str, samples: int) -> None:
        self.path = path
        self.stage = stage
        self.samples = samples
        self._clock = 0.0
        self._step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._clock = time.perf_counter()
        self._step = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if not logs or "loss" not in logs:
            return
        now = time.perf_counter()
        steps = max(state.global_step - self._step, 1)
        seconds = now - self._clock
        seconds_a_step = seconds / steps
        self._clock, self._step = now, state.global_step
        names = [name for name in logs if name.startswith(TERM)]
        logs["terms"] = {name.removeprefix(TERM): logs.pop(name) for name in names}
        logs["samples_per_second"] = self.samples / seconds_a_step
        logs["seconds_left"] = (state.max_steps - state.global_step) * seconds_a_step
        if not state.is_world_process_zero:
            return
        record = {"stage": self.stage, "step": state.global_step, "steps": state.max_steps}
        record |= {key: _short(value) for key, value in logs.items()}
        record |= {
            "seconds": _short(seconds),
            "devices": args.world_size,
            "device": args.device.type,
        }
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")


def _short(value: Any) -> Any:
    """Numbers to seven digits, inside mappings too."""
    if isinstance(value, dict):
        return {key: _short(entry) for key, entry in value.items()}
    return float(f"{value:.7g}") if isinstance(value, float) else value


def spent(path: Path, stage: str) -> dict[str, Any]:
    """What a stage cost by its log: seconds on all devices together, their kind, tokens read.

    What was trained twice because a run was killed counts once.
    """
    seconds, tokens, kinds = 0.0, 0, set()
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
            if record["stage"] != stage:
                continue
            seconds += record["seconds"] * record["devices"]
            kinds.add(record["device"])
        except (ValueError, KeyError, TypeError):
            return {}  # of a version that did not log it
        tokens = max(tokens, int(record.get("num_input_tokens_seen") or 0))
    if not kinds:
        return {}
    found = {"device_seconds": round(seconds, 3), "device": "/".join(sorted(kinds))}
    return found | ({"tokens": tokens} if tokens else {})


def cut_log(path: Path, stages: list[str], stage: str, step: int) -> None:
    """Drop what an interrupted run logged after the checkpoint that it resumes from.

    Args:
        stages: names of the stages before `stage`, whose lines all stay.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            record = json.loads(line)
            kept_stage, reached = record["stage"], int(record["step"])
        except (ValueError, KeyError, TypeError):
            continue  # a torn last line, or a damaged one
        if kept_stage in stages or (kept_stage == stage and reached <= step):
            kept.append(line + "\n")
    write_text(path, "".join(kept))


class ProgressReport(TrainerCallback):
    """Shows the losses by term, learning rate, samples a second and time left.

    On a terminal the bar moves with every step; where a line is narrow, its end is cut, so stage,
    step and time left come first.
    """

    def __init__(self, stage: str, console: Console, every: float = 10.0) -> None:
        self.stage = stage
        self.console = console
        self.every = every
        self._bar: Progress | None = None
        self._task: Any = None
        self._printed = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=max(min(24, self.console.width // 8), 8)),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", table_column=Column(no_wrap=True, ratio=1)),
                console=self.console,
                expand=True,
                transient=True,
            )
            self._task = self._bar.add_task(
                self.stage, total=state.max_steps, completed=state.global_step, note="first step"
            )
            self._bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        if self._bar is not None:
            self._bar.update(self._task, note=self.note(logs))
            return
        now = time.monotonic()
        last = state.global_step >= state.max_steps
        if last or now - self._printed >= self.every:
            self._printed = now
            self.console.print(
                f"{self.stage} {state.global_step}/{state.max_steps}  {self.note(logs)}"
                + (f"  {duration(logs['seconds_left'])} left" if "seconds_left" in logs else ""),
                highlight=False,
                soft_wrap=True,
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Take the live bar off the terminal."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    @staticmethod
    def note(logs: dict[str, Any]) -> str:
        """One line: `loss 2.310 (ce 1.900, align 0.250)  lr 1.0e-03  410 samples/s`."""
        terms = ", ".join(f"{name} {value:.3f}" for name, value in logs.get("terms", {}).items())
        parts = [f"loss {logs['loss']:.3f}" + (f" ({terms})" if terms else "")]
        parts.append(f"lr {logs['learning_rate']:.1e}")
        if "samples_per_second" in logs:
            parts.append(f"{logs['samples_per_second']:.0f} samples/s")
        return "  ".join(parts)
