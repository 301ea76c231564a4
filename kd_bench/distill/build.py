"""Put models together: a student from parts, a student with adapters."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from kd_bench.distill.checkpoints import locate, stored_dtype
from kd_bench.distill.models import load_model, load_part
from kd_bench.distill.recipe import NEW, LoraSettings, StudentParts
from kd_bench.distill.vision_language import VisionLanguageModel
from kd_bench.errors import MissingExtraError, UsageError, explained

TEMPLATES = Path(__file__).parent / "templates"
IMAGE_TOKEN = "<image>"


def tinyllava_template() -> str:
    """The prompt that TinyLLaVA's base models are trained on, as a chat template."""
    return (TEMPLATES / "tinyllava.jinja").read_text(encoding="utf-8").strip()


def build_student(parts: StudentParts, folder: Path, seed: int = 0) -> None:
    """Save a LLaVA made of a vision tower, a fresh projector and a language model.

    Raises:
        UsageError: a part cannot be loaded.
    """
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    tower, pictures = _vision(parts.vision_tower)
    language, tokenizer = _language(parts.language_model)
    image_token_id = add_image_token(tokenizer)
    if image_token_id >= language.config.vocab_size:
        language.resize_token_embeddings(len(tokenizer))
    has_class_token = _has_class_token(tower)
    side, patch = tower.config.image_size // tower.config.patch_size, tower.config.patch_size
    drops_first = parts.vision_feature_select_strategy == "default"
    tied = bool(language.config.tie_word_embeddings)
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=language.config,
        image_token_id=image_token_id,
        image_seq_length=side * side + int(has_class_token) - int(drops_first),
        projector_hidden_act=parts.projector_act,
        vision_feature_layer=parts.vision_feature_layer,
        vision_feature_select_strategy=parts.vision_feature_select_strategy,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(seed)
    student = LlavaForConditionalGeneration(config)  # the projector keeps what is drawn here
    student.model.vision_tower.load_state_dict(tower.state_dict())
    student.model.language_model.load_state_dict(language.get_decoder().state_dict())
    if not tied:
        student.lm_head.load_state_dict(language.get_output_embeddings().state_dict())
    student.generation_config.eos_token_id = tokenizer.eos_token_id
    student.generation_config.pad_token_id = tokenizer.pad_token_id
    student.to(_type_of(parts.language_model))
    student.model.vision_tower.to(_type_of(parts.vision_tower))
    student.save_pretrained(folder)
    make_processor(
        pictures,
        tokenizer,
        patch_size=patch,
        additional_tokens=int(has_class_token),
        strategy=parts.vision_feature_select_strategy,
        template=_template(parts.chat_template),
    ).save_pretrained(folder)


def build_start(student: StudentParts | str, folder: Path, seed: int = 0) -> None:
    """Save what a training starts from: a student of parts, or `embedded:new/<name>`.

    Raises:
        UsageError: a part cannot be loaded, or nothing of that name is embedded.
    """
    from kd_bench.distill import mini

    if isinstance(student, StudentParts):
        build_student(student, folder, seed)
        return
    name = student.removeprefix(NEW)
    if name not in mini.SIZES:
        raise UsageError(
            f"There is no {student}.", f"Known: {', '.join(NEW + known for known in mini.SIZES)}."
        )
    mini.build(name, folder, seed)


def add_image_token(tokenizer: Any) -> int:
    """The id of `<image>`, which is added where the tokenizer does not know it."""
    from transformers import AddedToken

    if IMAGE_TOKEN not in tokenizer.get_vocab():
        token = AddedToken(IMAGE_TOKEN, special=True, normalized=False)
        tokenizer.add_tokens([token], special_tokens=True)
    return int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))


def make_processor(
    pictures: Any,
    tokenizer: Any,
    *,
    patch_size: int,
    additional_tokens: int,
    strategy: str,
    template: str,
) -> Any:
    """A LlavaProcessor; the tokenizer must know `<image>`."""
    from transformers import LlavaProcessor

    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=patch_size,
        num_additional_image_tokens=additional_tokens,
        vision_feature_select_strategy=strategy,
        image_token=IMAGE_TOKEN,
        chat_template=template,
    )


def _template(path: str | None) -> str:
    if path is None:
        return tinyllava_template()
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}.", "Check student.chat_template.") from None


def _vision(path: str) -> tuple[Any, Any]:
    """A vision tower, alone or out of a two-tower or vision-language model; and its processor."""
    from transformers import AutoConfig, AutoImageProcessor, AutoModel

    where = locate(path)
    with explained(f"{path} could not be loaded as a vision tower", A_PART):
        config = AutoConfig.from_pretrained(str(where))
        pictures = AutoImageProcessor.from_pretrained(str(where))
        if hasattr(config, "text_config") and type(config).__name__ in _vision_language_configs():
            return VisionLanguageModel(load_model(where)).vision_tower, pictures
        inner = getattr(config, "vision_config", config)
        with torch.device("meta"):
            kind = type(AutoModel.from_config(inner))
    two_towers = inner is not config
    tower = load_part(kind, path, "vision tower", surplus=two_towers, config=inner)
    return tower, pictures


def _vision_language_configs() -> set[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    return {kind.__name__ for kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING}


def _language(path: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    language = load_part(AutoModelForCausalLM, path, "language model")
    with explained(f"{path} could not be loaded as a language model", A_PART):
        return language, AutoTokenizer.from_pretrained(str(locate(path)))


def _type_of(path: str) -> torch.dtype:
    """The float type that a part is stored in."""
    dtype: torch.dtype = getattr(torch, stored_dtype(locate(path)))
    return dtype


A_PART = "Give a folder written by save_pretrained, or a hub name."


def _has_class_token(tower: nn.Module) -> bool:
    return any(name.endswith("class_embedding") for name, _ in tower.named_parameters())


def add_lora(student: Any, settings: LoraSettings) -> Any:
    """Adapters on the language model's linear layers; everything else keeps its own setting.

    A language model that does not learn gets none: what a stage does not name does not train.

    Raises:
        MissingExtraError: peft is not installed.
        UsageError: no layer of those names.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise MissingExtraError("train", "train", "peft") from None

    learning = {name for name, p in student.named_parameters() if p.requires_grad}
    prefix, names = lora_layers(student, settings)
    if not any(name.startswith(prefix) for name in learning):
        return student
    wrapped = get_peft_model(
        student,
        LoraConfig(
            r=settings.r,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=names,
        ),
    )
    for name, parameter in wrapped.named_parameters():
        plain = name.removeprefix("base_model.model.")
        if plain in learning and not plain.startswith((prefix, "lm_head")):
            parameter.requires_grad_(True)
    return wrapped


def lora_layers(student: Any, settings: LoraSettings) -> tuple[str, list[str]]:
    """Where the language model stands in the student, and its layers that get adapters.

    Raises:
        UsageError: no layer of those names.
    """
    inside = VisionLanguageModel(student).language_model
    prefix = next(name for name, module in student.named_modules() if module is inside)
    names = [
        f"{prefix}.{name}"
        for name, module in inside.named_modules()
        if isinstance(module, nn.Linear) and _chosen(name, settings.target_modules)
    ]
    if not names:
        raise UsageError(
            f"No layer of the language model is called {settings.target_modules!r}.",
            "Set lora.target_modules to names such as [q_proj, v_proj], or to all-linear.",
        )
    return prefix, names


def _chosen(name: str, wanted: list[str] | str) -> bool:
    return wanted == "all-linear" or name.rpartition(".")[2] in wanted


def merge_lora(student: Any) -> Any:
    """The plain model with its adapters folded into the weights; others come back as they are."""
    return student.merge_and_unload() if hasattr(student, "merge_and_unload") else student
