"""TinyLLaVA checkpoints to transformers' LLaVA and back, weight by weight.

    vision_tower._vision_tower.*   <->  vision_tower.*
    connector._connector.0.*       <->  multi_modal_projector.linear_1.*
    connector._connector.2.*       <->  multi_modal_projector.linear_2.*
    language_model.*               <->  language_model.*

TinyLLaVA drops the first patch also where the tower has no class token (`"patch"`), which is
transformers' "default" strategy with one image token less.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from kd_bench.distill.build import (
    IMAGE_TOKEN,
    add_image_token,
    make_processor,
    tinyllava_template,
)
from kd_bench.errors import UsageError
from kd_bench.files import write_json

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


def to_tinyllava_key(key: str) -> str:
    """The TinyLLaVA name of a weight of transformers' LLaVA."""
    plain = key.removeprefix("model.")
    if plain.startswith("vision_tower.") and not plain.startswith("vision_tower.vision_model."):
        plain = "vision_tower.vision_model." + plain.removeprefix("vision_tower.")
    for theirs, ours in TINYLLAVA_TO_TRANSFORMERS:
        if plain.startswith(ours):
            return theirs + plain.removeprefix(ours)
    raise UsageError(f"The weight {key!r} has no place in TinyLLaVA.", "Is it a LLaVA checkpoint?")


def convert_tinyllava(source: str | Path, destination: str | Path) -> Path:
    """Write a TinyLLaVA checkpoint as a transformers LLaVA with its processor.

    Raises:
        UsageError: the source is no TinyLLaVA with an MLP connector, or the destination is taken.
    """
    source, destination = Path(source).expanduser(), Path(destination).expanduser()
    config = _read_config(source)
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
    staging = _staging(destination)
    _copy_weights(source, staging, from_tinyllava_key)
    tokenizer = _tokenizer(source, config)
    llava = _llava_config(config, connector.removeprefix("mlp2x_"), tokenizer)
    llava.save_pretrained(staging)
    _generation_config(tokenizer).save_pretrained(staging)
    make_processor(
        _pictures(config),
        tokenizer,
        patch_size=llava.vision_config.patch_size,
        additional_tokens=int(_has_class_token(config)),
        strategy=llava.vision_feature_select_strategy,
        template=tinyllava_template(),
    ).save_pretrained(staging)
    _check_whole(source, staging)
    staging.rename(destination)
    return destination


def _check_whole(source: Path, staging: Path) -> None:
    """Load what was converted: a tensor that the source lacks would be drawn at random later.

    Raises:
        UsageError: weights are missing, surplus, of another shape or not finite.
    """
    import torch

    from kd_bench.distill.checkpoints import stored_dtype
    from kd_bench.distill.models import load_model

    try:
        load_model(staging, dtype=getattr(torch, stored_dtype(staging)))
    except UsageError as error:
        shutil.rmtree(staging, ignore_errors=True)
        problem = error.problem.replace(str(staging), "what came of it")
        raise UsageError(
            f"{source} is no whole TinyLLaVA checkpoint: {problem}", "Download or save it again."
        ) from None


def to_tinyllava(source: str | Path, destination: str | Path) -> Path:
    """Write a transformers LLaVA as a TinyLLaVA checkpoint (weights, config, tokenizer).

    Raises:
        UsageError: the source is no LLaVA, or the destination is taken.
    """
    source, destination = Path(source).expanduser(), Path(destination).expanduser()
    config = _read_config(source)
    if config.get("model_type") != "llava":
        raise UsageError(
            f"{source} is a {config.get('model_type')!r} checkpoint, not a LLaVA one.",
            "Give the folder of a LlavaForConditionalGeneration.",
        )
    staging = _staging(destination)
    _copy_weights(source, staging, to_tinyllava_key)
    back = {ours: theirs for theirs, ours in STRATEGIES.items()}
    write_json(
        staging / "config.json",
        {
            "architectures": ["TinyLlavaForConditionalGeneration"],
            "model_type": "tinyllava",
            "connector_type": f"mlp2x_{config.get('projector_hidden_act', 'gelu')}",
            "image_aspect_ratio": "square",
            "ignore_index": -100,
            "image_token_index": -200,
            "hidden_size": config["text_config"]["hidden_size"],
            "vocab_size": config["text_config"]["vocab_size"],
            "vision_hidden_size": config["vision_config"]["hidden_size"],
            "vision_feature_layer": config["vision_feature_layer"],
            "vision_feature_select_strategy": back[config["vision_feature_select_strategy"]],
            "llm_model_name_or_path": config["text_config"].get("_name_or_path", ""),
            "vision_model_name_or_path": config["vision_config"].get("_name_or_path", ""),
            "tokenizer_padding_side": "right",
            "tokenizer_model_max_length": 2048,
            "text_config": config["text_config"],
            "vision_config": config["vision_config"],
        },
    )
    for file in source.glob("*token*"):
        shutil.copyfile(file, staging / file.name)
    staging.rename(destination)
    return destination


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"There is no checkpoint at {folder}.", "Check the path.") from None
    except ValueError:
        raise UsageError(f"{folder}/config.json is not valid JSON.", "Restore it.") from None
    if not isinstance(config, dict):
        raise UsageError(f"{folder}/config.json is not a mapping.", "Restore it.")
    return config


def _staging(destination: Path) -> Path:
    if destination.exists():
        raise UsageError(f"{destination} exists already.", "Choose another folder.")
    staging = destination.with_name(f".{destination.name}.saving")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    return staging


def _copy_weights(source: Path, destination: Path, rename: Any) -> None:
    """Rename all tensors into new shards; values are copied byte for byte."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    files = sorted(source.glob("*.safetensors"))
    if not files:
        raise UsageError(
            f"{source} holds no *.safetensors weights.",
            "Pickled weights can run code on loading: convert them to safetensors first.",
        )
    shards: list[dict[str, Any]] = [{}]
    size = 0
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - not a dict
                tensor = tensors.get_tensor(key)
                if size and size + tensor.nbytes > SHARD_BYTES:
                    shards.append({})
                    size = 0
                shards[-1][rename(key)] = tensor
                size += tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], destination / "model.safetensors", metadata={"format": "pt"})
        return
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, destination / name, metadata={"format": "pt"})
        index |= dict.fromkeys(shard, name)
    write_json(destination / "model.safetensors.index.json", {"metadata": {}, "weight_map": index})


def _has_class_token(config: dict[str, Any]) -> bool:
    return "clip" in str(config["vision_config"].get("model_type", ""))


def _llava_config(config: dict[str, Any], act: str, tokenizer: Any) -> Any:
    from transformers import LlavaConfig

    vision = {k: v for k, v in config["vision_config"].items() if not k.startswith("model_name")}
    strategy = STRATEGIES[config.get("vision_feature_select_strategy", "patch")]
    side = vision["image_size"] // vision["patch_size"]
    tokens = side * side + int(_has_class_token(config)) - int(strategy == "default")
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
        image_seq_length=tokens,
        projector_hidden_act=act,
        vision_feature_layer=config.get("vision_feature_layer", -2),
        vision_feature_select_strategy=strategy,
        tie_word_embeddings=bool(text.get("tie_word_embeddings", False)),
        dtype=config.get("torch_dtype", config.get("dtype", "float32")),
    )


def _tokenizer(source: Path, config: dict[str, Any]) -> Any:
    """The source's tokenizer with a token for pictures."""
    from transformers import AutoTokenizer

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
    add_image_token(tokenizer)
    return tokenizer


def _generation_config(tokenizer: Any) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )


def _pictures(config: dict[str, Any]) -> Any:
    """Pictures are squashed to a square, or padded to one first; bicubic, as TinyLLaVA does it."""
    from transformers import CLIPImageProcessor, LlavaImageProcessor, SiglipImageProcessor

    side = config["vision_config"]["image_size"]
    square = {"height": side, "width": side}
    is_clip = _has_class_token(config)
    if config.get("image_aspect_ratio", "pad") == "pad":
        colours: dict[str, Any] = {"size": {"shortest_edge": side}, "crop_size": square}
        if not is_clip:
            colours |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        return LlavaImageProcessor(do_pad=True, resample=3, **colours)
    if is_clip:
        return CLIPImageProcessor(size=square, do_center_crop=False, resample=3)
    return SiglipImageProcessor(size=square, resample=3)
