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
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from kd_bench import provenance
from kd_bench.distill import processes
from kd_bench.distill.build import add_lora, build_start, lora_layers, merge_lora
from kd_bench.distill.chat import read_template, use_template
from kd_bench.distill.checkpoints import locate, weights_digest
from kd_bench.distill.conversations import Conversations, data_digest, read_conversations
from kd_bench.distill.distiller import Distiller
from kd_bench.distill.encoding import (
    BatchOrder,
    Collator,
    ConversationDataset,
    Encoder,
    PairEncoder,
)
from kd_bench.distill.models import (
    check_image_token,
    checkpoint_activations,
    load_model,
    load_processor,
    parameter_counts,
    quiet,
    restore_dtypes,
    set_trainable,
)
from kd_bench.distill.outputs import (
    claim,
    done_stages,
    is_done,
    only_one,
    read_lineage,
    save_whole,
    stage_folder,
)
from kd_bench.distill.recipe import NEW, DataSource, Recipe, Stage, needs_teacher, recipe_yaml
from kd_bench.distill.sharding import begin_sharding, gather_weights
from kd_bench.distill.teacher_cache import TeacherCache, cache_folder
from kd_bench.distill.trainer import (
    DistillationTrainer,
    LogWriter,
    ProgressReport,
    check_loggers,
    checkpoints,
    cut_log,
    last_checkpoint,
    spent,
    trainer_arguments,
)
from kd_bench.distill.vision_language import check_pair, check_terms, image_difference
from kd_bench.errors import KdBenchError, UsageError, explained
from kd_bench.files import digest_text, write_json, write_text
from kd_bench.world.build import resolve

TOGETHER = "Do config.json, processor and weights of each checkpoint belong together?"
SMALL_DATA = 50_000  # conversations that are encoded before the first step and kept in memory


@dataclass
class Run:
    """What the stages of one training share."""

    recipe: Recipe
    folder: Path
    console: Console
    lineage: dict[str, Any]
    is_main: bool
    processor: Any = None
    teacher: Any = None
    teacher_processor: Any = None
    done: list[str] = field(default_factory=list)
    read: tuple[DataSource, tuple[Conversations, list[tuple[str, str]]]] | None = None

    def note(self, **changes: Any) -> None:
        """Update lineage.json."""
        self.lineage.update(changes)
        if self.is_main:
            write_json(self.folder / "lineage.json", self.lineage)

    def say(self, text: str) -> None:
        if self.is_main:
            self.console.print(text, highlight=False, soft_wrap=True)

    def conversations(self, stage: Stage) -> tuple[Conversations, list[tuple[str, str]]]:
        """The stage's conversations and what is malformed; the last file that was read is kept."""
        source = self.recipe.data_of(stage)
        if self.read is None or self.read[0] != source:
            self.read = None  # the file before is let go first
            self.read = (source, read_conversations(source))
        return self.read[1]


def train(recipe: Recipe, *, resume: bool = True, console: Console | None = None) -> Path:
    """Run a recipe and return the folder of the finished student.

    Args:
        resume: continue a stopped training; False starts over and deletes what was there.

    Raises:
        UsageError: recipe, checkpoints or data do not fit; nothing was trained.
        TrainingError: training stopped; the last checkpoint is kept.
    """
    quiet()
    begin_sharding()
    folder = recipe.output_folder
    final = folder / "final"
    console = console or Console()
    is_main = processes.rank() == 0
    if is_main:
        claim(folder)
    with only_one(folder) if is_main else contextlib.nullcontext():
        if not resume and is_main:
            shutil.rmtree(folder, ignore_errors=True)
            claim(folder)
        processes.barrier()
        run = Run(recipe, folder, console, _lineage(recipe), is_main)
        if is_done(recipe, folder, run.conversations, run.say):
            run.say(f"Already trained: {final}")
            return final
        run.lineage |= _lineage_before(folder, recipe)
        processes.barrier()
        if is_main:
            write_text(folder / "recipe.yaml", recipe_yaml(recipe))
        run.note(status="running")
        try:
            student = _run_stages(run)
            run.note(status="complete", finished=_now())
            if is_main:
                _save_final(run, student, final)
            processes.barrier()
        except KeyboardInterrupt:
            run.note(status="interrupted")
            raise
        except KdBenchError as error:
            run.note(status="stopped", problem=error.problem)
            raise
    run.say(f"Trained: {final}")
    return final


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


# What may differ between training seeds of one recipe.
SEEDLESS = {"name": "", "seed": 0, "output": None, "report_to": [], "teacher_cache": None}


def _lineage(recipe: Recipe) -> dict[str, Any]:
    return {
        "status": "running",
        "recipe": recipe.name,
        "recipe_digest": digest_text(recipe_yaml(recipe)),
        "seedless_digest": digest_text(recipe_yaml(recipe.model_copy(update=SEEDLESS))),
        "method": recipe.method,
        "role": _role(recipe),
        "seed": recipe.seed,
        "teacher": None,
        "student": None,
        "stages": {},
        "provenance": provenance.collect(seed=recipe.seed),
    }


def _lineage_before(folder: Path, recipe: Recipe) -> dict[str, Any]:
    """What lineage.json says of models and stages that have begun: a resumed training keeps it."""
    begun = [
        stage.name
        for index, stage in enumerate(recipe.stages)
        if ((own := stage_folder(folder, index, stage)) / "model").exists() or checkpoints(own)
    ]
    if not begun:
        return {}
    told = read_lineage(folder)
    stages = {name: told["stages"][name] for name in begun if name in told.get("stages", {})}
    return {"stages": stages, "student": told.get("student"), "teacher": told.get("teacher")}


def _role(recipe: Recipe) -> str:
    """What the model is among others: distilled, or trained without the teacher that is there."""
    if any(needs_teacher(stage.objective) for stage in recipe.stages):
        return "kd"
    return "sft" if recipe.teacher else "model"


def _save_final(run: Run, student: Any, final: Path) -> None:
    """The last stage's model again, with where it came from beside it."""
    student.eval()
    restore_dtypes(student, _start(run), run.recipe.final_dtype)
    save_whole(student, _Notes(run), final)


class _Notes:
    """Saves processor, lineage and recipe in one go, so that final/ appears with all of them."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def save_pretrained(self, folder: Path) -> None:
        self.run.processor.save_pretrained(folder)
        for name in ("lineage.json", "recipe.yaml"):
            shutil.copyfile(self.run.folder / name, folder / name)


def _run_stages(run: Run) -> Any:
    """Train the stages that are not done yet; returns the student."""
    recipe = run.recipe
    count = processes.broadcast(done_stages(recipe, run.folder, run.say) if run.is_main else 0)
    left = [
        (stage, stage_folder(run.folder, index, stage))
        for index, stage in enumerate(recipe.stages)
        if index >= count
    ]
    _check_settings(run, [stage for stage, _ in left])
    start = _start(run)
    run.processor = load_processor(start, trust_remote_code=recipe.trust_remote_code)
    if recipe.prompt_template is not None:
        use_template(run.processor, recipe.prompt_template)
    _load_teacher(run)
    run.note(student={"path": str(recipe.student), "weights_sha256": weights_digest(start)})
    run.done = [stage.name for stage in recipe.stages[:count]]
    if run.done:
        last = len(run.done) - 1
        start = stage_folder(run.folder, last, recipe.stages[last]) / "model"
    student = _load(recipe, start, recipe.seed if recipe.new_projector and not run.done else None)
    _check_weights_learn(recipe, student)
    check_image_token(start, student, run.processor)
    with explained("Student and teacher cannot be trained together", TOGETHER):
        for stage, _ in left:
            _check_models(run, stage, student)
    for stage, folder in left:
        student = _run_stage(run, stage, folder, student)
        run.done.append(stage.name)
    return student


def _check_settings(run: Run, stages: list[Stage]) -> None:
    """Everything that can be wrong without loading a model, of every stage, before the first step.

    Raises:
        UsageError: naming the stage and the setting.
    """
    check_loggers(run.recipe.report_to)
    if run.recipe.prompt_template is not None:
        read_template(run.recipe.prompt_template)
    for stage in reversed(stages):  # so that the first stage's data is the file that is kept
        check_terms(stage.objective, stage.trainable, stage.name)
        micro_batch(stage)
        images = run.recipe.data_of(stage).images
        if images is not None and not resolve(images).is_dir():
            raise UsageError(
                f"Stage {stage.name!r}: there is no folder of images at {images}.",
                f"Set {_data_key(stage)}.images= to the folder that image names are relative to.",
            )
        try:
            sound, _ = run.conversations(stage)
        except UsageError as error:
            setting = f"{_data_key(stage)}.path"
            raise UsageError(
                f"Stage {stage.name!r}: {error.problem}",
                f"Set {setting}=, or leave the stage out with {stage.name}=null."
                if len(run.recipe.stages) > 1
                else f"Set {setting}=.",
            ) from None
        if not sound:
            raise UsageError(
                f"Stage {stage.name!r}: none of its conversations can be used.", "Check data.path."
            )
        if len(sound) < stage.batch_size:
            raise UsageError(
                f"Stage {stage.name!r}: the data holds {len(sound)} usable samples, fewer than one "
                f"batch of {stage.batch_size}.",
                f"Lower {stage.name}.batch_size, or give more data.",
            )


def _data_key(stage: Stage) -> str:
    """The setting that names a stage's data: its own, or the recipe's."""
    return f"{stage.name}.data" if stage.data else "data"


def _check_models(run: Run, stage: Stage, student: Any) -> int | None:
    """Whether the models fit the stage; the rows that both vocabularies are cut to, or None."""
    if stage.lora is not None:
        lora_layers(student, stage.lora)
    if not needs_teacher(stage.objective):
        return None
    return check_pair(
        student,
        run.teacher,
        run.processor,
        run.teacher_processor,
        stage.objective,
        truncate_vocabulary=run.recipe.truncate_vocabulary,
    )


def _check_weights_learn(recipe: Recipe, student: Any) -> None:
    """Quantized weights are integers that no gradient reaches."""
    if not all(weight.is_floating_point() for weight in student.parameters()):
        raise UsageError(
            f"The student {recipe.student} is quantized, and its weights cannot learn.",
            "Train the float checkpoint, then evaluate it with --quantize.",
        )


def _start(run: Run) -> Path:
    """The checkpoint that the first stage starts from, built where the recipe asks for that."""
    recipe = run.recipe
    if isinstance(recipe.student, str) and not recipe.student.startswith(NEW):
        return _locate(recipe, recipe.student)
    start = run.folder / "init"
    if run.is_main and not start.exists():
        staging = run.folder / ".init.saving"
        shutil.rmtree(staging, ignore_errors=True)
        build_start(recipe.student, staging, recipe.seed)
        staging.rename(start)
    processes.barrier()
    return start


def _locate(recipe: Recipe, reference: str) -> Path:
    return locate(
        reference, allow_pickle=recipe.allow_pickle, trust_remote_code=recipe.trust_remote_code
    )


def _load(recipe: Recipe, path: Path, projector_seed: int | None = None) -> Any:
    return load_model(
        path,
        allow_pickle=recipe.allow_pickle,
        trust_remote_code=recipe.trust_remote_code,
        projector_seed=projector_seed,
    )


def _load_teacher(run: Run) -> None:
    recipe = run.recipe
    if recipe.teacher is None or not any(needs_teacher(s.objective) for s in recipe.stages):
        return
    mixed = any(stage.precision == "bfloat16" for stage in recipe.stages)
    path = _locate(recipe, recipe.teacher)
    run.teacher = load_model(
        path,
        dtype=torch.bfloat16 if mixed else torch.float32,
        allow_pickle=recipe.allow_pickle,
        trust_remote_code=recipe.trust_remote_code,
    )
    run.teacher_processor = load_processor(path, trust_remote_code=recipe.trust_remote_code)
    check_image_token(path, run.teacher, run.teacher_processor)
    run.note(teacher={"path": recipe.teacher, "weights_sha256": weights_digest(path)})


def _run_stage(run: Run, stage: Stage, folder: Path, student: Any) -> Any:
    """Train one stage from its last checkpoint and save its model; returns the student."""
    recipe = run.recipe
    teacher = run.teacher if needs_teacher(stage.objective) else None
    rows = _check_models(run, stage, student)
    dataset = _dataset(run, stage, student)
    order, seed = _order(run, stage, dataset)
    set_trainable(student, stage.trainable)
    torch.manual_seed(seed)  # adapters start from it
    if stage.lora is not None:
        student = add_lora(student, stage.lora)
    distiller = Distiller(
        student,
        teacher,
        stage.objective,
        vocabulary=rows,
        head_chunk=stage.head_chunk,
        cache=_cache(run, stage, teacher, dataset),
    )
    if stage.gradient_checkpointing:
        checkpoint_activations(student)
        if teacher is not None:
            checkpoint_activations(teacher, frozen=True)
    trainer = _trainer(run, stage, folder, distiller, order, seed)
    _check_processes(trainer)
    checkpoint = processes.broadcast(last_checkpoint(folder, run.say) if run.is_main else None)
    with explained("The first batch does not go through student and teacher", TOGETHER):
        pictured = trainer.pictured_batch()
        if pictured is not None:
            distiller.freeze_unreached(pictured)
        _announce(run, stage, trainer, checkpoint)
    with contextlib.closing(trainer.report):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        trainer.check_finite()
    run.lineage["stages"][stage.name] |= spent(run.folder / "train_log.jsonl", stage.name)
    run.note()
    if trainer.is_fsdp_enabled:
        gather_weights(student)
    student = merge_lora(student)
    _tell_where_to_stop(student, dataset.encoder.chat.stop_ids)
    if run.is_main:
        save_whole(student, run.processor, folder / "model")
        for leftover in folder.glob("checkpoint-*"):
            shutil.rmtree(leftover, ignore_errors=True)
    processes.barrier()
    return student if not trainer.is_fsdp_enabled else _load(recipe, folder / "model")


def _tell_where_to_stop(student: Any, stop_ids: list[int]) -> None:
    """Add what the student learnt to end its answers with to what `generate` stops at."""
    settings = student.generation_config
    known = settings.eos_token_id
    ids = [] if known is None else list(known) if isinstance(known, list | tuple) else [known]
    if not set(stop_ids) <= set(ids):
        settings.eos_token_id = [*ids, *stop_ids]


def _check_processes(trainer: DistillationTrainer) -> None:
    """Processes that do not know of each other would each train on a part of every batch."""
    started = processes.world_size()
    joined = trainer.accelerator.num_processes
    if joined != started:
        raise UsageError(
            f"{started} processes were started, but {joined} take part in the training.",
            "Start them with `accelerate launch` or `torchrun`, one an accelerator.",
        )


def _encoder(run: Run, stage: Stage, student: Any) -> Encoder:
    """Encodes for the student, and for the teacher where one batch cannot serve both."""
    max_pixels = run.recipe.data_of(stage).max_image_pixels
    if needs_teacher(stage.objective) and image_difference(
        student, run.teacher, run.processor, run.teacher_processor
    ):
        return PairEncoder(
            run.processor, run.teacher_processor, stage.max_length, max_pixels=max_pixels
        )
    return Encoder(run.processor, stage.max_length, max_pixels=max_pixels)


def _dataset(run: Run, stage: Stage, student: Any) -> ConversationDataset:
    """The stage's samples, all encoded in advance where they are few."""
    source = run.recipe.data_of(stage)
    conversations, broken = run.conversations(stage)
    dataset = ConversationDataset(
        conversations,
        _encoder(run, stage, student),
        unreadable=broken,
        unreadable_limit=source.unreadable_limit,
    )
    if len(conversations) <= SMALL_DATA:
        dataset.prepare()
    return dataset


def micro_batch(stage: Stage) -> int:
    """Samples that one process takes at a time.

    Raises:
        UsageError: the batch cannot be shared by the processes.
    """
    world = processes.world_size()
    shares = stage.gradient_accumulation * world
    if stage.batch_size % shares:
        raise UsageError(
            f"Stage {stage.name!r}: batch_size {stage.batch_size} cannot be shared by {world} "
            f"processes with gradient_accumulation {stage.gradient_accumulation}.",
            f"Use a multiple of {shares}.",
        )
    return stage.batch_size // shares


def _order(run: Run, stage: Stage, dataset: ConversationDataset) -> tuple[BatchOrder, int]:
    """The order of batches, and the stage's own seed."""
    seed = run.recipe.seed + 1000 * len(run.done)
    share = micro_batch(stage)
    return BatchOrder(dataset, stage.batch_size, share, seed, stage.group_by_length), seed


def _cache(
    run: Run, stage: Stage, teacher: Any, dataset: ConversationDataset
) -> TeacherCache | None:
    if run.recipe.teacher_cache is None or teacher is None:
        return None
    folder = cache_folder(
        Path(run.recipe.teacher_cache),
        teacher=run.lineage["teacher"]["weights_sha256"],
        data=data_digest(dataset.conversations)["sha256"],
        max_length=stage.max_length,
        template=dataset.encoder.chat.template,
        dtype=teacher.dtype,
        **_own_images(run, dataset),
    )
    width = teacher.get_input_embeddings().weight.shape[1]
    return TeacherCache(folder, width, teacher.dtype, processes.rank())


def _own_images(run: Run, dataset: ConversationDataset) -> dict[str, str]:
    """What else decides a teacher's states where it is given images of its own."""
    if not isinstance(dataset.encoder, PairEncoder):
        return {}
    return {"images": run.teacher_processor.image_processor.to_json_string()}


def _trainer(
    run: Run, stage: Stage, folder: Path, distiller: Distiller, order: BatchOrder, seed: int
) -> DistillationTrainer:
    tokenizer = run.processor.tokenizer
    (stop,) = order.dataset.encoder.chat.stop_ids
    pad = stop if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    steps = stage.steps or max(round((stage.epochs or 1) * order.steps), 1)
    report = ProgressReport(stage.name, run.console)
    log = LogWriter(run.folder / "train_log.jsonl", stage.name, stage.batch_size)
    return DistillationTrainer(
        distiller,
        trainer_arguments(run.recipe, stage, folder, steps, order.batch_size, seed),
        order,
        Collator(pad),
        stage=stage.name,
        vision_tower_learning_rate=stage.vision_tower_learning_rate,
        report=report,
        lineage=run.folder / "lineage.json",
        callbacks=[log],
    )


def _announce(
    run: Run, stage: Stage, trainer: DistillationTrainer, checkpoint: Path | None
) -> None:
    """Note in lineage and log what is about to happen, and say so."""
    reached = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    if run.is_main:
        cut_log(run.folder / "train_log.jsonl", run.done, stage.name, reached)
    dataset, distiller, steps = trainer.dataset, trainer.model, trainer.args.max_steps
    counts = parameter_counts(distiller.student)
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
