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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from kd_bench import provenance
from kd_bench.distill import checkpoints, models, processes
from kd_bench.distill.build import add_lora, build_start, lora_layers, merge_lora
from kd_bench.distill.chat import read_template, use_template
from kd_bench.distill.compatibility import check_pair, check_terms, image_difference
from kd_bench.distill.conversations import Conversations, Stream, data_digest, read_conversations
from kd_bench.distill.distiller import Distiller
from kd_bench.distill.encoding import (
    BatchOrder,
    Collator,
    ConversationDataset,
    Encoder,
    PairEncoder,
)
from kd_bench.distill.plan import (
    GB,
    UTILISATION,
    Card,
    Maker,
    Shapes,
    Sharding,
    StagePlan,
    choices,
    config_of,
    plan_memory,
    plan_time,
    student_of,
    this_device,
)
from kd_bench.distill.recipe import NEW, DataSource, Recipe, Stage, needs_teacher, recipe_yaml
from kd_bench.distill.teacher_states import (
    STATES_BUDGET,
    STATES_TOGETHER,
    TeacherCache,
    TeacherStates,
    cache_folder,
    compute_states,
    digest_samples,
    states_bytes,
)
from kd_bench.distill.trainer import (
    DistillationTrainer,
    ProgressReport,
    check_loggers,
    last_checkpoint,
    spent,
    trainer_arguments,
)
from kd_bench.distill.vision_language import VisionLanguageModel, has_images
from kd_bench.errors import KdBenchError, TrainingError, UsageError, explained
from kd_bench.files import atomic_folder, digest_text, write_json, write_text
from kd_bench.world.build import cache_folder as user_cache
from kd_bench.world.build import resolve

TOGETHER = "Do config.json, processor and weights of each checkpoint belong together?"
TYPICAL = 3  # micro-batches by which a plan counts operations
SAMPLED = 64  # conversations that a plan encodes at least
SMALL_DATA = 50_000  # conversations that are encoded before the first step and kept in memory


Data = tuple[Conversations | Stream, list[tuple[str, str]]]  # sound, and what is malformed


@dataclass
class TrainingState:
    """What the stages of one training share."""

    recipe: Recipe
    folder: Path
    console: Console
    lineage: dict[str, Any]
    is_main: bool
    verify_data: bool = False
    processor: Any = None
    teacher: Any = None
    teacher_processor: Any = None
    done: list[str] = field(default_factory=list)
    checkpointing: dict[str, tuple[bool, bool]] = field(default_factory=dict)
    read: tuple[list[DataSource], Data] | None = None

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

    def conversations(self, stage: Stage) -> Data:
        """The stage's conversations and what is malformed; the last file that was read is kept."""
        sources = self.recipe.data_of(stage)
        if self.read is None or self.read[0] != sources:
            self.read = None  # the file before is let go first
            self.read = (sources, read_conversations(*sources))
        return self.read[1]

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
        lineage = new_lineage(recipe)
        run = TrainingState(recipe, folder, console or Console(), lineage, is_main, verify_data)
        if checkpoints.is_done(recipe, folder, run.data_digest, run.say):
            run.say(f"Already trained: {final}")
            return final
        # What it says of models and stages that have begun, a resumed training keeps.
        if begun := checkpoints.begun_stages(recipe, folder):
            told = checkpoints.read_lineage(folder)
            kept = told.get("stages", {})
            names = (recipe.stages[index].name for index in begun)
            run.lineage["stages"] = {name: kept[name] for name in names if name in kept}
            run.lineage |= {key: told.get(key) for key in ("student", "teacher")}
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
    _check_settings(run, [stage for stage, _ in left])
    _check_memory(run, [stage for stage, _ in left])
    start = _start(run)
    run.processor = models.load_processor(start, trust_remote_code=recipe.trust_remote_code)
    if recipe.prompt_template is not None or recipe.chat_template_kwargs:
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
        for stage, _ in left:
            _check_models(run, stage, student)
    for stage, folder in left:
        student = _run_stage(run, stage, folder, student)
        run.done.append(stage.name)
    return student


def _check_settings(run: TrainingState, stages: list[Stage], devices: int | None = None) -> None:
    """Everything that can be wrong without loading a model, of every stage."""
    check_loggers(run.recipe.report_to)
    if run.recipe.prompt_template is not None:
        read_template(run.recipe.prompt_template)
    for stage in reversed(stages):  # so that the first stage's data is the file that is kept
        check_terms(stage.objective, stage.trainable, stage.name)
        micro_batch(stage, devices)
        data = f"{stage.name}.data" if stage.data else "data"  # the setting that names it
        for source in run.recipe.data_of(stage):
            if source.images is not None and not resolve(source.images).is_dir():
                raise UsageError(
                    f"Stage {stage.name!r}: there is no folder of images at {source.images}.",
                    f"Set {data}.images= to the folder that image names are relative to.",
                )
        try:
            sound, broken = run.conversations(stage)
        except UsageError as error:
            alone = len(run.recipe.stages) == 1
            other = "" if alone else f", or leave the stage out with {stage.name}=null"
            problem = f"Stage {stage.name!r}: {error.problem}"
            general = error.hint == "Check data.path."
            hint = f"Set {data}.path={other}." if general else error.hint
            raise UsageError(problem, hint) from None
        if isinstance(sound, Stream) and stage.group_by_length:
            raise UsageError(
                f"Stage {stage.name!r}: the lengths of streamed rows are not known before.",
                f"Set {stage.name}.group_by_length=false, or leave data.streaming out.",
            )
        if not sound:
            first = "".join(f" ({name}: {reason})" for name, reason in broken[:1])
            raise UsageError(
                f"Stage {stage.name!r}: none of its conversations can be used{first}.",
                "`kd-bench data show` lists why.",
            )
        if sound.epoch_size < stage.batch_size:
            raise UsageError(
                f"Stage {stage.name!r}: the data holds {sound.epoch_size} usable samples, fewer "
                f"than one batch of {stage.batch_size}.",
                f"Lower {stage.name}.batch_size, or give more data.",
            )


def _check_models(run: TrainingState, stage: Stage, student: Any) -> int | None:
    """Whether the models fit the stage; the size that both vocabularies are cut to, or None."""
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
    mixed = any(stage.precision == "bfloat16" for stage in recipe.stages)
    path = checkpoints.locate(recipe.teacher, **recipe.allowed)
    dtype = torch.bfloat16 if mixed else torch.float32
    run.teacher = models.load_model(path, dtype=dtype, **recipe.allowed)
    run.teacher_processor = models.load_processor(path, trust_remote_code=recipe.trust_remote_code)
    models.check_image_token(path, run.teacher, run.teacher_processor)
    if recipe.teacher_sharding is not None:
        processes.shard_layers(VisionLanguageModel(run.teacher).layers)
    run.note(teacher={"path": recipe.teacher, "weights_sha256": checkpoints.weights_digest(path)})


def _run_stage(run: TrainingState, stage: Stage, folder: Path, student: Any) -> Any:
    """Train one stage from its last checkpoint and save its model; returns the student."""
    teacher = run.teacher if needs_teacher(stage.objective) else None
    vocabulary = _check_models(run, stage, student)
    dataset = _dataset(run, stage, student)
    seed = run.recipe.seed + 1000 * len(run.done)
    size = micro_batch(stage)
    order = BatchOrder(dataset, stage.batch_size, size, seed, stage.group_by_length)
    torch.manual_seed(seed)  # adapters start from it
    distiller = _distiller(
        stage,
        student,
        teacher,
        checkpointing=run.checkpointing.get(stage.name, choices(stage)[0]),
        vocabulary=vocabulary,
        cache=_cache(run, stage, teacher, dataset, run.recipe.teacher_cache),
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


def _distiller(
    stage: Stage,
    student: Any,
    teacher: Any,
    *,
    checkpointing: tuple[bool, bool],
    vocabulary: int | None,
    cache: TeacherCache | None = None,
) -> Distiller:
    """Student and teacher with the stage's trainable set, adapters and objective.

    Args:
        checkpointing: whether student and teacher compute activations again.
    """
    models.set_trainable(student, stage.trainable)
    if stage.lora is not None:
        student = add_lora(student, stage.lora)
    distiller = Distiller(
        student,
        teacher,
        stage.objective,
        vocabulary=vocabulary,
        head_chunk=stage.head_chunk,
        cache=cache,
    )
    for model, recomputes in zip((student, teacher), checkpointing, strict=True):
        if recomputes:
            models.checkpoint_activations(model, frozen=model is teacher)
    return distiller


def _tell_where_to_stop(student: Any, stop_ids: list[int]) -> None:
    """Add what the student learnt to end its answers with to what `generate` stops at."""
    settings = student.generation_config
    known = settings.eos_token_id
    ids = [] if known is None else list(known) if isinstance(known, list | tuple) else [known]
    if not set(stop_ids) <= set(ids):
        settings.eos_token_id = [*ids, *stop_ids]


def _dataset(
    run: TrainingState, stage: Stage, student: Any, *, prepare: bool = True
) -> ConversationDataset:
    """The stage's samples, all encoded in advance where they are few.

    They are encoded for the teacher, too, where one batch cannot serve both.
    """
    sources = run.recipe.data_of(stage)
    options: dict[str, Any] = {"max_pixels": max(each.max_image_pixels for each in sources)}
    both = (run.processor, run.teacher_processor)
    if needs_teacher(stage.objective) and image_difference(student, run.teacher, *both):
        encoder: Encoder = PairEncoder(*both, stage.max_length, **options)
    else:
        encoder = Encoder(run.processor, stage.max_length, **options)
    conversations, broken = run.conversations(stage)
    limit = sum(each.unreadable_limit for each in sources)
    dataset = ConversationDataset(conversations, encoder, unreadable=broken, unreadable_limit=limit)
    if prepare and len(conversations) <= SMALL_DATA:
        dataset.prepare()
    return dataset


def micro_batch(stage: Stage, devices: int | None = None) -> int:
    """Samples that one process takes at a time.

    Args:
        devices: how many there are; by default as many as processes.

    Raises:
        UsageError: the batch cannot be shared by the processes.
    """
    world = devices or processes.world_size()
    shares = stage.gradient_accumulation * world
    if stage.batch_size % shares:
        raise UsageError(
            f"Stage {stage.name!r}: batch_size {stage.batch_size} cannot be shared by {world} "
            f"processes with gradient_accumulation {stage.gradient_accumulation}.",
            f"Use a multiple of {shares}.",
        )
    return stage.batch_size // shares


def _cache(
    run: TrainingState,
    stage: Stage,
    teacher: Any,
    dataset: ConversationDataset,
    root: str | Path | None,
    **own: Any,
) -> TeacherCache | None:
    if root is None or teacher is None:
        return None
    if isinstance(dataset.encoder, PairEncoder):  # images of its own decide its states, too
        own["images"] = run.teacher_processor.image_processor.to_json_string()
    folder = cache_folder(
        Path(root),
        teacher=run.lineage["teacher"]["weights_sha256"],
        data=data_digest(dataset.conversations)["sha256"],
        max_length=stage.max_length,
        template=dataset.encoder.chat.template,
        dtype=teacher.dtype,
        **own,
    )
    width = teacher.get_input_embeddings().weight.shape[1]
    return TeacherCache(folder, width, teacher.dtype, processes.rank())


def _teacher_states(
    run: TrainingState, stage: Stage, trainer: DistillationTrainer
) -> TeacherStates | None:
    """The teacher's states of all samples, where they are few and met more than once."""
    distiller, dataset, teacher = trainer.model, trainer.dataset, trainer.model.teacher
    samples = dataset.kept
    met = trainer.args.max_steps * stage.batch_size
    if teacher is None or distiller.image_terms or not samples or met <= len(samples):
        return None
    if run.recipe.teacher_sharding is not None:  # a device that finds states would not run along
        return None
    width, dtype = teacher.hidden_size, teacher.whole.dtype
    if states_bytes(samples, width, dtype) > STATES_BUDGET:
        return None
    root = run.recipe.teacher_cache or user_cache() / "teacher-states"
    device = trainer.args.device.type
    own = {
        # All that the teacher is given, whatever it was made of, and how it reads that.
        "samples": digest_samples(samples),
        "config": teacher.whole.config.to_json_string(),
        # What rounding may depend on.
        "attention": teacher.whole.config._attn_implementation,
        "precision": stage.precision,
        "torch": torch.__version__,
        "device": device,
        "threads": torch.get_num_threads() if device == "cpu" else 0,
        "together": STATES_TOGETHER,
    }
    cache = None
    with contextlib.suppress(OSError):  # a folder that is full, or another user's
        cache = _cache(run, stage, teacher.whole, dataset, root, **own)
    with trainer.accelerator.autocast():
        return compute_states(teacher, samples, trainer.data_collator, cache)


def _trainer(
    run: TrainingState,
    stage: Stage,
    folder: Path,
    distiller: Distiller,
    order: BatchOrder,
    seed: int,
) -> DistillationTrainer:
    steps = _steps(stage, order.count)
    trainer = DistillationTrainer(
        distiller,
        trainer_arguments(run.recipe, stage, folder, steps, order.batch_size, seed),
        order,
        _collator(run, order.dataset, distiller.student),
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


def _collator(run: TrainingState, dataset: ConversationDataset, student: Any) -> Collator:
    pad_token_id = run.processor.tokenizer.pad_token_id
    (stop,) = dataset.encoder.chat.stop_ids
    ours, theirs = (VisionLanguageModel(each) for each in (student, run.teacher or student))
    images = (ours.image_token_id, theirs.image_token_id)
    return Collator(stop if pad_token_id is None else pad_token_id, images)


def _steps(stage: Stage, samples: int) -> int:
    """Optimizer steps, of so many samples an epoch."""
    return stage.steps or max(round((stage.epochs or 1) * (samples // stage.batch_size)), 1)


# The plan of a training


def plan_training(
    recipe: Recipe,
    *,
    card: Card | None = None,
    devices: int = 1,
    utilisation: float = UTILISATION,
) -> list[StagePlan]:
    """What each stage needs, before anything but configs, tokenizers and data is loaded.

    Args:
        card: on which it shall run; its memory gives way to the recipe's `device_memory`.
        devices: how many of them.
        utilisation: share of the card's peak that is reached.

    Raises:
        UsageError: recipe, configs or data do not fit.
    """
    models.quiet()
    run = TrainingState(recipe, recipe.output_folder, Console(), {}, is_main=False)
    _check_settings(run, recipe.stages, devices)
    plans = []
    for stage, needs in zip(recipe.stages, _needs(run, recipe.stages, card, devices), strict=True):
        plan, make, typical = needs
        mixed = stage.precision == "bfloat16"
        peak = None if card is None else card.bfloat16 if mixed else card.float32
        plans.append(
            plan_time(plan, make, typical, mixed=mixed, peak=peak, utilisation=utilisation)
        )
    return plans


def _check_memory(run: TrainingState, stages: list[Stage]) -> None:
    """Refuse what would not fit; choose what is computed again where the recipe leaves it open.

    Raises:
        UsageError: a stage needs more than the device has.
    """
    named, found = run.recipe.device_memory, this_device()
    if named == 0 or (named is None and found is None):
        return
    try:
        plans = [plan for plan, _, _ in _needs(run, stages, None, processes.world_size())]
    except KdBenchError:
        raise
    except Exception as error:  # an architecture of its own, say: no reason not to train it
        run.say(f"The memory that it needs is not known ({type(error).__name__}).")
        return
    for plan in plans:
        if not plan.fits:
            raise plan.refusal()
        recomputed = [name for name, on in plan.checkpointing.items() if on]
        run.checkpointing[plan.stage] = (
            plan.checkpointing["student"],
            plan.checkpointing["teacher"],
        )
        again = f"; activations of {' and '.join(recomputed)} computed again" if recomputed else ""
        run.say(
            f"{plan.stage}: about {plan.needed / GB:.1f} of {(plan.memory_limit or 0) / GB:.1f} GB"
            f" a device{again}"
        )


def _needs(
    run: TrainingState, stages: list[Stage], card: Card | None, devices: int
) -> Iterator[tuple[StagePlan, Maker, list[dict[str, Any]]]]:
    """Of each stage its memory, a maker of its distiller as shapes, and typical micro-batches."""
    recipe, shapes = run.recipe, Shapes()
    new_student, run.processor = student_of(recipe, shapes)
    student = new_student()
    if recipe.prompt_template is not None or recipe.chat_template_kwargs:
        use_template(run.processor, recipe.prompt_template, recipe.chat_template_kwargs)
    limit = this_device() if card is None else int(card.memory)
    if recipe.device_memory is not None:
        limit = int(recipe.device_memory * GB) or None
    mixed = any(stage.precision == "bfloat16" for stage in recipe.stages)
    dtype = torch.bfloat16 if mixed else torch.float32
    described, quantized = None, None
    if recipe.teacher is not None and any(needs_teacher(each.objective) for each in stages):
        described, folder = config_of(recipe.teacher, **recipe.allowed)
        trusted = recipe.trust_remote_code
        run.teacher_processor = models.load_processor(folder, trust_remote_code=trusted)
        if checkpoints.quantization_of(checkpoints.read_config(folder)):
            quantized = sum(file.stat().st_size for file in folder.glob("*.safetensors")) or None
    for stage in stages:
        taught = described is not None and needs_teacher(stage.objective)
        run.teacher = shapes.model(described, dtype) if taught else None
        vocabulary = _check_models(run, stage, student)
        dataset = _dataset(run, stage, student, prepare=False)
        size = micro_batch(stage, devices)
        longest, typical = _met(dataset, size, stage, _collator(run, dataset, student))

        def make(
            ours: bool,
            theirs: bool,
            stage: Stage = stage,
            taught: bool = taught,
            vocabulary: int | None = vocabulary,
            batch: dict[str, Any] = longest,
        ) -> Distiller:
            fresh = new_student()
            teacher = shapes.model(described, dtype) if taught else None
            with torch.random.fork_rng(devices=[]):
                distiller = _distiller(
                    stage, fresh, teacher, checkpointing=(ours, theirs), vocabulary=vocabulary
                )
            shapes.empty(distiller)
            if has_images(batch):
                distiller.freeze_unreached(batch)
            return distiller.train()

        sharding = Sharding(
            devices=devices,
            student=devices if processes.shards_student() else 1,
            teacher=devices if recipe.teacher_sharding else 1,
            teacher_bytes=quantized,
        )
        steps = _steps(stage, dataset.conversations.epoch_size)
        plan = plan_memory(stage, make, longest, steps=steps, sharding=sharding, limit=limit)
        yield plan, make, typical


def _met(
    dataset: ConversationDataset, size: int, stage: Stage, collator: Collator
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The longest micro-batch of the data; and typical ones, sorted by length.

    Of large data a sample is read, and of all rows those with the most characters.
    """
    count = len(dataset)
    spread = torch.linspace(0, count - 1, min(count, max(TYPICAL * size, SAMPLED))).long().tolist()
    if isinstance(dataset.conversations, Stream):  # only read forward
        spread, top = list(range(len(spread))), []
    else:
        characters, images = dataset.lengths(), dataset.conversations.images
        alike = size if stage.group_by_length else 1  # others meet the longest one at a time
        top = sorted(range(count), key=lambda i: (images[i] > 0, characters[i]))[-alike:]
    samples = {
        index: sample
        for index in dict.fromkeys([*top, *spread])
        if isinstance(sample := dataset[index], dict)
    }
    if not samples:
        raise UsageError(
            f"Stage {stage.name!r}: none of its conversations can be used.",
            "`kd-bench data show` lists why.",
        )
    drawn = [samples[index] for index in spread if index in samples] or list(samples.values())
    drawn = drawn * -(-size // len(drawn))
    if stage.group_by_length:
        drawn.sort(key=_length)
    groups = [drawn[start : start + size] for start in range(0, len(drawn) - size + 1, size)]
    groups.sort(key=lambda group: max(map(_length, group)))
    chosen = [groups[int((part + 0.5) * len(groups) / TYPICAL)] for part in range(TYPICAL)]
    first = sorted(samples.values(), key=_length)[-1]
    others = [samples[index] for index in top if index in samples and samples[index] is not first]
    longest = [first, *others, *reversed(groups[-1])][:size]
    return collator(longest), [collator(group) for group in chosen[: len(groups)]]


def _length(sample: Mapping[str, Any]) -> int:
    return len(sample["input_ids"])


def _announce(
    run: TrainingState, stage: Stage, trainer: DistillationTrainer, checkpoint: Path | None
) -> None:
    """Note in lineage and log what is about to happen, and say so."""
    reached = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
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
