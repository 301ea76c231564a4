"""The training story: check everything -> stage by stage -> one finished checkpoint.

    <output>/recipe.yaml        the recipe as it was resolved
    <output>/lineage.json       data, teacher and student digests, code version, seed, status
    <output>/train_log.jsonl    loss, every term, learning rate, speed and knees, a line a log step
    <output>/stages/01-name/    the stage's model once it is done; before, what resuming needs
    <output>/final/             the student; exists only when it is complete

The same command continues a stopped training and leaves a finished one alone.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from rich.console import Console
from torch import nn

from kd_bench import provenance
from kd_bench.distill.batches import BatchOrder, Collator, ConversationDataset, Encoder
from kd_bench.distill.compatibility import check_pair, check_terms
from kd_bench.distill.data import data_digest, read_conversations
from kd_bench.distill.distiller import Distiller
from kd_bench.distill.engine import DistillationTrainer, last_checkpoint, sync_folder
from kd_bench.distill.methods import needs_teacher
from kd_bench.distill.models import (
    load_model,
    load_processor,
    parameter_counts,
    set_trainable,
    weights_digest,
)
from kd_bench.distill.progress import LogWriter, ProgressReport, cut_log
from kd_bench.distill.recipe import Recipe, Stage, load_recipe, recipe_yaml
from kd_bench.errors import KdBenchError, TrainingError, UsageError
from kd_bench.files import digest_text, write_json, write_text
from kd_bench.world.embedded import resolve

__all__ = ["train"]

NEW = "embedded:new/"
SMALL_DATA = 50_000  # conversations that are encoded before the first step and kept in memory
# Settings that change how a training is watched, not what it computes.
WATCHING = ("output", "report_to")
WATCHING_STAGE = ("log_every", "save_every", "workers")


@dataclass
class Run:
    """What the stages of one training share."""

    recipe: Recipe
    folder: Path
    console: Console
    lineage: dict[str, Any]
    is_main: bool

    def note(self, **changes: Any) -> None:
        """Update lineage.json."""
        self.lineage.update(changes)
        if self.is_main:
            write_json(self.folder / "lineage.json", self.lineage)

    def say(self, text: str) -> None:
        if self.is_main:
            self.console.print(text, highlight=False, soft_wrap=True)


def train(recipe: Recipe, *, resume: bool = True, console: Console | None = None) -> Path:
    """Run a recipe and return the folder of the finished student.

    Args:
        resume: continue a stopped training; False starts over and deletes what was there.

    Raises:
        UsageError: recipe, checkpoints or data do not fit; nothing was trained.
        TrainingError: training stopped; the last checkpoint is kept.
    """
    folder = recipe.output_folder
    final = folder / "final"
    console = console or Console()
    is_main = int(os.environ.get("RANK", "0")) == 0
    with _only_one(folder, is_main):
        if not resume and is_main:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True)
        if _is_done(recipe, folder):
            if is_main:
                console.print(f"Already trained: {final}", highlight=False, soft_wrap=True)
            return final
        run = Run(recipe, folder, console, _lineage(recipe), is_main)
        if is_main:
            write_text(folder / "recipe.yaml", recipe_yaml(recipe))
        run.note(status="running")
        try:
            student = _run_stages(run)
            run.note(status="complete", finished=_now())
            _save_final(run, student, final)
        except KeyboardInterrupt:
            run.note(status="interrupted")
            raise
        except KdBenchError as error:
            run.note(status="stopped", problem=error.problem)
            raise
    return final


@contextlib.contextmanager
def _only_one(folder: Path, is_main: bool) -> Iterator[None]:
    """Keep a second process from writing into the same folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if not is_main:
        yield
        return
    lock = FileLock(str(folder) + ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UsageError(
            f"Another process is training in {folder}.", "Wait for it, or set output=."
        ) from None
    try:
        yield
    finally:
        lock.release()


def _is_done(recipe: Recipe, folder: Path) -> bool:
    """Whether the folder holds this very training, finished.

    Raises:
        UsageError: it holds a different one.
    """
    written = folder / "recipe.yaml"
    if not written.exists():
        return False
    before = load_recipe(written)
    if _identity(before) != _identity(recipe):
        raise UsageError(
            f"{folder} holds a training with another recipe ({_difference(before, recipe)}).",
            "Set output= to another folder, or delete that one.",
        )
    return (folder / "final" / "config.json").exists()


def _identity(recipe: Recipe) -> dict[str, Any]:
    """The recipe without what only changes how it is watched."""
    mapping = recipe.model_dump(mode="json", exclude=set(WATCHING))
    for stage in mapping["stages"]:
        for name in WATCHING_STAGE:
            stage.pop(name, None)
    return mapping


def _difference(before: Recipe, now: Recipe) -> str:
    old, new = _flat(_identity(before)), _flat(_identity(now))
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    first = changed[0]
    return f"{first}: {old.get(first)} there, {new.get(first)} now"


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    entries = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else None
    )
    if entries is None:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, entry in entries:
        flat.update(_flat(entry, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _lineage(recipe: Recipe) -> dict[str, Any]:
    return {
        "status": "running",
        "recipe": recipe.name,
        "recipe_digest": digest_text(recipe_yaml(recipe)),
        "method": recipe.method,
        "seed": recipe.seed,
        "teacher": None,
        "student": None,
        "stages": {},
        "provenance": provenance.collect(seed=recipe.seed),
    }


def _run_stages(run: Run) -> tuple[nn.Module, Any]:
    """Train the stages that are not done yet; returns the student and its processor."""
    recipe = run.recipe
    for stage in recipe.stages:
        check_terms(stage.objective, stage.trainable, stage.name)
    start = _start(recipe, run.folder)
    processor = load_processor(start, trust_remote_code=recipe.trust_remote_code)
    teacher, teacher_processor = _load_teacher(run)
    run.note(student={"path": str(recipe.student), "weights_sha256": weights_digest(start)})
    student: nn.Module | None = None
    done: list[str] = []
    for index, stage in enumerate(recipe.stages):
        folder = run.folder / "stages" / f"{index + 1:02d}-{stage.name}"
        if not (folder / "model").exists():
            if student is None:
                student = _load(recipe, start, stage)
            rows = None
            if teacher is not None:
                rows = check_pair(
                    student,
                    teacher,
                    processor,
                    teacher_processor,
                    stage.objective,
                    truncate_vocabulary=recipe.truncate_vocabulary,
                )
            _run_stage(run, stage, folder, student, teacher, processor, rows, done)
            _save_whole(student, processor, folder / "model", run.is_main)
            for leftover in folder.glob("checkpoint-*"):
                shutil.rmtree(leftover, ignore_errors=True)
        start = folder / "model"
        done.append(stage.name)
    return student or _load(recipe, start, recipe.stages[-1]), processor


def _start(recipe: Recipe, folder: Path) -> Path:
    """The checkpoint that the first stage starts from."""
    reference = str(recipe.student)
    if not reference.startswith(NEW):
        return resolve(reference)
    from kd_bench.distill import mini

    build = {"student": mini.build_student, "teacher": mini.build_teacher}
    name = reference.removeprefix(NEW)
    if name not in build:
        raise UsageError(
            f"There is no {reference}.", f"Known: {', '.join(NEW + n for n in build)}."
        )
    start = folder / "init"
    if not start.exists():
        staging = folder / ".init.saving"
        shutil.rmtree(staging, ignore_errors=True)
        build[name](staging, seed=recipe.seed)
        staging.rename(start)
    return start


def _load(recipe: Recipe, path: Path, stage: Stage) -> nn.Module:
    return load_model(
        path, allow_pickle=recipe.allow_pickle, trust_remote_code=recipe.trust_remote_code
    )


def _load_teacher(run: Run) -> tuple[nn.Module | None, Any]:
    recipe = run.recipe
    if recipe.teacher is None or not any(needs_teacher(s.objective) for s in recipe.stages):
        return None, None
    mixed = any(stage.precision == "bfloat16" for stage in recipe.stages)
    path = resolve(recipe.teacher)
    teacher = load_model(
        path,
        dtype=torch.bfloat16 if mixed else torch.float32,
        allow_pickle=recipe.allow_pickle,
        trust_remote_code=recipe.trust_remote_code,
    )
    run.note(teacher={"path": recipe.teacher, "weights_sha256": weights_digest(path)})
    return teacher, load_processor(path, trust_remote_code=recipe.trust_remote_code)


def _run_stage(
    run: Run,
    stage: Stage,
    folder: Path,
    student: nn.Module,
    teacher: nn.Module | None,
    processor: Any,
    vocabulary: int | None,
    done: list[str],
) -> None:
    """Train one stage in place, from its last checkpoint where there is one."""
    dataset = _dataset(run, stage, processor)
    set_trainable(student, stage.trainable)
    student.train()
    seed = run.recipe.seed + 1000 * len(done)
    torch.manual_seed(seed)  # an adapter between widths starts from it
    distiller = Distiller(
        student, teacher, stage.objective, vocabulary=vocabulary, head_chunk=stage.head_chunk
    )
    world = int(os.environ.get("WORLD_SIZE", "1"))
    pieces = stage.gradient_accumulation * world
    if stage.batch_size % pieces:
        raise UsageError(
            f"batch_size {stage.batch_size} cannot be shared by {world} processes with "
            f"gradient_accumulation {stage.gradient_accumulation}.",
            f"Use a multiple of {pieces}.",
        )
    order = BatchOrder(
        dataset, stage.batch_size, stage.batch_size // pieces, seed, stage.group_by_length
    )
    steps = stage.steps or max(round((stage.epochs or 1) * order.steps), 1)
    log = run.folder / "train_log.jsonl"
    report = ProgressReport(stage.name, run.console)
    tokenizer = processor.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    trainer = DistillationTrainer(
        distiller,
        _arguments(run, stage, folder, steps, order.batch_size, seed),
        dataset,
        order,
        Collator(pad),
        stage=stage.name,
        vision_tower_learning_rate=stage.vision_tower_learning_rate,
        callbacks=[LogWriter(log, stage.name, stage.batch_size), report],
    )
    checkpoint = last_checkpoint(folder)
    reached = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    if run.is_main:
        cut_log(log, done, stage.name, reached)
    counts = parameter_counts(student)
    run.lineage["stages"][stage.name] = {
        "method": stage.method_name,
        "steps": steps,
        "data": data_digest(dataset.conversations),
        "unreadable": dataset.unreadable,
        "parameters": counts,
    }
    run.note()
    run.say(
        f"{stage.name}: {stage.method_name}, {steps} steps of {stage.batch_size} out of "
        f"{len(dataset)} samples, {counts['trainable']:,} of {counts['total']:,} weights learn"
        + (f"; resuming at step {reached}" if reached else "")
    )
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        trainer.check_finite()
    finally:
        report.close()


def _dataset(run: Run, stage: Stage, processor: Any) -> ConversationDataset:
    source = run.recipe.data_of(stage)
    conversations, broken = read_conversations(source)
    dataset = ConversationDataset(
        conversations,
        Encoder(processor, stage.max_length),
        unreadable=broken,
        unreadable_limit=source.unreadable_limit,
    )
    if len(conversations) <= SMALL_DATA:
        dataset.prepare()
    return dataset


def _arguments(run: Run, stage: Stage, folder: Path, steps: int, piece: int, seed: int) -> Any:
    """The stage's settings in the Trainer's words."""
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=piece,
        gradient_accumulation_steps=stage.gradient_accumulation,
        max_steps=steps,
        learning_rate=stage.learning_rate,
        lr_scheduler_type=stage.schedule
        if stage.schedule != "constant"
        else "constant_with_warmup",
        warmup_steps=stage.warmup,
        weight_decay=stage.weight_decay,
        adam_beta1=stage.betas[0],
        adam_beta2=stage.betas[1],
        max_grad_norm=stage.max_grad_norm,
        bf16=stage.precision == "bfloat16",
        activation_checkpointing=False,
        logging_steps=stage.log_every,
        logging_nan_inf_filter=False,
        save_strategy="steps" if stage.save_every else "no",
        save_steps=stage.save_every or 500,
        report_to=list(run.recipe.report_to) or "none",
        seed=seed,
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_num_workers=stage.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=True,
        average_tokens_across_devices=True,
    )


def _save_whole(student: Any, processor: Any, folder: Path, is_main: bool) -> None:
    """Save a checkpoint so that its folder appears only when everything in it is on disk.

    Raises:
        TrainingError: it cannot be written; nothing that was there is touched.
    """
    if not is_main:
        return
    staging = folder.with_name(f".{folder.name}.saving")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        student.save_pretrained(staging)
        processor.save_pretrained(staging)
        sync_folder(staging)
    except OSError as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise TrainingError(
            f"The model could not be written to {folder}: {error.strerror or error}.",
            "Make room and run the same command again.",
        ) from error
    shutil.rmtree(folder, ignore_errors=True)
    staging.rename(folder)


def _save_final(run: Run, trained: tuple[Any, Any], final: Path) -> None:
    student, processor = trained
    student.eval()
    _save_whole(student, processor, final, run.is_main)
    if run.is_main:
        for name in ("lineage.json", "recipe.yaml"):
            shutil.copyfile(run.folder / name, final / name)
        run.say(f"Trained: {final}")
