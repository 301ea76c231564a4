"""Make models: tiny ones for the embedded world, students of parts, students with adapters.

And, weight by weight, transformers' LLaVA out of a TinyLLaVA checkpoint:

    vision_tower._vision_tower.*   ->  vision_tower.*
    connector._connector.0.*       ->  multi_modal_projector.linear_1.*
    connector._connector.2.*       ->  multi_modal_projector.linear_2.*
    language_model.*               ->  language_model.*

TinyLLaVA drops the first patch also where the tower has no class token (`"patch"`), which is
transformers' "default" strategy with one image token less.
"""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AddedToken,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from kd_bench.distill.chat import read_template, shipped_template
from kd_bench.distill.checkpoints import locate, read_config, stored_dtype
from kd_bench.distill.models import load_model, load_part
from kd_bench.distill.recipe import NEW, LoraSettings, StudentParts
from kd_bench.distill.vision_language import VisionLanguageModel
from kd_bench.errors import MissingExtraError, UsageError, explained
from kd_bench.world import scenes
from kd_bench.world.benchmarks import FIXED_LINES

IMAGE_TOKEN = "<image>"


def build_start(student: StudentParts | str, folder: Path, seed: int = 0) -> None:
    """Save what a training starts from: a student of parts, or `embedded:new/<name>`.

    Raises:
        UsageError: a part cannot be loaded, or nothing of that name is embedded.
    """
    if isinstance(student, StudentParts):
        build_student(student, folder, seed)
        return
    processor = build_processor()
    build_model(size_of(student), processor, seed).save_pretrained(folder)
    processor.save_pretrained(folder)


def make_processor(
    images: Any,
    tokenizer: Any,
    *,
    patch_size: int,
    template: str,
    additional_tokens: int = 0,
    strategy: str = "full",
) -> Any:
    """A LlavaProcessor; the tokenizer must know `<image>`."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=patch_size,
        num_additional_image_tokens=additional_tokens,
        vision_feature_select_strategy=strategy,
        image_token=IMAGE_TOKEN,
        chat_template=template,
    )


def _add_image_token(tokenizer: Any) -> int:
    """The id of `<image>`, which is added where the tokenizer does not know it."""
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        token = AddedToken(IMAGE_TOKEN, special=True, normalized=False)
        tokenizer.add_tokens([token], special_tokens=True)
    return int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))


# Tiny models

# Teacher and student are of transformers' own classes (SigLIP vision, a Qwen2 language model):
# nothing of kd-bench is needed to load them again. They share the tokenizer, the vision width and
# the number of image tokens, as the visual switch demands; each has a vision tower of its own.
IMAGE_SIDE = 32
PATCH = 8  # 4 x 4 image tokens: a cell of the world is 2 x 2 of them, a digit lies in one
SPECIAL = ("<pad>", "</s>", "<unk>", IMAGE_TOKEN)
ROLES = ("USER:", "ASSISTANT:")


@dataclass(frozen=True)
class Size:
    """Widths and depths of a tiny model."""

    width: int  # of the language model
    layers: int
    heads: int
    vision_layers: int = 2
    vision_width: int = 64  # the same for teacher and student
    initializer_range: float = 0.1  # 0.02 does not learn to bind shapes to colours


SIZES = {
    "teacher": Size(width=128, layers=4, heads=4),
    "student": Size(width=96, layers=3, heads=3),
}
_LINES = [line.strip() for line in FIXED_LINES]
_CHINESE = {*scenes.CHINESE.values(), *scenes.CHINESE_PARTICLES}


def vocabulary() -> list[str]:
    """Every token in the order of its id: a fixed line or a word, wherever it stands, is one."""
    known = {*_LINES, *scenes.PLACES, *scenes.ENGLISH, *_CHINESE, *'0123456789ABCDE.,?:"'}
    return [*SPECIAL, *ROLES, *sorted(known)]


def build_tokenizer() -> Any:
    """Build the tokenizer of whole words: white space is dropped, an unknown word is `<unk>`.

    An option's mark ("A." at the beginning of a line) and the answer "A" are the same token: models
    of this size learn to answer with letters in hundreds of steps instead of thousands.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    words = [
        *map(re.escape, sorted(_LINES, key=len, reverse=True)),
        r"(?:top|bottom) (?:left|right)",
        *sorted(_CHINESE, key=lambda word: (-len(word), word)),  # the same file every time
        r"[A-Za-z]+|[0-9]|[^\sA-Za-z0-9]",
    ]
    ids = {word: number for number, word in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"(?<=\n[A-E])\."), behavior="removed"),
            pre_tokenizers.Split(Regex("|".join(words)), behavior="removed", invert=True),
        ]
    )
    # Words with spaces between them, punctuation without, the digits of a number joined.
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.WordPiece(prefix="##", cleanup=True),
            decoders.Fuse(),
            decoders.Replace(Regex(r"(?<=[0-9]) (?=[0-9])"), ""),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(role, normalized=False) for role in ROLES])
    return tokenizer


def build_processor(tokenizer: Any = None) -> Any:
    """Build the processor of both models; no tokenizer given: the world's own."""
    from transformers import PreTrainedTokenizerFast, SiglipImageProcessor

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer or build_tokenizer(),
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=512,
        extra_special_tokens={"image_token": IMAGE_TOKEN},
    )
    images = SiglipImageProcessor(size={"height": IMAGE_SIDE, "width": IMAGE_SIDE})
    return make_processor(images, fast, patch_size=PATCH, template=shipped_template("mini"))


def build_model(size: Size, processor: Any, seed: int) -> Any:
    """Build a randomly initialised model of a size for a processor's vocabulary."""
    from transformers import Qwen2Config, SiglipVisionConfig

    tokenizer = processor.tokenizer
    vision = SiglipVisionConfig(
        hidden_size=size.vision_width,
        intermediate_size=2 * size.vision_width,
        num_hidden_layers=size.vision_layers,
        num_attention_heads=4,
        image_size=IMAGE_SIDE,
        patch_size=PATCH,
        vision_use_head=False,
    )
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=size.width,
        intermediate_size=2 * size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=size.initializer_range,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=processor.image_token_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_seq_length=(IMAGE_SIDE // PATCH) ** 2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def size_of(student: str) -> Size:
    """Widths and depths of `embedded:new/<name>`.

    Raises:
        UsageError: nothing of that name is embedded.
    """
    name = student.removeprefix(NEW)
    if name not in SIZES:
        known = ", ".join(NEW + known for known in SIZES)
        raise UsageError(f"There is no {student}.", f"Known: {known}.")
    return SIZES[name]


# A student of parts

A_PART = "Give a folder written by save_pretrained, or a hub name."


def build_student(parts: StudentParts, folder: Path, seed: int = 0) -> None:
    """Save a LLaVA made of a vision tower, a fresh projector and a language model.

    Raises:
        UsageError: a part cannot be loaded.
    """
    config, processor = describe_student(parts)
    tower = _vision(parts.vision_tower)
    language = load_part(AutoModelForCausalLM, parts.language_model, "language model")
    if language.config.vocab_size < config.text_config.vocab_size:
        language.resize_token_embeddings(config.text_config.vocab_size)
    tokenizer = processor.tokenizer
    torch.manual_seed(seed)
    student = LlavaForConditionalGeneration(config)  # the projector keeps what is drawn here
    student.model.vision_tower.load_state_dict(tower.state_dict())
    student.model.language_model.load_state_dict(language.get_decoder().state_dict())
    if not config.tie_word_embeddings:
        student.lm_head.load_state_dict(language.get_output_embeddings().state_dict())
    student.generation_config.eos_token_id = tokenizer.eos_token_id
    student.generation_config.pad_token_id = tokenizer.pad_token_id
    student.to(getattr(torch, stored_dtype(locate(parts.language_model))))
    student.model.vision_tower.to(getattr(torch, stored_dtype(locate(parts.vision_tower))))
    student.save_pretrained(folder)
    processor.save_pretrained(folder)


def describe_student(parts: StudentParts) -> tuple[LlavaConfig, Any]:
    """Config and processor of a student of parts; no weights are read.

    Raises:
        UsageError: a part has no config, image processor or tokenizer.
    """
    tower = locate(parts.vision_tower, weights=False)
    vision, kind = _vision_config(tower, parts.vision_tower)
    where = locate(parts.language_model, weights=False)
    with explained(f"{parts.language_model} could not be loaded as a language model", A_PART):
        text = AutoConfig.from_pretrained(str(where))
        tokenizer = AutoTokenizer.from_pretrained(str(where))
    image_token_id = _add_image_token(tokenizer)
    if image_token_id >= text.vocab_size:
        text.vocab_size = len(tokenizer)
    with torch.device("meta"):
        names = [name for name, _ in kind(vision).named_parameters()]
    class_tokens = sum(name.endswith("class_embedding") for name in names)
    side, patch = vision.image_size // vision.patch_size, vision.patch_size
    strategy, template = parts.vision_feature_select_strategy, parts.chat_template
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=image_token_id,
        image_seq_length=side * side + class_tokens - int(strategy == "default"),
        projector_hidden_act=parts.projector_act,
        vision_feature_layer=parts.vision_feature_layer,
        vision_feature_select_strategy=strategy,
        tie_word_embeddings=bool(text.tie_word_embeddings),
    )
    with explained(f"{parts.vision_tower} could not be loaded as a vision tower", A_PART):
        images = AutoImageProcessor.from_pretrained(str(tower))
    processor = make_processor(
        images,
        tokenizer,
        patch_size=patch,
        additional_tokens=class_tokens,
        strategy=strategy,
        template=shipped_template("tinyllava") if template is None else read_template(template),
    )
    return config, processor


def _vision_config(folder: Path, path: str) -> tuple[Any, Any]:
    """A tower's config, its own or out of a whole model's; and the tower's class."""
    with explained(f"{path} could not be loaded as a vision tower", A_PART):
        config = AutoConfig.from_pretrained(str(folder))
        inner = getattr(config, "vision_config", config)
        with torch.device("meta"):
            return inner, type(AutoModel.from_config(inner))


def _vision(path: str) -> Any:
    """A vision tower, alone or out of a two-tower or vision-language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    where = locate(path)
    with explained(f"{path} could not be loaded as a vision tower", A_PART):
        config = AutoConfig.from_pretrained(str(where))
        whole = {kind.__name__ for kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING}
        if hasattr(config, "text_config") and type(config).__name__ in whole:
            return VisionLanguageModel(load_model(where)).vision_tower
    inner, kind = _vision_config(where, path)
    two_towers = hasattr(config, "vision_config")
    return load_part(kind, path, "vision tower", surplus=two_towers, config=inner)


# Adapters


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
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=names,
    )
    wrapped = get_peft_model(student, config)
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
    asked = settings.target_modules
    names = [
        f"{prefix}.{name}"
        for name, module in inside.named_modules()
        if isinstance(module, nn.Linear)
        and (asked == "all-linear" or name.rpartition(".")[2] in asked)
    ]
    if not names:
        raise UsageError(
            f"No layer of the language model is called {asked!r}.",
            "Set lora.target_modules to names such as [q_proj, v_proj], or to all-linear.",
        )
    return prefix, names


def merge_lora(student: Any) -> Any:
    """The plain model with its adapters folded into the weights; others come back as they are."""
    return student.merge_and_unload() if hasattr(student, "merge_and_unload") else student


# TinyLLaVA

TINYLLAVA_TO_TRANSFORMERS = (
    ("vision_tower._vision_tower.", "vision_tower."),
    ("connector._connector.0.", "multi_modal_projector.linear_1."),
    ("connector._connector.2.", "multi_modal_projector.linear_2."),
    ("language_model.", "language_model."),
)
STRATEGIES = {"patch": "default", "cls_patch": "full"}
SHARD_BYTES = 4 << 30


def from_tinyllava_key(key: str) -> str:
    """The transformers name of a TinyLLaVA weight.

    Raises:
        UsageError: a part that transformers' LLaVA does not have (a resampler, a second tower).
    """
    for theirs, ours in TINYLLAVA_TO_TRANSFORMERS:
        if key.startswith(theirs):
            return ours + key.removeprefix(theirs)
    raise UsageError(
        f"The weight {key!r} has no place in transformers' LLaVA.",
        "Only TinyLLaVA models with one vision tower and an MLP connector can be converted.",
    )


def convert_tinyllava(source: str | Path, destination: str | Path) -> Path:
    """Write a TinyLLaVA checkpoint as a transformers LLaVA with its processor.

    Raises:
        UsageError: the source is no TinyLLaVA with an MLP connector, or the destination is taken.
    """
    source, destination = Path(source).expanduser(), Path(destination).expanduser()
    if not (source / "config.json").exists():
        raise UsageError(f"There is no checkpoint at {source}.", "Check the path.")
    config = read_config(source)
    if config.get("model_type") != "tinyllava":
        raise UsageError(
            f"{source} is a {config.get('model_type')!r} checkpoint, not a TinyLLaVA one.",
            "Give the folder of a TinyLLaVA model.",
        )
    connector = str(config.get("connector_type", ""))
    if not connector.startswith("mlp2x"):
        raise UsageError(
            f"{source} has the connector {connector!r}.", "Only mlp2x_* connectors convert."
        )
    if destination.exists():
        raise UsageError(f"{destination} exists already.", "Choose another folder.")
    staging = destination.with_name(f".{destination.name}.saving")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    _rename_weights(source, staging)
    tokenizer = _tinyllava_tokenizer(source, config)
    llava = _llava_config(config, connector.removeprefix("mlp2x_"), tokenizer)
    llava.save_pretrained(staging)
    GenerationConfig(
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    ).save_pretrained(staging)
    make_processor(
        _tinyllava_images(config),
        tokenizer,
        patch_size=llava.vision_config.patch_size,
        additional_tokens=int(_is_clip(config)),
        strategy=llava.vision_feature_select_strategy,
        template=shipped_template("tinyllava"),
    ).save_pretrained(staging)
    try:  # a tensor that the source lacks would be drawn at random later
        load_model(staging, dtype=getattr(torch, stored_dtype(staging)))
    except UsageError as error:
        shutil.rmtree(staging, ignore_errors=True)
        problem = error.problem.replace(str(staging), "what came of it")
        raise UsageError(
            f"{source} is no whole TinyLLaVA checkpoint: {problem}", "Download or save it again."
        ) from None
    staging.rename(destination)
    return destination


def _rename_weights(source: Path, destination: Path) -> None:
    """Rename all tensors into new shards; values are copied byte for byte."""
    from huggingface_hub import save_torch_state_dict
    from safetensors.torch import load_file

    files = sorted(source.glob("*.safetensors"))
    if not files:
        raise UsageError(
            f"{source} holds no *.safetensors weights.",
            "Pickled weights can run code on loading: convert them to safetensors first.",
        )
    tensors = {from_tinyllava_key(k): each for file in files for k, each in load_file(file).items()}
    save_torch_state_dict(tensors, destination, max_shard_size=SHARD_BYTES)


def _is_clip(config: dict[str, Any]) -> bool:
    """Whether the tower has a class token."""
    return "clip" in str(config["vision_config"].get("model_type", ""))


def _llava_config(config: dict[str, Any], act: str, tokenizer: Any) -> Any:
    vision = {k: v for k, v in config["vision_config"].items() if not k.startswith("model_name")}
    strategy = STRATEGIES[config.get("vision_feature_select_strategy", "patch")]
    side = vision["image_size"] // vision["patch_size"]
    text = config["text_config"]
    image_token_id = int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
    if image_token_id >= text["vocab_size"]:
        raise UsageError(
            f"{IMAGE_TOKEN} would be token {image_token_id}, but the language model has "
            f"{text['vocab_size']} rows.",
            "Convert a model whose vocabulary has a spare row.",
        )
    vision.setdefault("vision_use_head", False)
    return LlavaConfig(
        architectures=["LlavaForConditionalGeneration"],
        vision_config=vision,
        text_config=text,
        image_token_id=image_token_id,
        image_seq_length=side * side + int(_is_clip(config)) - int(strategy == "default"),
        projector_hidden_act=act,
        vision_feature_layer=config.get("vision_feature_layer", -2),
        vision_feature_select_strategy=strategy,
        tie_word_embeddings=bool(text.get("tie_word_embeddings", False)),
        dtype=config.get("torch_dtype", config.get("dtype", "float32")),
    )


def _tinyllava_tokenizer(source: Path, config: dict[str, Any]) -> Any:
    """The source's tokenizer with a token for images."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, config=None, tokenizer_type=config["text_config"].get("model_type")
        )
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UsageError(
            f"{source} has no usable tokenizer: {reason[0]}",
            "Copy the language model's tokenizer files into that folder.",
        ) from error
    _add_image_token(tokenizer)
    return tokenizer


def _tinyllava_images(config: dict[str, Any]) -> Any:
    """Images are squashed to a square, or padded to one first; bicubic, as TinyLLaVA does it."""
    from transformers import CLIPImageProcessor, LlavaImageProcessor, SiglipImageProcessor

    side = config["vision_config"]["image_size"]
    square = {"height": side, "width": side}
    if config.get("image_aspect_ratio", "pad") == "pad":
        colours: dict[str, Any] = {"size": {"shortest_edge": side}, "crop_size": square}
        if not _is_clip(config):
            colours |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        return LlavaImageProcessor(do_pad=True, resample=3, **colours)
    if _is_clip(config):
        return CLIPImageProcessor(size=square, do_center_crop=False, resample=3)
    return SiglipImageProcessor(size=square, resample=3)
