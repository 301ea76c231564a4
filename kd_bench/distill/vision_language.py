"""Vision-language models of transformers: their parts, the visual switch, what must be equal.

    z_T  = L_T(P_T(V_T(x_v)), x_t)    the teacher's own forward
    z_S  = L_S(P_S(V_S(x_v)), x_t)    the student's own forward
    z_SW = L_T(P_T(V_S(x_v)), x_t)    the teacher's own forward while it `seeing_with` the student

Nothing of a family's forward is written again here: the switch of Switch-KD (arXiv 2604.14629) is
the teacher with another vision module in its place.
"""

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

from kd_bench.errors import UsageError

Inputs = Mapping[str, Any]
"""What the processor returns: `input_ids`, `attention_mask`, `pixel_values`, ..."""

NOT_GIVEN = ("labels", "sample_index")  # ours, or read by the loss that is computed elsewhere
TOKENS = "number of image tokens an image"
PLAIN_LAYERS = (
    "LlamaDecoderLayer",
    "MistralDecoderLayer",
    "Qwen2DecoderLayer",
    "Qwen2VLDecoderLayer",
    "Qwen2_5_VLDecoderLayer",
    "Qwen3DecoderLayer",
    "Qwen3VLTextDecoderLayer",
)
"""Decoder layers that `_at_answers` computes at a part of the positions."""
PLAIN_DECODERS = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model")
"""Language models of such layers alone, causal, a token's position its place in the row."""
CAUSAL_UNASKED = ("sdpa", "flash_attention_2", "flash_attention_3")
"""Attention that is causal where it is given no mask."""
TEACHERS = "teacher."
"""Begins the names of the teacher's own tensors in a batch that the student's cannot serve."""
OF_IMAGES = (
    "pixel_values",
    "pixel_attention_mask",
    "image_sizes",
    "image_grid_thw",
    "batch_num_images",
)


def _llava_tokens(model: Any) -> int:
    """Tokens of CLIP or SigLIP, less the class token where the projector does not see it."""
    drops_first = getattr(model.config, "vision_feature_select_strategy", "full") == "default"
    tower = model.model.vision_tower
    for module in tower.modules():
        if hasattr(module, "num_positions"):
            return int(module.num_positions) - int(drops_first)
    return int((tower.config.image_size // tower.config.patch_size) ** 2) - int(drops_first)


def _idefics_tokens(model: Any) -> int:
    vision = model.config.vision_config
    return int((vision.image_size // vision.patch_size) ** 2 // model.config.scale_factor**2)


def _internvl_tokens(model: Any) -> int:
    vision = model.config.vision_config
    (height, width), (down, across) = vision.image_size, vision.patch_size
    return int((height // down) * (width // across) * model.config.downsample_ratio**2)


@dataclass(frozen=True)
class Family:
    """Where an architecture keeps its parts.

    Attributes:
        vision: name of the vision module in `model.model`.
        projector: names of the projector's modules, inside the vision module where it contains
            them (Qwen's mergers), else in `model.model`.
        language: name of the language model in `model.model`.
        image_tokens: image tokens of one image, or of one tile; None where its size decides.
    """

    vision: str = "vision_tower"
    projector: tuple[str, ...] = ("multi_modal_projector",)
    language: str = "language_model"
    image_tokens: Callable[[Any], int | None] = _llava_tokens

    @property
    def merges_inside(self) -> bool:
        """Whether the vision module contains the projector."""
        return self.vision == "visual"


_QWEN = Family("visual", ("merger",), image_tokens=lambda model: None)
_QWEN3 = Family("visual", ("merger", "deepstack_merger_list"), image_tokens=lambda model: None)
_IDEFICS = Family("vision_model", ("connector",), "text_model", _idefics_tokens)
_LLAVA = Family()

FAMILIES: dict[str, Family] = {
    "LlavaForConditionalGeneration": _LLAVA,
    "LlavaNextForConditionalGeneration": _LLAVA,
    "LlavaOnevisionForConditionalGeneration": _LLAVA,
    "Qwen2VLForConditionalGeneration": _QWEN,
    "Qwen2_5_VLForConditionalGeneration": _QWEN,
    "Qwen3VLForConditionalGeneration": _QWEN3,
    "SmolVLMForConditionalGeneration": _IDEFICS,
    "Idefics3ForConditionalGeneration": _IDEFICS,
    "InternVLForConditionalGeneration": Family(image_tokens=_internvl_tokens),
    "PaliGemmaForConditionalGeneration": Family(),
    "Gemma3ForConditionalGeneration": Family(
        image_tokens=lambda model: int(model.config.mm_tokens_per_image)
    ),
}
"""Supported architectures by the class name of the transformers model."""


class VisionLanguageModel:
    """A loaded model, adapters included, seen by its parts.

    Attributes:
        model: the model as it was given.
        whole: the transformers model inside adapters and wrappers; the weights are shared.
        architecture: its key in `FAMILIES`.

    Raises:
        UsageError: the architecture is not one of `FAMILIES`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.whole: Any = _unwrapped(model)
        names = [kind.__name__ for kind in type(self.whole).__mro__]
        known = [name for name in names if name in FAMILIES]
        if not known:
            raise UsageError(
                f"{names[0]} is not an architecture that kd-bench can distil.",
                f"Supported: {', '.join(FAMILIES)}.",
            )
        self.architecture = known[0]
        self.family = FAMILIES[known[0]]
        self.core: Any = self.whole.model
        self.config: Any = self.whole.config

    # Parts

    @property
    def vision_module(self) -> nn.Module:
        """What the forward pass calls with pixels; contains the projector in some families."""
        return getattr(self.core, self.family.vision)

    @property
    def projector_modules(self) -> list[nn.Module]:
        """The modules that are called with vision features."""
        owner = self.vision_module if self.family.merges_inside else self.core
        modules = []
        for name in self.family.projector:
            module = getattr(owner, name)
            modules += list(module) if isinstance(module, nn.ModuleList) else [module]
        return modules

    @property
    def vision_tower(self) -> nn.Module:
        """The vision module without the projector."""
        if not self.family.merges_inside:
            return self.vision_module
        children = self.vision_module.named_children()
        return nn.ModuleDict({n: part for n, part in children if n not in self.family.projector})

    @property
    def projector(self) -> nn.Module:
        """The projector, with the token that ends a row of patches where tiles are packed."""
        parts = nn.ModuleList(self.projector_modules)
        newline = getattr(self.core, "image_newline", None)
        if newline is None and len(parts) == 1:
            return parts[0]
        if newline is not None:
            parts.register_parameter("image_newline", newline)
        return parts

    @property
    def language_model(self) -> nn.Module:
        """The decoder, without the LM head."""
        return getattr(self.core, self.family.language)

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder's layers."""
        names = {*self.language_model._no_split_modules}  # type: ignore[misc]
        return [
            each
            for each in self.language_model.modules()
            if names & {kind.__name__ for kind in type(each).__mro__}  # FSDP puts one before them
        ]

    # Sizes

    @property
    def image_token_id(self) -> int:
        """The id that stands for an image in `input_ids`."""
        return int(self.config.image_token_id)

    @property
    def image_token_count(self) -> int | None:
        """Image tokens of one image (one tile where images are tiled); None: its size decides."""
        return self.family.image_tokens(self.whole)

    @property
    def vocab_size(self) -> int:
        """Rows of the LM head: more than the tokenizer has where the checkpoint is padded."""
        return int(self.whole.get_output_embeddings().weight.shape[0])

    @property
    def hidden_size(self) -> int:
        """Width of the language model."""
        return int(self.config.get_text_config().hidden_size)

    @property
    def image_geometry(self) -> dict[str, Any]:
        """Settings that decide how many image tokens an image has and where they lie, by name."""
        found = {TOKENS: self.image_token_count}
        for name in ("image_size", "patch_size", "temporal_patch_size", "spatial_merge_size"):
            found[name] = getattr(self.config.vision_config, name, None)
        tiling = ("image_grid_pinpoints", "vision_aspect_ratio")
        for name in (*tiling, "scale_factor", "downsample_ratio"):
            found[name] = getattr(self.config, name, None)
        return {name: plain(value) for name, value in found.items() if value is not None}

    @property
    def vision_geometry(self) -> dict[str, Any]:
        """Settings that decide what the projector reads from the vision tower, by name."""
        config, vision = self.config, self.config.vision_config
        layer = getattr(config, "vision_feature_layer", None)
        depth = getattr(vision, "num_hidden_layers", None)
        counted_from_start = isinstance(layer, int) and layer >= 0
        return {
            "projector's place": self.family.vision,
            # Qwen2-VL's hidden_size is the language model's.
            "vision width": getattr(vision, "embed_dim", None) or vision.hidden_size,
            "vision_feature_layer": plain(layer),
            "vision_feature_select_strategy": getattr(
                config, "vision_feature_select_strategy", None
            ),
            "vision layers": depth if counted_from_start else None,
            "DeepStack layers": len(getattr(vision, "deepstack_visual_indexes", None) or ()),
        }

    # Forward

    def hidden_states(self, inputs: Inputs) -> Tensor:
        """Last hidden states [batch, length, hidden] of the model's own forward pass.

        Raises:
            UsageError: the images do not fit the text, or there is a video.
        """
        try:
            with self._skipping_unread():
                output = self.core(**self._given(inputs, self.core.forward), use_cache=False)
        except ValueError as error:
            raise self._does_not_fit(str(error).splitlines()[0]) from error
        states: Tensor = output.last_hidden_state
        return states

    def answer_states(self, inputs: Inputs) -> Tensor:
        """Last hidden states [N, hidden] at the answers of a batch.

        The same as of `hidden_states`, for less: behind its keys and values the last decoder layer
        runs at the answers alone, where it is one of `PLAIN_LAYERS`; the rest is `plain_states`.

        Raises:
            UsageError: as `hidden_states`.
        """
        places = places_of(inputs, self.image_token_id)
        layer = self._plain_last_layer
        if layer is None or "forward" in vars(layer):  # placed by accelerate, layer by layer
            return self.plain_states(inputs).flatten(0, 1).index_select(0, places.answers)
        mask = None if places.padded_right else inputs.get("attention_mask")
        layer.forward = partial(_last_layer, layer, places, mask)
        try:
            return self.plain_states(inputs)
        finally:
            del layer.forward

    def plain_states(self, inputs: Inputs) -> Tensor:
        """What `hidden_states` are at all tokens, [batch, length, hidden]; padding's are its own.

        In a batch padded on the right no token before the padding sees it, so `PLAIN_DECODERS` go
        without a mask, which leaves attention to its fastest kernels; image tokens are put in their
        places by number.

        Raises:
            UsageError: as `hidden_states`.
        """
        places = places_of(inputs, self.image_token_id)
        language: Any = self.language_model
        if not (self._plain_decoder and places.padded_right) or "forward" in vars(language):
            return self.hidden_states(inputs)
        language.forward = partial(_decode, language)
        try:
            states: Tensor = language(inputs_embeds=self._embeddings(inputs, places))
            return states
        finally:
            del language.forward

    def _embeddings(self, inputs: Inputs, places: "Places") -> Tensor:
        """What enters the language model, image tokens in their places [batch, length, hidden]."""
        embeddings: Tensor = self.core.get_input_embeddings()(inputs["input_ids"])
        if not has_images(inputs):
            return embeddings
        try:
            images = self.image_embeddings(inputs)[0].to(embeddings)
        except ValueError as error:
            raise self._does_not_fit(str(error).splitlines()[0]) from error
        if len(images) != len(places.images):
            raise self._does_not_fit(f"{len(places.images)} image tokens, {len(images)} features")
        flat = embeddings.flatten(0, 1).index_copy(0, places.images, images)
        return flat.view_as(embeddings)

    def _does_not_fit(self, why: str) -> UsageError:
        return UsageError(
            f"{self.architecture} does not take this batch: {why}",
            "Use the processor of this checkpoint and do not truncate inside an image.",
        )

    @cached_property
    def _plain_last_layer(self) -> Any:
        """The last decoder layer, if `_at_answers` computes what it does; else None."""
        layers = getattr(self.language_model, "layers", None)
        if layers is None or self.vision_geometry["DeepStack layers"] >= len(layers):
            return None
        return layers[-1] if is_plain(layers[-1]) else None

    @cached_property
    def _plain_decoder(self) -> bool:
        """Whether `_decode` computes what the language model does to a batch padded on the right.

        Images must be all that comes in from outside, at the places of their tokens.
        """
        language: Any = self.language_model
        names = {kind.__name__ for kind in type(language).__mro__}
        return (
            bool(names & {*PLAIN_DECODERS})
            and language.config._attn_implementation in CAUSAL_UNASKED
            and getattr(language.config, "sliding_window", None) is None
            and not self.family.merges_inside
        )

    def image_embeddings(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """Projected image tokens [image tokens, hidden]: for the input, then for each layer.

        Layers are those of DeepStack (arXiv 2406.04334).
        """
        get = self.core.get_image_features
        with self._skipping_unread():
            output = get(**self._given(inputs, get))
        embeddings = getattr(output, "pooler_output", output)
        deep = getattr(output, "deepstack_features", None) or ()
        each_image = ([e] if isinstance(e, Tensor) else e for e in (embeddings, *deep))
        return tuple(torch.cat([t.flatten(0, -2) for t in tensors]) for tensors in each_image)

    @contextlib.contextmanager
    def _skipping_unread(self) -> Iterator[None]:
        """Inside, the tower's layers behind the last one that is read, and its head, do nothing."""
        idle = [module for module in self._unread if "forward" not in vars(module)]
        for module in idle:
            module.forward = _unchanged
        try:
            yield
        finally:
            for module in idle:
                del module.forward

    @property
    def _unread(self) -> list[Any]:
        """Layers of a LLaVA's tower behind `vision_feature_layer`, and its pooling head."""
        read = getattr(self.config, "vision_feature_layer", None)
        tower: Any = self.vision_module
        tower = getattr(tower, "vision_model", tower)
        layers = getattr(getattr(tower, "encoder", None), "layers", None)
        if self.family is not _LLAVA or read is None or layers is None:
            return []
        read = [read] if isinstance(read, int) else list(read)
        depth = max(layer % (len(layers) + 1) for layer in read)
        return [*layers[depth:], *([tower.head] if getattr(tower, "use_head", False) else [])]

    def _given(self, inputs: Inputs, function: Callable[..., Any]) -> dict[str, Any]:
        """The inputs that a function knows, and what it needs and can be told from them."""
        known = set(inspect.signature(function).parameters) - set(NOT_GIVEN)
        given = {n: value for n, value in inputs.items() if n in known and value is not None}
        if not has_images(inputs):
            return {n: value for n, value in given.items() if n not in OF_IMAGES}
        if "mm_token_type_ids" in known:  # without them Qwen falls back to positions of text
            kinds = (inputs["input_ids"] == self.image_token_id).int()
            given.setdefault("mm_token_type_ids", kinds)
        return given

    def lm_head(self, hidden: Tensor) -> Tensor:
        """Logits [N, vocabulary] of hidden states [N, hidden]."""
        logits: Tensor = self.whole.get_output_embeddings()(hidden)
        cap = self._logit_cap
        return logits if cap is None else (logits / cap).tanh() * cap

    @cached_property
    def _logit_cap(self) -> float | None:
        """Gemma 2's cap, where the installed transformers puts it on PaliGemma (5.17 did not)."""
        if "final_logit_softcapping" not in inspect.getsource(type(self.whole).forward):
            return None
        return getattr(self.config.get_text_config(), "final_logit_softcapping", None)


# The last layer, at the answers alone


@dataclass(frozen=True)
class Places:
    """Where answers and image tokens of a batch lie: N answers in all, at most A in one sample.

    Attributes:
        answers: places in [batch * length], rising, [N].
        slots: their places in [batch * A], [N].
        table: position of each slot in its sample, the last one where no answer fills it,
            [batch, A].
        images: places in [batch * length] of the image tokens, rising.
        sizes: most image tokens, and most other tokens, of one sample.
        padded_right: no token comes behind padding.
    """

    answers: Tensor
    slots: Tensor
    table: Tensor
    images: Tensor
    sizes: Sequence[int]
    padded_right: bool = True

    @property
    def owners(self) -> Tensor:
        """Sample in the batch of every answer [N]."""
        return self.slots // self.table.shape[1]


def find_places(inputs: Inputs, image_token_id: int) -> Places:
    """Where answers and image tokens lie, read in one transfer from the device that holds them."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    marks = [answer_positions(inputs["labels"]), ids == image_token_id]
    marks.append(torch.ones_like(marks[0]) if mask is None else mask.bool())
    answers, images, tokens = torch.stack(marks).cpu()  # [batch, length] each
    batch, length = answers.shape
    rows = answers.flatten().nonzero().squeeze(1)
    counts = answers.sum(1)
    most = max(int(counts.max()), 1)
    sample = rows // length
    before = counts.cumsum(0) - counts  # answers of the samples above
    slots = sample * most + torch.arange(len(rows)) - before[sample]
    table = rows.new_full((batch * most,), length - 1)
    table[slots] = rows % length
    found = Places(
        answers=rows,
        slots=slots,
        table=table.view(batch, most),
        images=images.flatten().nonzero().squeeze(1),
        sizes=torch.stack([images, tokens & ~images]).sum(2).amax(1).tolist(),
        padded_right=not bool((tokens[:, 1:] & ~tokens[:, :-1]).any()),
    )
    if ids.device.type == "cpu":
        return found
    own: dict[str, Any] = {n: each for n, each in vars(found).items() if isinstance(each, Tensor)}
    return replace(found, **{name: each.to(ids.device) for name, each in own.items()})


PLACES = "places_"
"""Begins the names of what `Collator` puts into a batch, so that no device has to be asked."""


def entries_of(places: Places) -> dict[str, Any]:
    """The places of a batch padded on the right, as entries of that batch."""
    names = ("answers", "slots", "table", "images", "sizes")
    return {f"{PLACES}{name}": getattr(places, name) for name in names}


def places_of(inputs: Inputs, image_token_id: int) -> Places:
    """The places that `Collator` found, or this function before; else those that are found now."""
    if isinstance(known := inputs.get("places"), Places):
        return known
    if f"{PLACES}table" in inputs:
        given = (name for name in inputs if name.startswith(PLACES))
        return Places(**{name.removeprefix(PLACES): inputs[name] for name in given})
    return find_places(inputs, image_token_id)


def _decode(language: Any, inputs_embeds: Tensor) -> Tensor:
    """In place of the forward of one of `PLAIN_DECODERS`: [batch, length, width] -> its states."""
    positions = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device).unsqueeze(0)
    rotary = language.rotary_emb(inputs_embeds, positions)
    states = inputs_embeds
    for layer in language.layers:
        states = layer(states, attention_mask=None, position_embeddings=rotary, use_cache=False)
    normed: Tensor = language.norm(states)
    return normed


def _last_layer(
    layer: Any, places: Places, mask: Tensor | None, hidden_states: Tensor, *_: Any, **given: Any
) -> Tensor:
    """In place of a decoder layer's own forward: [batch, length, width] -> [N, width]."""
    work = partial(_at_answers, layer, places, mask, given["position_embeddings"])
    if layer.gradient_checkpointing and layer.training:
        recomputed: Tensor = layer._gradient_checkpointing_func(work, hidden_states)
        return recomputed
    return work(hidden_states)


def _at_answers(
    layer: Any,
    places: Places,
    mask: Tensor | None,
    rotary: tuple[Tensor, Tensor],
    hidden: Tensor,
) -> Tensor:
    """A decoder layer of `PLAIN_LAYERS`: keys and values everywhere, all else at the answers.

    Args:
        mask: tokens that are no padding [batch, length]; None where none comes before an answer.
        rotary: cosines and sines [batch or 1, length, head width].
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    attention, (batch, length, _) = layer.self_attn, hidden.shape
    normed = layer.input_layernorm(hidden)

    def rows_of(states: Tensor) -> Tensor:
        return states.expand(batch, -1, -1).flatten(0, 1).index_select(0, places.answers)

    value = attention.v_proj(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
    key = _rotated(attention, "k", normed, rotary)  # [batch, heads, length, head width]
    at_rows = tuple(rows_of(each).unsqueeze(0) for each in rotary)
    query = _rotated(attention, "q", rows_of(normed).unsqueeze(0), at_rows)
    query = query.squeeze(0).transpose(0, 1)  # [N, heads, head width]
    packed = query.new_zeros(places.table.numel(), *query.shape[1:])
    packed = packed.index_copy(0, places.slots, query).unflatten(0, places.table.shape)
    seen = torch.arange(length, device=hidden.device) <= places.table.unsqueeze(-1)
    if mask is not None:
        seen = seen & mask.bool().unsqueeze(1)  # [batch, A, length]
    found, _ = sdpa_attention_forward(
        attention,
        packed.transpose(1, 2),
        key,
        value,
        seen.unsqueeze(1),
        dropout=attention.attention_dropout if attention.training else 0.0,
        scaling=attention.scaling,
    )
    found = found.flatten(0, 1).index_select(0, places.slots).flatten(1)
    states = rows_of(hidden) + attention.o_proj(found)
    out: Tensor = states + layer.mlp(layer.post_attention_layernorm(states))
    return out


def is_plain(layer: Any) -> bool:
    """Whether a decoder layer is one of `PLAIN_LAYERS`, and sees all that comes before."""
    names = {kind.__name__ for kind in type(layer).__mro__}  # FSDP puts one before its own
    if not names & {*PLAIN_LAYERS}:
        return False
    of_all = getattr(layer.self_attn.config, "sliding_window", None)  # Mistral's layers ask it
    return getattr(layer.self_attn, "sliding_window", of_all) is None


def queries_and_keys(
    attention: Any, normed: Tensor, rotary: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """What a plain layer's attention compares [batch, heads, length, head width], of its input."""
    return _rotated(attention, "q", normed, rotary), _rotated(attention, "k", normed, rotary)


def _rotated(attention: Any, side: str, normed: Tensor, rotary: Sequence[Tensor]) -> Tensor:
    """Queries (`q`) or keys (`k`) with their positions in them [batch, heads, length, .]."""
    states = getattr(attention, f"{side}_proj")(normed).unflatten(-1, (-1, attention.head_dim))
    if hasattr(attention, f"{side}_norm"):
        states = getattr(attention, f"{side}_norm")(states)
    states = states.transpose(1, 2)
    rotate: Any = inspect.getmodule(type(attention)).apply_rotary_pos_emb  # type: ignore[union-attr]
    turned: Tensor = rotate(states, states[:, :0], *rotary)[0]
    return turned


# The visual switch


class _Given(nn.Module):
    """A module that gives what another one gave before."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.output


@contextlib.contextmanager
def keeping_vision(model: VisionLanguageModel) -> Iterator[list[Any]]:
    """Keep what the vision tower gives while the model runs, so that the switch need not run it.

    Yields the outputs of the vision module; of its blocks where it contains the projector.
    """
    kept: list[Any] = []
    vision: Any = model.vision_module
    modules = vision.blocks if model.family.merges_inside else [vision]
    hooks = [
        module.register_forward_hook(lambda _, __, output: kept.append(output))
        for module in modules
    ]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def seeing_with(
    teacher: VisionLanguageModel, student: VisionLanguageModel, kept: list[Any] | None = None
) -> Iterator[None]:
    """Inside, the teacher's forward is the visual switch: V_S in the place of V_T.

    Gradients reach the student's tower through the teacher's projector and language model.

    Args:
        kept: what the student's tower gave for the same inputs; without it the tower runs.
    """
    own = teacher.vision_module
    projectors = teacher.projector_modules
    hooks = [module.register_forward_pre_hook(_in_own_type) for module in projectors]
    setattr(teacher.core, teacher.family.vision, _switched_vision(teacher, student, kept))
    try:
        yield
    finally:
        setattr(teacher.core, teacher.family.vision, own)
        for hook in hooks:
            hook.remove()


def put_vision(student: VisionLanguageModel, *, into: VisionLanguageModel) -> None:
    """Make a teacher the visual switch for good: the student's tower in the place of its own."""
    setattr(into.core, into.family.vision, _switched_vision(into, student, None))


def _switched_vision(
    teacher: VisionLanguageModel, student: VisionLanguageModel, kept: list[Any] | None
) -> nn.Module:
    """The student's tower, as the module that the teacher's forward calls."""
    if not teacher.family.merges_inside:
        return student.vision_module if kept is None else _Given(kept[-1])
    vision = copy.copy(student.vision_module)
    vision._modules = dict(vision._modules)  # the student keeps its own
    for name in teacher.family.projector:
        vision._modules[name] = getattr(teacher.vision_module, name)
    if kept is not None:
        vision._modules["blocks"] = nn.ModuleList(_Given(output) for output in kept)
    return vision


def _in_own_type(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    """Features of a float32 student for a projector in bfloat16."""
    weight = next((p for p in module.parameters() if p.is_floating_point()), None)
    if weight is None:
        return given
    return (given[0].to(weight.device, weight.dtype), *given[1:])


# Batches


def answer_positions(labels: Tensor) -> Tensor:
    """Positions whose next token is supervised.

    Args:
        labels: [batch, length], -100 where nothing is asked.

    Returns:
        bool [batch, length]; the last column is always False.
    """
    positions = labels.new_zeros(labels.shape, dtype=torch.bool)
    positions[:, :-1] = labels[:, 1:] != -100
    return positions


def teacher_inputs(batch: Inputs) -> Inputs:
    """What the teacher is given: its own tensors where the batch holds any, else the student's."""
    own = {n.removeprefix(TEACHERS): v for n, v in batch.items() if n.startswith(TEACHERS)}
    return own or batch


def has_images(inputs: Inputs) -> bool:
    """Whether the batch holds an image.

    Raises:
        UsageError: it holds a video.
    """
    if inputs.get("pixel_values_videos") is not None:
        raise UsageError("The batch holds a video.", "Give images; videos are not supported.")
    pixels = inputs.get("pixel_values")
    return pixels is not None and pixels.numel() > 0


def _unchanged(states: Tensor, *_: Any, **__: Any) -> Tensor:
    """The forward of a layer that does nothing."""
    return states


def _unwrapped(model: nn.Module) -> Any:
    """The transformers model inside a peft adapter or a data-parallel wrapper."""
    inner: Any = extract_model_from_parallel(model)
    return inner.get_base_model() if hasattr(inner, "peft_config") else inner


def plain(value: Any) -> Any:
    """Lists for tuples and numbers for enums, so that equal settings compare equal."""
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if hasattr(value, "items"):
        return {key: plain(entry) for key, entry in value.items() if entry is not None}
    return int(value) if isinstance(value, int) and not isinstance(value, bool) else value
