"""What a stage of a recipe is made of: settings that hold, data, distiller.

A training builds its stages here, and so does their plan, on models without values.
"""

from dataclasses import dataclass
from typing import Any

import torch

from kd_bench.distill import models, processes
from kd_bench.distill.build import add_lora, lora_layers
from kd_bench.distill.chat import read_template
from kd_bench.distill.compatibility import check_pair, check_terms, image_difference
from kd_bench.distill.conversations import Conversations, Stream, read_conversations
from kd_bench.distill.distiller import Distiller
from kd_bench.distill.encoding import Collator, ConversationDataset, Encoder, PairEncoder
from kd_bench.distill.recipe import DataSource, Recipe, Stage, needs_teacher
from kd_bench.distill.teacher_states import TeacherCache
from kd_bench.distill.trainer import check_loggers
from kd_bench.distill.vision_language import VisionLanguageModel
from kd_bench.errors import UsageError
from kd_bench.world.build import resolve

Data = tuple[Conversations | Stream, list[tuple[str, str]]]  # sound, and what is malformed


@dataclass
class Resources:
    """What the stages of one recipe share.

    Attributes:
        processor: the student's.
        read: the sources that were read last, and what they hold.
    """

    recipe: Recipe
    processor: Any = None
    teacher: Any = None
    teacher_processor: Any = None
    read: tuple[list[DataSource], Data] | None = None

    def conversations(self, stage: Stage) -> Data:
        """The stage's conversations and what is malformed; the last file that was read is kept."""
        sources = self.recipe.data_of(stage)
        if self.read is None or self.read[0] != sources:
            self.read = None  # the file before is let go first
            self.read = (sources, read_conversations(*sources))
        return self.read[1]

    def dataset(self, stage: Stage, student: Any) -> ConversationDataset:
        """The stage's samples, for the teacher, too, where one batch cannot serve both."""
        sources = self.recipe.data_of(stage)
        options: dict[str, Any] = {"max_pixels": max(each.max_image_pixels for each in sources)}
        both = (self.processor, self.teacher_processor)
        if needs_teacher(stage.objective) and image_difference(student, self.teacher, *both):
            encoder: Encoder = PairEncoder(*both, stage.max_length, **options)
        else:
            encoder = Encoder(self.processor, stage.max_length, **options)
        conversations, broken = self.conversations(stage)
        limit = sum(each.unreadable_limit for each in sources)
        return ConversationDataset(
            conversations, encoder, unreadable=broken, unreadable_limit=limit
        )

    def collator(self, dataset: ConversationDataset, student: Any) -> Collator:
        """What makes batches of the dataset's samples for both models."""
        pad_token_id = self.processor.tokenizer.pad_token_id
        (stop,) = dataset.encoder.chat.stop_ids
        ours, theirs = (VisionLanguageModel(each) for each in (student, self.teacher or student))
        images = (ours.image_token_id, theirs.image_token_id)
        return Collator(stop if pad_token_id is None else pad_token_id, images)

    def check_settings(self, stages: list[Stage], devices: int | None = None) -> None:
        """Everything that can be wrong without loading a model, of every stage.

        Raises:
            UsageError: it is.
        """
        check_loggers(self.recipe.report_to)
        if self.recipe.prompt_template is not None:
            read_template(self.recipe.prompt_template)
        for stage in reversed(stages):  # so that the first stage's data is the file that is kept
            check_terms(stage.objective, stage.trainable, stage.name)
            micro_batch(stage, devices)
            self._check_data(stage)

    def _check_data(self, stage: Stage) -> None:
        data = f"{stage.name}.data" if stage.data else "data"  # the setting that names it
        for source in self.recipe.data_of(stage):
            if source.images is not None and not resolve(source.images).is_dir():
                raise UsageError(
                    f"Stage {stage.name!r}: there is no folder of images at {source.images}.",
                    f"Set {data}.images= to the folder that image names are relative to.",
                )
        try:
            sound, broken = self.conversations(stage)
        except UsageError as error:
            alone = len(self.recipe.stages) == 1
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
            raise nothing_usable(stage, broken)
        if sound.epoch_size < stage.batch_size:
            raise UsageError(
                f"Stage {stage.name!r}: the data holds {sound.epoch_size} usable samples, fewer "
                f"than one batch of {stage.batch_size}.",
                f"Lower {stage.name}.batch_size, or give more data.",
            )

    def check_models(self, stage: Stage, student: Any) -> int | None:
        """The size that both vocabularies are cut to in this stage, or None.

        Raises:
            UsageError: the models do not fit the stage.
        """
        if stage.lora is not None:
            lora_layers(student, stage.lora)
        if not needs_teacher(stage.objective):
            return None
        return check_pair(
            student,
            self.teacher,
            self.processor,
            self.teacher_processor,
            stage.objective,
            truncate_vocabulary=self.recipe.truncate_vocabulary,
        )


def nothing_usable(stage: Stage, broken: list[tuple[str, str]]) -> UsageError:
    """Why a stage whose conversations are all `broken`, name and reason, cannot be trained."""
    first = "".join(f" ({name}: {reason})" for name, reason in broken[:1])
    return UsageError(
        f"Stage {stage.name!r}: none of its conversations can be used{first}.",
        "`kd-bench data show` lists why.",
    )


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


def step_count(stage: Stage, samples: int) -> int:
    """Optimizer steps, of so many samples an epoch."""
    return stage.steps or max(round((stage.epochs or 1) * (samples // stage.batch_size)), 1)


def teacher_dtype(recipe: Recipe) -> torch.dtype:
    """The frozen teacher's float type: it is loaded once, for all stages."""
    return torch.bfloat16 if any(stage.mixed for stage in recipe.stages) else torch.float32


def build_distiller(
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
        vocabulary: of `Resources.check_models`.
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
