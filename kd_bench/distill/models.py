"""Load checkpoints whole, count their weights, and freeze what shall not learn."""

import contextlib
import json
import os
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kd_bench.distill import checkpoints
from kd_bench.distill.vision_language import VisionLanguageModel
from kd_bench.errors import MissingExtraError, UsageError, explained, one_line

PARTS: tuple[str, ...] = ("vision_tower", "projector", "language_model")
QUANTIZATIONS: tuple[str, ...] = ("nf4", "int8")
"""What a checkpoint can be rounded to while it is loaded, by bitsandbytes."""
SURPLUS = 50_000_000  # weights that a config may describe beyond the files', e.g. a new projector
TINY = 10_000_000  # parameters
NAMED = 5  # tensors that an error names


def preload() -> None:
    """Import and build, ahead, what loading a checkpoint of the embedded world comes to."""
    for name in (
        "llava.modeling_llava", "llava.processing_llava", "qwen2.modeling_qwen2",
        "siglip.modeling_siglip", "siglip.image_processing_siglip", "clip.configuration_clip",
        "llama.configuration_llama",
    ):  # fmt: skip
        import_module(f"transformers.models.{name}")
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    get_checkpoint_conversion_mapping("llava")


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    quantize: str = "",
    projector_seed: int | None = None,
    device_map: str | dict[str, Any] | None = None,
) -> Any:
    """A vision-language model of transformers with all of its weights, in evaluation mode.

    Args:
        path: folder written by `save_pretrained`, adapter folder of peft, or hub name.
        quantize: one of `QUANTIZATIONS`, applied to the language model's and tower's linear layers.
        device_map: accelerate's, in place of `device`: spreads the layers over what there is.
        projector_seed: draw a projector with it where the checkpoint has none; None refuses that.

    Raises:
        UsageError: no checkpoint there; only pickled weights or code of its own; weights that are
            missing, surplus, of another shape or not finite, with five of them named.
        MissingExtraError: a package is missing that adapters or quantized weights need.
    """
    from transformers import AutoModelForImageTextToText

    folder = checkpoints.locate(
        path, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code
    )
    base = checkpoints.base_of(folder)
    whole = base or folder
    checkpoints.check_files(whole, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    settings: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if not allow_pickle:
        settings["use_safetensors"] = True
    settings |= _quantized(path, whole, quantize, base is not None, dtype, device)
    if device_map is not None:
        if base is not None:
            raise UsageError(
                f"{path} is an adapter, and its weights are merged into its base on one device.",
                f"Drop --device-map, or first {checkpoints.MERGE}",
            )
        settings["device_map"] = device_map
    if not trust_remote_code and not checkpoints.quantization_of(checkpoints.read_config(whole)):
        _check_size(path, whole)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(projector_seed or 0)  # what is new is drawn while the rest is read
        model, told = _read(
            AutoModelForImageTextToText, path, whole, "vision-language model", **settings
        )
    _check_loaded(path, model, told, projector_seed is not None)
    _check_feature_layers(path, model)
    if base is not None:
        model = _with_adapter(model, folder, allow_pickle)
    _check_finite(path, model)
    _settle_arithmetic(model)
    model.eval()
    placed = device is None or "device_map" in settings
    return model if placed else model.to(device)


def _check_size(path: str | Path, folder: Path) -> None:
    """Refuse a config of a far larger model than the files hold, before memory is taken for it.

    A config without its `text_config` means transformers' default, a model of seven billion.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    held = checkpoints.stored_weights(folder)
    try:
        config = AutoConfig.from_pretrained(str(folder))
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
    except Exception:  # told by the loader, which meets the same
        return
    described = _count(model.parameters())
    if held and described > 1.5 * held and described - held > SURPLUS:
        lacks = [
            name
            for name in ("text_config", "vision_config")
            if name not in checkpoints.read_config(folder)
        ]
        raise UsageError(
            f"{path}: config.json describes a {type(model).__name__} of {described:,} weights, and "
            f"the files hold {held:,}.",
            f"Restore {' and '.join(lacks)} in config.json."
            if lacks
            else "Do config.json and weights belong together? Restore the one that is not its own.",
        )


def _check_feature_layers(path: str | Path, model: Any) -> None:
    """The layers whose output is projected must be layers of the vision tower."""
    layers = getattr(model.config, "vision_feature_layer", None)
    depth = getattr(getattr(model.config, "vision_config", None), "num_hidden_layers", None)
    if layers is None or not isinstance(depth, int):
        return
    for layer in layers if isinstance(layers, list | tuple) else [layers]:
        if not isinstance(layer, int) or not -depth - 1 <= layer <= depth:
            raise UsageError(
                f"{path}: vision_feature_layer is {layer!r}, and the vision tower has {depth} "
                "layers.",
                f"Set it in config.json to one from {-depth - 1} to {depth}.",
            )


def check_image_token(path: str | Path, model: Any, processor: Any) -> None:
    """The token that the model puts an image's features at must be the processor's for images.

    Raises:
        UsageError: they are two tokens, so that no image would arrive.
    """
    ours = getattr(model.config, "image_token_id", None)
    theirs = getattr(processor, "image_token_id", None)
    if theirs is None and isinstance(token := getattr(processor, "image_token", None), str):
        theirs = processor.tokenizer.convert_tokens_to_ids(token)
    if ours == getattr(processor.tokenizer, "image_token_id", None):  # Gemma 3 has two
        return
    if isinstance(ours, int) and isinstance(theirs, int) and ours != theirs:
        raise UsageError(
            f"{path}: image_token_id is {ours} in config.json, and the processor's image token is "
            f"{theirs}.",
            "Do config.json and processor belong together? Set image_token_id to the processor's.",
        )


def load_part(kind: Any, path: str, what: str, *, surplus: bool = False, **settings: Any) -> Any:
    """A vision tower or a language model with all of its weights, in float32.

    Args:
        kind: a class with `from_pretrained`.
        what: that errors call it.
        surplus: the checkpoint may hold more than this part.

    Raises:
        UsageError: it cannot be loaded, or weights are missing, surplus or not finite.
    """
    folder = checkpoints.locate(path)
    checkpoints.check_files(folder)
    model, told = _read(kind, path, folder, what, dtype=torch.float32, **settings)
    if surplus:
        told = {**told, "unexpected_keys": set()}
    _check_loaded(path, model, told, projector_may_be_new=False)
    _check_finite(path, model)
    return model


def _read(
    kind: Any, path: str | Path, folder: Path, what: str, **settings: Any
) -> tuple[Any, dict[str, Any]]:
    """A model of a class with `from_pretrained`, and what it says about the tensors it read."""
    hint = "Give a folder written by save_pretrained with such a class, or a hub name."
    settings |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    with explained(f"{path} could not be loaded as a {what}", hint), _packages(path):
        model, told = kind.from_pretrained(str(folder), **settings)
    return model, told


@contextlib.contextmanager
def _packages(path: str | Path) -> Iterator[None]:
    """Say which package a checkpoint needs that is not installed."""
    try:
        yield
    except ImportError as error:
        if "bitsandbytes" in str(error):
            raise MissingExtraError("eval", "quantize", "bitsandbytes") from error
        raise UsageError(
            f"{path} needs a package that is not installed: {one_line(error)[:300]}",
            "Install it with pip.",
        ) from error


def _quantized(
    path: str | Path,
    folder: Path,
    quantize: str,
    adapted: bool,
    dtype: torch.dtype,
    device: str | torch.device | None,
) -> dict[str, Any]:
    """Arguments of `from_pretrained` for weights that are, or shall be, quantized."""
    if quantize and quantize not in QUANTIZATIONS:
        raise UsageError(f"There is no quantization {quantize!r}.", "Use nf4 or int8.")
    already = checkpoints.quantization_of(checkpoints.read_config(folder))
    if quantize and already:
        raise UsageError(f"{path} is quantized already ({already}).", "Leave --quantize out.")
    if adapted and (quantize or already):
        raise UsageError(
            f"{path} is an adapter, and its weights would be merged into quantized ones.",
            "Merge it into the float checkpoint, save that, and quantize the result.",
        )
    if not quantize and not already:
        return {}
    settings: dict[str, Any] = {"device_map": {"": str(device or "cpu")}}
    if quantize or already in ("int8", "nf4", "fp4"):
        with _packages(path):
            import_module("bitsandbytes")
    if quantize:
        from transformers import BitsAndBytesConfig

        chosen: dict[str, Any] = {"load_in_8bit": True}
        if quantize == "nf4":
            chosen = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
            chosen["bnb_4bit_compute_dtype"] = dtype
        settings["quantization_config"] = BitsAndBytesConfig(**chosen)
    return settings


def _check_loaded(
    path: str | Path, model: Any, told: dict[str, Any], projector_may_be_new: bool
) -> None:
    """Say which tensors the checkpoint lacks, has too many, or has in another shape.

    transformers draws the missing ones at random and drops the others, with a warning at most.
    """
    reshaped = {str(entry[0]) for entry in told["mismatched_keys"]}
    missing = set(told["missing_keys"]) - reshaped
    unexpected = set(told["unexpected_keys"])
    lacks_projector = bool(missing) and missing == _projector_names(model)
    if lacks_projector and projector_may_be_new and not unexpected and not reshaped:
        return
    kinds = {"missing": missing, "not known to its class": unexpected, "of another shape": reshaped}
    problem = _listed(kinds)
    if problem:
        raise UsageError(
            f"{path} does not hold the weights of a {type(model).__name__}: {problem}.",
            _hint(model, missing, unexpected, reshaped),
        )
    if projector_may_be_new:
        raise UsageError(
            f"{path} has a projector, and the recipe asks for a new one.",
            "Leave new_projector out.",
        )


def _listed(kinds: dict[str, set[str]]) -> str:
    """`7 tensors are missing (a, b, c, d, e, ...); 1 tensor is ...`; empty where there are none."""
    return "; ".join(
        f"{len(names)} {'tensors are' if len(names) > 1 else 'tensor is'} {kind} ({_named(names)})"
        for kind, names in kinds.items()
        if names
    )


def _named(names: Collection[str]) -> str:
    """The first of them by name, as many as an error has room for."""
    return ", ".join(sorted(names)[:NAMED]) + (", ..." if len(names) > NAMED else "")


def _projector_names(model: Any) -> set[str]:
    """Names of the projector's weights; empty for families that are not known."""
    try:
        inside = {id(weight) for weight in VisionLanguageModel(model).projector.parameters()}
    except UsageError:
        return set()
    return {name for name, weight in model.named_parameters() if id(weight) in inside}


def _hint(model: Any, missing: set[str], unexpected: set[str], reshaped: set[str]) -> str:
    if missing and missing == _projector_names(model) and not unexpected:
        return "To train a new projector set new_projector=true; to evaluate, train one first."
    heads = {name.partition(".")[0] for name in unexpected}
    if missing and len(heads) == 1:
        head = heads.pop()
        twice = all(name.startswith(f"{head}.{head}.") for name in unexpected)
        inside = getattr(model, head, None)
        if inside is None or (twice and not hasattr(inside, head)):
            return f"All its names begin with {head!r}: save the model inside that wrapper."
    if missing == {"lm_head.weight"} and not unexpected:
        return "Save the head with it, or set tie_word_embeddings in config.json if it is tied."
    if unexpected and not missing and not reshaped:
        return "Take them out if they are surplus: load and save_pretrained with that class."
    return "Save the whole model again with save_pretrained, with the class that config.json names."


def _check_finite(path: str | Path, model: nn.Module) -> None:
    bad = {
        name
        for name, weight in [*model.named_parameters(), *model.named_buffers()]
        if weight.is_floating_point()
        and not weight.is_meta  # a layer that accelerate reads when it runs
        and not bool(torch.isfinite(weight).all())
    }
    if bad:
        raise UsageError(
            f"{path} holds NaN or infinite values in {len(bad)} of its tensors: {_named(bad)}.",
            "Its training diverged or the file is damaged: use an earlier checkpoint.",
        )


def _with_adapter(model: Any, folder: Path, allow_pickle: bool) -> Any:
    """The model with an adapter of peft folded into its weights."""
    try:
        from peft import PeftConfig, PeftModel, PeftType
        from peft.utils import load_peft_weights, set_peft_model_state_dict
    except ImportError:
        raise MissingExtraError("eval", "train", "peft") from None

    if not allow_pickle and not (folder / "adapter_model.safetensors").is_file():
        raise UsageError(
            f"{folder} holds no adapter_model.safetensors.",
            "Save the adapter again with safetensors, or allow pickles with allow_pickle=true.",
        )
    checkpoints.stored_weights(folder)  # says which file is damaged
    file = folder / "adapter_config.json"
    with explained(f"{file} could not be read", "Restore the file."):
        named = json.loads(file.read_text(encoding="utf-8")).get("peft_type")
        if named not in {each.value for each in PeftType}:
            raise UsageError(
                f"{file}: there is no peft_type {named!r}.", "Restore it; of LoRA it is LORA."
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # keys of another version or another peft_type
            config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = True
    cannot_be_merged = UsageError(
        f"{folder} is a {getattr(config.peft_type, 'value', config.peft_type)} adapter, which "
        "cannot be merged into its base.",
        "Use an adapter of low rank (LoRA and its kin).",
    )
    if config.is_prompt_learning:
        raise cannot_be_merged
    hint = "Is base_model_name_or_path the model that it was trained on?"
    with explained(f"{folder} could not be read as an adapter of its base", hint):
        wrapped = PeftModel(model, config)
        told = set_peft_model_state_dict(wrapped, load_peft_weights(str(folder), device="cpu"))
        learned = {name for name, _ in wrapped.named_parameters() if wrapped.prefix in name}
    kinds = {"missing": learned & set(told.missing_keys), "new to it": set(told.unexpected_keys)}
    if problem := _listed(kinds):
        raise UsageError(f"{folder} is no adapter of its base: {problem}.", hint)
    if not hasattr(wrapped, "merge_and_unload"):
        raise cannot_be_merged
    return wrapped.merge_and_unload()


def _settle_arithmetic(model: nn.Module) -> None:
    """Keep what depends on the machine out of a model's arithmetic.

    bitsandbytes' quick 4-bit path for some CPUs rounds the scales to bfloat16 whatever type was
    asked for, and fails on layers whose width is no multiple of 32. And a tiny model gets one
    thread, unless the user chose: waking more costs many times the work (measured on two cores
    with half a million parameters: 30 times slower with two threads).
    """
    modules: Iterable[Any] = model.modules()
    for module in modules:
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    tiny = sum(parameter.numel() for parameter in model.parameters()) < TINY
    if tiny and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def quiet() -> None:
    """Keep the libraries' progress bars and reminders out of our own output."""
    import logging

    from transformers.utils import logging as reminders

    reminders.disable_progress_bar()
    reminders.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a line for each cast of an input


def load_processor(path: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The processor (tokenizer, image processor, chat template) beside a checkpoint.

    Raises:
        UsageError: it is missing or broken.
    """
    from transformers import AutoProcessor

    own = checkpoints.locate(path, trust_remote_code=trust_remote_code)
    folder = checkpoints.processor_folder(own)
    hint = "Save it there with processor.save_pretrained."
    with explained(f"{path} has no usable processor", hint), _packages(path):
        processor = AutoProcessor.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
        raise UsageError(
            f"{path} has a {type(processor).__name__}, not a processor for text and images.",
            "Save tokenizer, image processor and processor_config.json there.",
        )
    if folder != own:
        _use_adapters_own(processor, own, trust_remote_code)
    return processor


def _use_adapters_own(processor: Any, adapter: Path, trust_remote_code: bool) -> None:
    """Put an adapter's own tokenizer and chat template, if any, into its base's processor."""
    from transformers import AutoTokenizer

    token = getattr(processor, "image_token", None)
    template = adapter / "chat_template.jinja"
    with explained(f"{adapter} has no usable tokenizer", "Save it again, or take its files out."):
        if (adapter / "tokenizer_config.json").is_file() or (adapter / "tokenizer.json").is_file():
            tokenizer = AutoTokenizer.from_pretrained(
                str(adapter), trust_remote_code=trust_remote_code
            )
            places = [
                each.convert_tokens_to_ids(token) for each in (processor.tokenizer, tokenizer)
            ]
            if token is not None and places[0] != places[1]:
                raise UsageError(
                    f"The tokenizer of {adapter} has {token} as {places[1]}, its base's as "
                    f"{places[0]}.",
                    "Save the whole processor beside the adapter, or take its tokenizer out.",
                )
            processor.tokenizer = tokenizer
            if tokenizer.chat_template:
                processor.chat_template = tokenizer.chat_template
        if template.is_file():
            processor.chat_template = template.read_text(encoding="utf-8")


def set_trainable(model: nn.Module, names: Iterable[str]) -> None:
    """Let the named parts learn and freeze everything else.

    The LM head and the token embeddings belong to `language_model`.
    """
    parts = VisionLanguageModel(model)
    named = set(names)
    model.requires_grad_(False)
    for name in PARTS:
        if name in named:
            getattr(parts, name).requires_grad_(True)
    head = model.get_output_embeddings()  # type: ignore[operator]
    if "language_model" in named and head is not None:
        head.requires_grad_(True)


def restore_dtypes(model: nn.Module, folder: Path, dtype: str = "auto") -> None:
    """Give a trained model's weights the float types of the checkpoint that it started from.

    A tensor that the checkpoint does not hold under its name takes the commonest type of its side,
    vision or language.

    Args:
        dtype: one type for all of them instead.
    """
    if dtype == "auto":
        stored, usual = checkpoints.stored_dtypes(folder), checkpoints.stored_dtype(folder)
    else:
        stored, usual = {}, dtype

    def of_vision(name: str) -> bool:
        """Whether a tensor belongs to the vision side, in old and new layouts alike."""
        return "vision" in name or "visual" in name

    sides: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    for name, kind in stored.items():
        sides[of_vision(name)][kind] += 1
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name not in stored and not isinstance(tensor, nn.Parameter):
            continue  # a buffer that is not saved, such as the frequencies of rotary positions
        side = sides[of_vision(name)].most_common(1)
        kind = stored.get(name) or (side[0][0] if side else usual)
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(getattr(torch, kind))


def checkpoint_activations(model: Any, *, frozen: bool = False) -> None:
    """Recompute each layer's activations in the backward pass instead of keeping them.

    Args:
        frozen: a teacher that the switch's gradient passes through. Its layers alone are marked
            as training, which is what makes them recompute; dropout inside them stays off.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is not None:
        enable({"use_reentrant": False})
    else:  # the name before transformers 5.20 or so
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if frozen:
        model.disable_input_require_grads()  # only images carry a gradient here
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = True


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Number of weights in all, by part, and of those that learn; tied weights count once."""
    parts = VisionLanguageModel(model)
    counts = {name: _count(getattr(parts, name).parameters()) for name in PARTS}
    counts["total"] = _count(model.parameters())
    counts["trainable"] = _count(p for p in model.parameters() if p.requires_grad)
    return counts


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum({id(p): weight_count(p) for p in parameters}.values())


def weight_count(parameter: torch.Tensor) -> int:
    """Weights that a parameter stands for; bitsandbytes packs two of 4 bits into a byte."""
    packed = getattr(parameter, "quant_state", None)
    return parameter.numel() if packed is None else int(packed.shape.numel())
