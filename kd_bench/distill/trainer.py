"""transformers' Trainer, taught to distil: loss by terms, NaN stop, whole checkpoints, its log.

Everything else (devices, accumulation, mixed precision, resuming, loggers) is the Trainer's own.
"""

import contextlib
import json
import netrc
import os
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback

from kd_bench.distill.distiller import Distiller
from kd_bench.distill.encoding import BatchOrder, Collator
from kd_bench.distill.objective import KneeLog, count_items
from kd_bench.distill.recipe import Recipe, Stage, needs_student_logits
from kd_bench.errors import TrainingError, UsageError, one_line
from kd_bench.files import read_json, replace_folder, unsound, write_digests, write_text

TERM = "term_"
STATE = "weights.safetensors"
STAGING = ".saving"


def check_loggers(names: Sequence[str]) -> None:
    """Whether the loggers of `report_to` can start here.

    Raises:
        UsageError: a package is missing, or Weights & Biases knows no key.
    """
    for name in names:
        if find_spec(name) is None:
            raise UsageError(
                f"report_to: the package {name} is not installed.", f"pip install {name}"
            )
    if "wandb" not in names or os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].strip("/")
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        if os.environ.get("WANDB_API_KEY") or netrc.netrc().authenticators(host) is not None:
            return
    raise UsageError(
        "report_to: Weights & Biases has no key on this machine.",
        "Run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline.",
    )


def trainer_arguments(
    recipe: Recipe, stage: Stage, folder: Path, steps: int, micro_batch: int, seed: int
) -> TrainingArguments:
    """The stage's settings in the Trainer's words.

    Args:
        folder: where its checkpoints go.
        steps: optimizer steps in all.
        micro_batch: samples that one device takes at a time.
    """
    schedule = "constant_with_warmup" if stage.schedule == "constant" else stage.schedule
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=stage.gradient_accumulation,
        max_steps=steps,
        learning_rate=stage.learning_rate,
        lr_scheduler_type=schedule,
        warmup_steps=stage.warmup,
        weight_decay=stage.weight_decay,
        adam_beta1=stage.betas[0],
        adam_beta2=stage.betas[1],
        max_grad_norm=stage.max_grad_norm,
        bf16=stage.mixed,
        use_cpu=not torch.accelerator.is_available(),
        logging_steps=stage.log_every,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="non_padding",
        save_strategy="steps" if stage.save_every else "no",
        save_steps=stage.save_every or 500,
        report_to=list(recipe.report_to) or "none",
        project="kd-bench",
        run_name=f"{recipe.output_folder.name}-{stage.name}",
        seed=seed,
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_num_workers=stage.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        accelerator_config={"non_blocking": torch.cuda.is_available()},  # from pinned memory
        # Terms on the switch alone leave the language model out.
        ddp_find_unused_parameters=not needs_student_logits(stage.objective),
        average_tokens_across_devices=True,
    )


@dataclass(eq=False)
class ProgressReport(TrainerCallback):
    """What a training says while it runs: a live bar on a terminal, plain lines elsewhere, a log.

    On a terminal the bar moves with every step; where a line is narrow, its end is cut, so stage,
    step and time left come first.

    Args:
        log: `train_log.jsonl`, to which each logging step appends one JSON object.
        samples: samples of one optimizer step.
        done: names of the stages before this one, whose lines in `log` stay.
        every: seconds between plain lines.
    """

    stage: str
    console: Console
    log: Path | None = None
    samples: int = 1
    done: Sequence[str] = ()
    every: float = 10.0
    _bar: Progress | None = None
    _task: Any = None
    _printed: float = 0.0
    _clock: float = 0.0
    _step: int = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start clock and bar; cut the log back to the step that is resumed from."""
        self._clock, self._step = time.perf_counter(), state.global_step
        if not state.is_world_process_zero:
            return
        if self.log is not None and self.log.exists():
            self._cut_log(self.log, state.global_step)
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

    def _cut_log(self, path: Path, step: int) -> None:
        """Drop what an interrupted run logged after the step that it resumes from."""
        kept = []
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                record = json.loads(line)
                stage, reached = record["stage"], int(record["step"])
            except (ValueError, KeyError, TypeError):
                continue  # a torn last line, or a damaged one
            if stage in self.done or (stage == self.stage and reached <= step):
                kept.append(line + "\n")
        write_text(path, "".join(kept))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Write a line of the log and show it."""
        if not logs or "loss" not in logs:
            return
        now = time.perf_counter()
        seconds = now - self._clock
        seconds_a_step = seconds / max(state.global_step - self._step, 1)
        self._clock, self._step = now, state.global_step
        names = [name for name in logs if name.startswith(TERM)]
        logs.setdefault("terms", {name.removeprefix(TERM): logs.pop(name) for name in names})
        logs["samples_per_second"] = self.samples / seconds_a_step
        logs["seconds_left"] = (state.max_steps - state.global_step) * seconds_a_step
        if not state.is_world_process_zero:
            return
        if self.log is not None:
            record = {"stage": self.stage, "step": state.global_step, "steps": state.max_steps}
            record |= {**logs, "seconds": seconds, "devices": args.world_size}
            with self.log.open("a", encoding="utf-8") as stream:
                line = json.dumps(_short(record | {"device": args.device.type}))
                stream.write(line + "\n")
        if self._bar is not None:
            self._bar.update(self._task, note=self.note(logs))
        elif state.global_step >= state.max_steps or now - self._printed >= self.every:
            self._printed = now
            self.console.print(
                f"{self.stage} {state.global_step}/{state.max_steps}  {self.note(logs)}"
                f"  {duration(logs['seconds_left'])} left",
                highlight=False,
                soft_wrap=True,
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Close the bar."""
        self.close()

    def close(self) -> None:
        """Take the live bar off the terminal."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    @staticmethod
    def note(logs: dict[str, Any]) -> str:
        """One line: `loss 2.310 (ce 1.900, align 0.250)  lr 1.0e-03  410 samples/s`."""
        terms = ", ".join(f"{name} {value:.3f}" for name, value in logs["terms"].items())
        return (
            f"loss {logs['loss']:.3f}"
            + (f" ({terms})" if terms else "")
            + f"  lr {logs['learning_rate']:.1e}  {logs['samples_per_second']:.0f} samples/s"
        )


def duration(seconds: float) -> str:
    """`4s`, `3m 20s`, `2h 05m`."""
    whole = max(round(seconds), 0)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"


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


class EpochOrderCallback(TrainerCallback):
    """Sets the epoch's order, also on resuming, and logs the last step instead of saving it."""

    def __init__(self, order: BatchOrder) -> None:
        self.order = order

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Set the order of the epoch that the step lies in."""
        self.order.set_epoch(state.global_step // self.order.steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Log the last step, and leave saving to the stage."""
        if state.global_step >= state.max_steps:
            control.should_log = True
            control.should_save = False  # the stage's own model follows at once


class DistillationTrainer(Trainer):
    """Trains a `Distiller`.

    Args:
        order: which samples make up which batch.
        stage: of whose settings the vision tower's own learning rate is used.
        lineage: file that is copied into every checkpoint.
    """

    model: Distiller
    optimizer: Any

    def __init__(
        self,
        distiller: Distiller,
        arguments: TrainingArguments,
        order: BatchOrder,
        collator: Collator,
        *,
        stage: Stage,
        report: ProgressReport,
        lineage: Path | None = None,
    ) -> None:
        super().__init__(
            model=distiller,
            args=arguments,
            train_dataset=order.dataset,
            data_collator=collator,
            callbacks=[EpochOrderCallback(order), report],
        )
        self.remove_callback(PrinterCallback)
        self._name_loggers()
        self.stage = stage
        self.report = report
        self.lineage = lineage
        self.order = order
        self.dataset = order.dataset
        self._sums: dict[str, Tensor] = {}
        self._summed_from = 0
        self._unchecked: list[tuple[int, Tensor, Tensor]] = []
        self._knee_log: KneeLog | None = None
        self._watches_knees = any(term.loss == "dbild" for term in distiller.terms)
        if distiller.teacher is not None:
            distiller.teacher.model.to(self.args.device)

    def _name_loggers(self) -> None:
        """One project and one run name in every logger; trackio takes both from the arguments."""
        os.environ.setdefault("WANDB_PROJECT", str(self.args.project))
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
                runs = Path(str(self.args.output_dir)) / "runs"
                callback.logging_dir = str(runs / str(self.args.run_name))

    # Data

    def get_train_dataloader(self) -> DataLoader:
        """Batches in the order of `BatchOrder`; accelerate deals them out to the devices."""
        workers = self.args.dataloader_num_workers
        loader = DataLoader(
            self.dataset,
            batch_sampler=self.order,
            collate_fn=self.data_collator,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    def first_batch(self) -> dict[str, Tensor]:
        """The first batch of all, on this process's device."""
        samples = [self.dataset[index] for index in next(iter(self.order))]
        return self._prepare_inputs(self.data_collator(samples))

    def image_batch(self) -> dict[str, Tensor] | None:
        """One sample with an image, on this process's device; None where there is none."""
        sample = self.dataset.first_with_image()
        return None if sample is None else self._prepare_inputs(self.data_collator([sample]))

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The micro-batches of a step, and `count_items` over all of them and all devices."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not samples:
            return samples, None
        token = self.model.parts.image_token_id
        counts = [count_items(batch, token) for batch in samples]
        added = torch.stack([torch.stack(list(count.values())) for count in counts]).sum(0)
        added = self.accelerator.reduce(added.to(device), "sum")
        return samples, dict(zip(counts[0], added, strict=True))

    # One step

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Mapping[str, Tensor] | None = None,
    ) -> Any:
        """The distiller's loss; keeps every term's value for the log."""
        for index, reason in inputs.pop("unreadable", []):
            self.dataset.give_up(index, reason)
        samples = inputs["sample_index"]
        items: Any = num_items_in_batch
        if items is None:
            items = count_items(inputs, self.model.parts.image_token_id)
        if self._watches_knees and (self.state.global_step + 1) % self.args.logging_steps == 0:
            self._knee_log = self._knee_log or KneeLog()
        loss, values = model(inputs, items, self._knee_log)
        if not self._sums:
            self._summed_from = self.state.global_step
        for name, value in values.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._unchecked.append((self.state.global_step + 1, loss.detach(), samples))
        if loss.device.type == "cpu":
            self.check_finite()  # costs nothing here; elsewhere it would wait for the device
        if self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over processes
        return (loss, values) if return_outputs else loss

    def check_finite(self) -> None:
        """Stop at the first loss that is not finite, naming its step and samples.

        Raises:
            TrainingError: training cannot go on; the last checkpoint is untouched.
        """
        pending, self._unchecked = self._unchecked, []
        if not pending or bool(torch.isfinite(torch.stack([loss for _, loss, _ in pending])).all()):
            return
        for step, loss, samples in pending:
            if bool(torch.isfinite(loss)):
                continue
            names = ", ".join(self.dataset.conversations[i].id for i in samples.tolist() if i >= 0)
            raise TrainingError(
                f"Stage {self.stage.name!r}: the loss became {float(loss)} at step {step}, on the "
                f"samples {names}.",
                "The last checkpoint is kept. Look at those samples, or lower learning_rate.",
            )

    # Optimizer

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's, with a learning rate of its own for the vision tower where asked."""
        made_before, rate = self.optimizer is not None, self.stage.vision_tower_learning_rate
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if made_before or rate is None:
            return optimizer
        tower = {id(p) for p in self.model.parts.vision_tower.parameters()}
        for group in list(optimizer.param_groups):
            if seeing := [p for p in group["params"] if id(p) in tower]:
                group["params"] = [p for p in group["params"] if id(p) not in tower]
                optimizer.add_param_group({**group, "params": seeing, "lr": rate})
        # In the order of the weights, by which a checkpoint's states are found again.
        place = {id(p): number for number, p in enumerate(self.model.parameters())}
        groups = (group for group in optimizer.param_groups if group["params"])
        optimizer.param_groups[:] = sorted(groups, key=lambda group: place[id(group["params"][0])])
        return optimizer

    # Log

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Add every term's mean since the last log, and the knees, to what the Trainer logs.

        Flat, as `term_ce`: TensorBoard and its like plot numbers only.
        """
        if "loss" in logs:
            self.check_finite()
            labels = [term.label for term in self.model.terms]
            nothing = torch.zeros((), device=self.args.device)
            sums = torch.stack([self._sums.get(label, nothing).detach() for label in labels])
            steps = max(self.state.global_step - self._summed_from, 1)
            means = (self.accelerator.reduce(sums, "sum") / steps).tolist()
            logs |= {f"{TERM}{label}": mean for label, mean in zip(labels, means, strict=True)}
            self._sums = {}
            if self._knee_log is not None:
                logs |= self._knee_log.summary()
                self._knee_log = None
        super().log(logs, start_time)

    # Checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, STAGING) if self._staging else folder  # noqa: PTH118

    _staging = False

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint aside and rename it when it is whole; then drop the one before.

        Raises:
            TrainingError: the disk is full; the checkpoint before is untouched.
        """
        self.check_finite()
        learning = [p.detach() for p in self.model.parameters() if p.requires_grad]
        if not all(bool(torch.isfinite(p).all()) for p in learning):
            raise TrainingError(  # a checkpoint of broken weights would be worse than none
                f"Stage {self.stage.name!r}: weights are no longer finite at step "
                f"{self.state.global_step}.",
                "The last checkpoint is kept. Lower learning_rate or max_grad_norm.",
            )
        folder, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        staging = folder / STAGING
        try:
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)
            self._staging = True
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self._complete(staging / name, folder / name)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch's writer has no errno
            raise TrainingError(
                f"The checkpoint at step {self.state.global_step} could not be written to "
                f"{folder}: {getattr(error, 'strerror', None) or one_line(error)}.",
                "Make room and run the same command again: it resumes from the checkpoint before.",
            ) from error
        finally:
            self._staging = False
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)

    def _complete(self, written: Path, checkpoint: Path) -> None:
        """Digest a checkpoint, put it in its place, and keep of the others only the one before."""
        if self.lineage is not None and self.lineage.exists():
            shutil.copyfile(self.lineage, written / self.lineage.name)
        write_digests(written)
        replace_folder(written, checkpoint)
        before = [p for p in checkpoints(checkpoint.parent) if step_of(p) < step_of(checkpoint)]
        # Later steps can only be those of a checkpoint that was found unsound.
        for old in checkpoints(checkpoint.parent):
            if old not in (checkpoint, *before[-1:]):
                shutil.rmtree(old, ignore_errors=True)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The weights under the names they have in memory, for exact resuming."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super().save_model(output_dir, _internal_call)
            return
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            save_model(self.model, str(folder / STATE))

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        state = Path(resume_from_checkpoint) / STATE
        if state.exists():
            load_model(self.model, str(state))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)


def checkpoints(folder: Path) -> list[Path]:
    """A stage's checkpoints, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name[11:].isdigit()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The optimizer step that a checkpoint was written at."""
    return int(checkpoint.name[11:])


def last_checkpoint(folder: Path, say: Callable[[str], None] = lambda line: None) -> Path | None:
    """The newest sound checkpoint of a stage; `say` is told of newer ones that are not."""
    for checkpoint in reversed(checkpoints(folder)):
        problem = unsound(checkpoint) or _incomplete(checkpoint)
        if problem is None:
            return checkpoint
        say(f"{problem}: {checkpoint.name} is not used, but the state before it.")
    return None


def _incomplete(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint at first sight, for those that have no digests."""
    sharded = any(checkpoint.glob("pytorch_model_fsdp*"))
    own = () if sharded else (STATE, "optimizer.pt")
    for name in ("trainer_state.json", "scheduler.pt", *own):
        if not (checkpoint / name).is_file():
            return f"{checkpoint / name} is missing"
    try:
        read_json(checkpoint / "trainer_state.json")
    except ValueError:
        return f"{checkpoint / 'trainer_state.json'} is damaged"
    for path in sorted(checkpoint.glob("*.pt*")):  # torch's files are zip archives with checksums
        try:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip() is not None
        except (zipfile.BadZipFile, OSError, EOFError, ValueError):
            damaged = True
        if damaged:
            return f"{path} is damaged"
    return None
