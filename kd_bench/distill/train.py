"""The training story: check everything -> stage by stage -> one finished checkpoint.

    <output>/recipe.yaml        the recipe as it was resolved
    <output>/lineage.json       data, teacher and student digests, code version, seed, status
    <output>/train_log.jsonl    loss, every term, learning rate, speed and knees, a line a log step
    <output>/stages/01-name/    the stage's model once it is done; before, what resuming needs
    <output>/final/             the student; exists only when it is complete

The same command continues a stopped training and leaves a finished one alone.
"""

import contextlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from kd_bench import provenance
from kd_bench.distill import checkpoints, models, processes
from kd_bench.distill.build import build_start, merge_lora
from kd_bench.distill.chat import use_template
from kd_bench.distill.conversations import data_digest
from kd_bench.distill.distiller import Distiller
from kd_bench.distill.encoding import BatchOrder
from kd_bench.distill.plan import choose_checkpointing
from kd_bench.distill.recipe import NEW, Recipe, Stage, needs_teacher, recipe_yaml
from kd_bench.distill.stage import (
    Resources,
    build_distiller,
    micro_batch,
    step_count,
    teacher_dtype,
)
from kd_bench.distill.teacher_states import TeacherStates, open_cache, states_of_stage
from kd_bench.distill.trainer import (
    DistillationTrainer,
    ProgressReport,
    last_checkpoint,
    spent,
    step_of,
    trainer_arguments,
)
from kd_bench.distill.vision_language import VisionLanguageModel
from kd_bench.errors import KdBenchError, TrainingError, UsageError, explained
from kd_bench.files import atomic_folder, digest_text, write_json, write_text

TOGETHER = "Do config.json, processor and weights of each checkpoint belong together?"
SMALL_DATA = 50_000  # conversations that are encoded before the first step and kept in memory


@dataclass(kw_only=True)
class TrainingState(Resources):
    """One training on its way from stage to stage.

    Attributes:
        done: names of the stages that are.
        checkpointing: of each stage, whether student and teacher recompute their activations.
    """

    console: Console
    lineage: dict[str, Any]
    is_main: bool
    verify_data: bool = False
    done: list[str] = field(default_factory=list)
    checkpointing: dict[str, tuple[bool, bool]] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where everything of this training is written."""
        return self.recipe.output_folder

    @property
    def log(self) -> Path:
        """`train_log.jsonl`."""
        return self.folder / "train_log.jsonl"

    def note(self, **changes: Any) -> None:
        """Update lineage.json."""
        self.lineage.update(changes)
        if self.is_main:
            write_json(self.folder / "lineage.json", self.lineage)

    def say(self, text: str) -> None:
        """Print a line, on the main process alone."""
        if self.is_main:
            self.console.print(text, highlight=False, soft_wrap=True)

    def data_digest(self, stage: Stage, version: int) -> dict[str, Any]:
        """That of everything the stage may learn from, in an earlier version where asked for."""
        return data_digest(self.conversations(stage)[0], verify=self.verify_data, version=version)


def train(
    recipe: Recipe,
    *,
    resume: bool = True,
    verify_data: bool = False,
    console: Console | None = None,
) -> Path:
    """Run a recipe and return the folder of the finished student.

    Args:
        resume: continue a stopped training; False starts over and deletes what was there.
        verify_data: read every image again for the data's digest, whose files look unchanged.

    Raises:
        UsageError: recipe, checkpoints or data do not fit; nothing was trained.
        TrainingError: training stopped; the last checkpoint is kept.
    """
    models.quiet()
    processes.begin_sharding()
    folder = recipe.output_folder
    final = folder / "final"
    is_main = processes.rank() == 0
    if is_main:
        checkpoints.claim(folder)
    with checkpoints.training_lock(folder) if is_main else contextlib.nullcontext():
        if not resume and is_main:
            shutil.rmtree(folder, ignore_errors=True)
            checkpoints.claim(folder)
        processes.barrier()
        run = TrainingState(
            recipe=recipe,
            console=console or Console(),
            lineage=new_lineage(recipe),
            is_main=is_main,
            verify_data=verify_data,
        )
        if checkpoints.is_done(recipe, folder, run.data_digest, run.say):
            run.say(f"Already trained: {final}")
            return final
        _keep_lineage(run)
        processes.barrier()
        if is_main:
            write_text(folder / "recipe.yaml", recipe_yaml(recipe))
        run.note(status="running")
        try:
            student = _run_stages(run)
            finished = datetime.now(UTC).isoformat(timespec="seconds")
            run.note(status="complete", finished=finished)
            if is_main:
                _save_final(run, student)
            processes.barrier()
        except KeyboardInterrupt:
            run.note(status="interrupted")
            raise
        except KdBenchError as error:
            run.note(status="stopped", problem=error.problem)
            raise
    run.say(f"Trained: {final}")
    return final


def _keep_lineage(run: TrainingState) -> None:
    """What lineage.json says of models and stages that have begun, a resumed training keeps."""
    if begun := checkpoints.begun_stages(run.recipe, run.folder):
        told = checkpoints.read_lineage(run.folder)
        kept = told.get("stages", {})
        names = (run.recipe.stages[index].name for index in begun)
        run.lineage["stages"] = {name: kept[name] for name in names if name in kept}
        run.lineage |= {key: told.get(key) for key in ("student", "teacher")}


def _save_final(run: TrainingState, student: Any) -> None:
    """The last stage's model again, with where it came from beside it."""
    student.eval()
    models.restore_dtypes(student, _start(run), run.recipe.final_dtype)
    notes = (run.folder / "lineage.json", run.folder / "recipe.yaml")
    checkpoints.save_whole(student, run.processor, run.folder / "final", notes)


# What may differ between training seeds of one recipe.
SEEDLESS = {"name": "", "seed": 0, "output": None, "report_to": [], "teacher_cache": None}


def new_lineage(recipe: Recipe) -> dict[str, Any]:
    """What lineage.json says of a training that begins.

    Its `role` is the model's among others: distilled (`kd`), or trained without the teacher that
    is there (`sft`).
    """
    distilled = any(needs_teacher(stage.objective) for stage in recipe.stages)
    return {
        "status": "running",
        "recipe": recipe.name,
        "recipe_digest": digest_text(recipe_yaml(recipe)),
        "seedless_digest": digest_text(recipe_yaml(recipe.model_copy(update=SEEDLESS))),
        "method": recipe.method,
        "role": "kd" if distilled else "sft" if recipe.teacher else "model",
        "seed": recipe.seed,
        "teacher": None,
        "student": None,
        "stages": {},
        "provenance": provenance.collect(seed=recipe.seed),
    }


def _run_stages(run: TrainingState) -> Any:
    """Train the stages that are not done yet; returns the student."""
    recipe = run.recipe
    count = processes.broadcast(
        checkpoints.done_stages(recipe, run.folder, run.say) if run.is_main else 0
    )
    folders = [checkpoints.stage_folder(run.folder, *each) for each in enumerate(recipe.stages)]
    left = list(zip(recipe.stages, folders, strict=True))[count:]
    stages = [stage for stage, _ in left]
    run.check_settings(stages)
    run.checkpointing = choose_checkpointing(run, stages, run.say)
    start = _start(run)
    run.processor = models.load_processor(start, trust_remote_code=recipe.trust_remote_code)
    use_template(run.processor, recipe.prompt_template, recipe.chat_template_kwargs)
    _load_teacher(run)
    run.note(
        student={"path": str(recipe.student), "weights_sha256": checkpoints.weights_digest(start)}
    )
    run.done = [stage.name for stage in recipe.stages[:count]]
    if count:
        start = folders[count - 1] / "model"
    new = recipe.new_projector and not count
    student = models.load_model(
        start, **recipe.allowed, projector_seed=recipe.seed if new else None
    )
    if not all(weight.is_floating_point() for weight in student.parameters()):
        raise UsageError(  # integers that no gradient reaches
            f"The student {recipe.student} is quantized, and its weights cannot learn.",
            "Train the float checkpoint, then evaluate it with --quantize.",
        )
    models.check_image_token(start, student, run.processor)
    with explained("Student and teacher cannot be trained together", TOGETHER):
        for stage in stages:
            run.check_models(stage, student)
    for stage, folder in left:
        student = _run_stage(run, stage, folder, student)
        run.done.append(stage.name)
    return student


def _start(run: TrainingState) -> Path:
    """The checkpoint that the first stage starts from, built where the recipe asks for that."""
    recipe = run.recipe
    if isinstance(recipe.student, str) and not recipe.student.startswith(NEW):
        return checkpoints.locate(recipe.student, **recipe.allowed)
    start = run.folder / "init"
    if run.is_main and not start.exists():
        with atomic_folder(start) as aside:
            build_start(recipe.student, aside, recipe.seed)
    processes.barrier()
    return start


def _load_teacher(run: TrainingState) -> None:
    recipe = run.recipe
    if recipe.teacher is None or not any(needs_teacher(s.objective) for s in recipe.stages):
        return
    path = checkpoints.locate(recipe.teacher, **recipe.allowed)
    run.teacher = models.load_model(path, dtype=teacher_dtype(recipe), **recipe.allowed)
    run.teacher_processor = models.load_processor(path, trust_remote_code=recipe.trust_remote_code)
    models.check_image_token(path, run.teacher, run.teacher_processor)
    if recipe.teacher_sharding is not None:
        processes.shard_layers(VisionLanguageModel(run.teacher).layers)
    run.note(teacher={"path": recipe.teacher, "weights_sha256": checkpoints.weights_digest(path)})


def _run_stage(run: TrainingState, stage: Stage, folder: Path, student: Any) -> Any:
    """Train one stage from its last checkpoint and save its model; returns the student."""
    teacher = run.teacher if needs_teacher(stage.objective) else None
    vocabulary = run.check_models(stage, student)
    dataset = run.dataset(stage, student)
    if len(dataset) <= SMALL_DATA:
        dataset.prepare()
    seed = run.recipe.seed + 1000 * len(run.done)
    size = micro_batch(stage)
    order = BatchOrder(dataset, stage.batch_size, size, seed, stage.group_by_length)
    cache, root = None, run.recipe.teacher_cache
    if teacher is not None and root is not None:
        cache = open_cache(Path(root), teacher, run.lineage["teacher"]["weights_sha256"], dataset)
    torch.manual_seed(seed)  # adapters start from it
    distiller = build_distiller(
        stage,
        student,
        teacher,
        checkpointing=run.checkpointing[stage.name],
        vocabulary=vocabulary,
        cache=cache,
    )
    student = distiller.student
    trainer = _trainer(run, stage, folder, distiller, order, seed)
    checkpoint = processes.broadcast(last_checkpoint(folder, run.say) if run.is_main else None)
    with explained("The first batch does not go through student and teacher", TOGETHER):
        with_image = trainer.image_batch()
        if with_image is not None:
            distiller.freeze_unreached(with_image)
        _announce(run, stage, trainer, checkpoint)
        distiller.teacher_states = _teacher_states(run, stage, trainer)
    with contextlib.closing(trainer.report):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        trainer.check_finite()
    run.lineage["stages"][stage.name] |= spent(run.log, stage.name)
    run.note()
    if trainer.is_fsdp_enabled:
        processes.gather_weights(student)
    student = merge_lora(student)
    _tell_where_to_stop(student, dataset.encoder.chat.stop_ids)
    if run.is_main:
        checkpoints.save_whole(student, run.processor, folder / "model")
        for leftover in folder.glob("checkpoint-*"):
            shutil.rmtree(leftover, ignore_errors=True)
    processes.barrier()
    return (
        models.load_model(folder / "model", **run.recipe.allowed)
        if trainer.is_fsdp_enabled
        else student
    )


def _tell_where_to_stop(student: Any, stop_ids: list[int]) -> None:
    """Add what the student learnt to end its answers with to what `generate` stops at."""
    settings = student.generation_config
    known = settings.eos_token_id
    ids = [] if known is None else list(known) if isinstance(known, list | tuple) else [known]
    if not set(stop_ids) <= set(ids):
        settings.eos_token_id = [*ids, *stop_ids]


def _teacher_states(
    run: TrainingState, stage: Stage, trainer: DistillationTrainer
) -> TeacherStates | None:
    """The teacher's states of all samples, where the stage may have them beforehand."""
    distiller = trainer.model
    if distiller.teacher is None or distiller.image_terms:
        return None
    if run.recipe.teacher_sharding is not None:  # a device that finds states would not run along
        return None
    with trainer.accelerator.autocast():
        return states_of_stage(
            distiller.teacher,
            run.lineage["teacher"]["weights_sha256"],
            trainer.dataset,
            trainer.data_collator,
            met=trainer.args.max_steps * stage.batch_size,
            precision=stage.precision,
            root=run.recipe.teacher_cache,
        )


def _trainer(
    run: TrainingState,
    stage: Stage,
    folder: Path,
    distiller: Distiller,
    order: BatchOrder,
    seed: int,
) -> DistillationTrainer:
    steps = step_count(stage, order.count)
    trainer = DistillationTrainer(
        distiller,
        trainer_arguments(run.recipe, stage, folder, steps, order.batch_size, seed),
        order,
        run.collator(order.dataset, distiller.student),
        stage=stage,
        report=ProgressReport(stage.name, run.console, run.log, stage.batch_size, run.done),
        lineage=run.folder / "lineage.json",
    )
    started, joined = processes.world_size(), trainer.accelerator.num_processes
    if joined != started:  # each would train on a part of every batch, alone
        raise UsageError(
            f"{started} processes were started, but {joined} take part in the training.",
            "Start them with `accelerate launch` or `torchrun`, one an accelerator.",
        )
    return trainer


def _announce(
    run: TrainingState, stage: Stage, trainer: DistillationTrainer, checkpoint: Path | None
) -> None:
    """Note in lineage and log what is about to happen, and say so."""
    reached = step_of(checkpoint) if checkpoint else 0
    dataset, distiller, steps = trainer.dataset, trainer.model, trainer.args.max_steps
    counts = models.parameter_counts(distiller.student)
    idle = stage.lora is not None and "language_model" not in stage.trainable
    run.lineage["stages"][stage.name] = {
        "method": stage.method_name,
        "steps": steps,
        "data": data_digest(dataset.conversations),
        "unreadable": dataset.unreadable,
        "parameters": counts,
        "checks": distiller.step_zero(trainer.first_batch()),
    }
    if dataset.left_out:
        run.lineage["stages"][stage.name]["answers_left_out"] = dataset.left_out
    run.note()
    run.say(
        f"{stage.name}: {stage.method_name}, {steps} steps of {stage.batch_size} out of "
        f"{len(dataset)} samples, {counts['trainable']:,} of {counts['total']:,} weights learn"
        + (f"; {dataset.left_out:,} answers are context only" if dataset.left_out else "")
        + ("; no adapters, trainable does not name language_model" if idle else "")
        + (f"; resuming at step {reached}" if reached else "")
    )


def sweep(
    planned: Sequence[Recipe], *, verify_data: bool = False, console: Console | None = None
) -> list[Path]:
    """Train every recipe of a plan; returns the folders of the finished students.

    A training that stops does not cost the others.

    Raises:
        UsageError: before anything is trained.
        TrainingError: at the end, naming the trainings that stopped.
    """
    console = console or Console()
    if len(planned) == 1:
        return [train(planned[0], verify_data=verify_data, console=console)]
    finished: list[Path] = []
    stopped: list[str] = []
    for number, single in enumerate(planned, start=1):
        console.rule(f"{number}/{len(planned)}  {single.method}, seed {single.seed}", align="left")
        try:
            finished.append(train(single, verify_data=verify_data, console=console))
        except TrainingError as error:
            stopped.append(f"{single.method} with seed {single.seed}: {error.problem}")
            console.print(f"Stopped: {error}", highlight=False, soft_wrap=True)
    if stopped:
        raise TrainingError(
            f"{len(stopped)} of {len(planned)} trainings stopped: {' '.join(stopped)}",
            "Mend that and run the same command again: it continues.",
        )
    return finished
