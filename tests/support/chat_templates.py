"""Chat templates with the structure of public repositories, tokenizers of three kinds, processors.

The templates are our own wording of what the repositories ship: where marks, spaces, line breaks
and end tokens stand is theirs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from PIL import Image

SPECIAL = (
    "<pad>",
    "<s>",
    "</s>",
    "<unk>",
    "<|im_start|>",
    "<|im_end|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<end_of_utterance>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<image>",
    "<video>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<start_of_image>",
    "<end_of_image>",
    "<image_soft_token>",
    "<fake_token_around_image>",
    "<global-img>",
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
)
CORPUS = [
    "USER: What is shown here? ASSISTANT: Yes, a red harbour at night.",
    "user\nsystem\nassistant\nmodel\nAnswer the questions. You are a helpful assistant.",
    "A chat between a curious user and an artificial intelligence assistant.",
    "[INST] and how many boats are there? [/INST] Two of them. Yes. No. 42",
    "User: Assistant: think about it first\n\nThe answer is blue. <think> </think>",
] * 20

# Each parts loop writes images where they stand, or all of them first.
_IN_PLACE = (
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}@IMAGE@"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
)
_IMAGES_FIRST = (
    "{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}"
    "{% endfor %}"
)
_TEXTS = "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}"
_CHATML_PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
_MARKED_TEXTS = (
    "{% if m['role'] != 'assistant' %}" + _TEXTS + "{{ c['text'] + '@TAIL@' }}{% endfor %}"
    "{% else %}"
    + _TEXTS
    + "{% generation %}{{ c['text'] + '@TAIL@' }}{% endgeneration %}{% endfor %}{% endif %}"
)


def _with_tail(tail: str) -> str:
    return _MARKED_TEXTS.replace("@TAIL@", tail)


LLAVA = (  # marks of their own around content and a space, no end token
    "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['role'].upper() + ': ' }}{% endif %}"
    + _IMAGES_FIRST
    + _with_tail(" ")
    + "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
MISTRAL = (  # the generation prompt is empty, the end token stands outside the mark
    "{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ '<<SYS>>\n' + m['content'][0]['text'] + '\n<</SYS>>\n\n' }}"
    "{% elif m['role'] == 'user' %}{{ '[INST] ' }}"
    + _IMAGES_FIRST
    + _TEXTS
    + "{{ c['text'] }}{% endfor %}{{ ' [/INST]' }}{% else %}"
    + _TEXTS
    + "{{ ' ' }}{% generation %}{{ c['text'] }}{% endgeneration %}{{ '</s>' }}"
    "{% endfor %}{% endif %}{% endfor %}"
)
NEXT_34B = (
    "{{ '<|im_start|>system\nAnswer the questions.<|im_end|>' }}{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' }}"
    + _IMAGES_FIRST
    + _with_tail("")
    + "{{ '<|im_end|>' }}{% endfor %}"
    + _CHATML_PROMPT
)
ONEVISION = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    + _IMAGES_FIRST
    + _with_tail("")
    + "{{ '<|im_end|>\n' }}{% endfor %}"
    + _CHATML_PROMPT
)
ONEVISION_SPACED = ONEVISION.replace("m['role'] + '\n'", "m['role'] + ' \n'")
QWEN_VL = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' }}"
    + _IN_PLACE.replace("@IMAGE@", "{{ '<|vision_start|><|image_pad|><|vision_end|>' }}")
    + "{{ '<|im_end|>\n' }}{% endfor %}"
    + _CHATML_PROMPT
)
QWEN3_VL = QWEN_VL.replace(
    "{% if loop.first and m['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}",
    "",
)
SMOLVLM = (
    "{{ '<|im_start|>' }}{% for m in messages %}{{ m['role'] | capitalize }}"
    "{% if m['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    + _IN_PLACE.replace("@IMAGE@", "{{ '<image>' }}")
    + "{{ '<end_of_utterance>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
INTERNVL = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    + _IN_PLACE.replace("@IMAGE@", "{{ '<IMG_CONTEXT>\n' }}")
    + "{{ '<|im_end|>\n' }}{% endfor %}"
    + _CHATML_PROMPT
)
GEMMA3 = (  # writes the begin token, trims, roles must alternate
    "{{ bos_token }}{% set first = 1 if messages[0]['role'] == 'system' else 0 %}"
    "{% for m in messages[first:] %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
    "{% if first and loop.first %}{{ messages[0]['content'][0]['text'] + '\n\n' }}{% endif %}"
    + _IN_PLACE.replace("@IMAGE@", "{{ '<start_of_image>' }}").replace(
        "c['text'] }}", "c['text'] | trim }}"
    )
    + "{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    + _IN_PLACE.replace("@IMAGE@", "{{ '<image>' }}").replace("c['text'] }}", "c['text'] | trim }}")
    + "{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
QWEN3 = (  # content as one string; earlier thoughts are dropped, the last turn gets one invented
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set text = m['content'] if m['content'] is string else '' %}"
    "{% set thought = '' %}{% if m['role'] == 'assistant' and '</think>' in text %}"
    "{% set thought = text.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.index0 > ns.last and (loop.last or thought) %}"
    "{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{{ text + '<|im_end|>\n' }}"
    "{% endfor %}" + _CHATML_PROMPT
)
SPACE_AT_THE_END = (  # a generation prompt that ends in a space
    "{% for m in messages %}{{ m['role'] + ': ' }}"
    + _IN_PLACE.replace("@IMAGE@", "{{ '<image>\n' }}")
    + "{{ '</s>\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
OWN_STRING = (  # of a language model's tokenizer: content must be a string
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}" + _CHATML_PROMPT
)


def tinyllava() -> str:
    """The one that `kd-bench convert` writes."""
    from kd_bench.distill.chat import shipped_template

    return shipped_template("tinyllava")


TOKENIZERS = ("byte level", "normalizer", "pre-tokenizer")


@lru_cache
def _core(kind: str) -> str:
    """The tokenizer as JSON; see `tokenizer`."""
    import json

    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=kind != "byte level"))
    special = list(SPECIAL)
    alphabet: list[str] = []
    if kind == "byte level":
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        special += [f"<0x{byte:02X}>" for byte in range(256)]
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        core.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
    core.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=900, special_tokens=special, initial_alphabet=alphabet),
    )
    if kind == "normalizer":  # SentencePiece's words, without a pre-tokenizer to find them
        core.pre_tokenizer = None
        core.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    told = json.loads(core.to_str())
    added = [token for token in told["added_tokens"] if not token["content"].startswith("<0x")]
    return json.dumps({**told, "added_tokens": added})


def tokenizer(kind: str, **settings: Any) -> Any:
    """A BPE tokenizer that marks words GPT-2's way, Llama's old way or Llama's new way.

    The last two write a begin token, as Llama's do.
    """
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer.from_str(_core(kind))
    if kind != "byte level":
        begin = core.token_to_id("<s>")
        core.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    told = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **{**told, **settings})


def _llava(kind: str, template: str | None, **settings: Any) -> Any:
    import transformers as hf

    return hf.LlavaProcessor(
        hf.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer(kind, extra_special_tokens={"image_token": "<image>"}, **settings),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


def _next(kind: str, template: str | None, **settings: Any) -> Any:
    import transformers as hf

    return hf.LlavaNextProcessor(
        hf.LlavaNextImageProcessor(
            size={"shortest_edge": 28},
            crop_size={"height": 28, "width": 28},
            image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]],
        ),
        tokenizer(kind, extra_special_tokens={"image_token": "<image>"}, **settings),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


def _onevision(kind: str, template: str | None) -> Any:
    import transformers as hf

    return hf.LlavaOnevisionProcessor(
        hf.LlavaOnevisionImageProcessor(
            size={"height": 28, "width": 28},
            image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]],
        ),
        tokenizer(
            kind,
            eos_token="<|im_end|>",
            extra_special_tokens={"image_token": "<image>", "video_token": "<video>"},
        ),
        hf.LlavaOnevisionVideoProcessor(),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=template,
    )


def _qwen(kind: str, template: str | None, name: str) -> Any:
    import transformers as hf

    extra = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    patch = 16 if name == "Qwen3VL" else 14
    return getattr(hf, f"{name}Processor")(
        hf.Qwen2VLImageProcessor(
            min_pixels=56 * 56, max_pixels=112 * 112, patch_size=patch, merge_size=2
        ),
        tokenizer(kind, eos_token="<|im_end|>", extra_special_tokens=extra),
        hf.Qwen3VLVideoProcessor() if name == "Qwen3VL" else hf.Qwen2VLVideoProcessor(),
        chat_template=template,
    )


def _idefics(kind: str, template: str | None, name: str) -> Any:
    import transformers as hf

    images = getattr(hf, f"{name}ImageProcessor")(
        size={"longest_edge": 64}, max_image_size={"longest_edge": 32}
    )
    words = tokenizer(
        kind,
        eos_token="<end_of_utterance>",
        extra_special_tokens={
            "image_token": "<image>",
            "fake_image_token": "<fake_token_around_image>",
            "global_image_token": "<global-img>",
            "end_of_utterance_token": "<end_of_utterance>",
        },
    )
    video = [hf.SmolVLMVideoProcessor()] if name == "SmolVLM" else []
    return getattr(hf, f"{name}Processor")(
        images, words, *video, image_seq_len=4, chat_template=template
    )


def _internvl(kind: str, template: str | None) -> Any:
    import transformers as hf

    return hf.InternVLProcessor(
        hf.GotOcr2ImageProcessor(
            size={"height": 28, "width": 28}, crop_to_patches=True, max_patches=4
        ),
        tokenizer(
            kind,
            eos_token="<|im_end|>",
            extra_special_tokens={
                "start_image_token": "<img>",
                "end_image_token": "</img>",
                "context_image_token": "<IMG_CONTEXT>",
                "video_token": "<video>",
            },
        ),
        hf.InternVLVideoProcessor(),
        image_seq_length=4,
        chat_template=template,
    )


def _gemma3(kind: str, template: str | None) -> Any:
    import transformers as hf

    return hf.Gemma3Processor(
        hf.Gemma3ImageProcessor(size={"height": 28, "width": 28}),
        tokenizer(
            kind,
            extra_special_tokens={
                "image_token": "<image_soft_token>",
                "boi_token": "<start_of_image>",
                "eoi_token": "<end_of_image>",
            },
        ),
        chat_template=template,
        image_seq_length=4,
    )


def _paligemma(kind: str, template: str | None) -> Any:
    import transformers as hf

    images = hf.SiglipImageProcessor(size={"height": 28, "width": 28})
    images.image_seq_length = 4
    words = tokenizer(kind, extra_special_tokens={"image_token": "<image>"})
    return hf.PaliGemmaProcessor(images, words, chat_template=template)


@dataclass(frozen=True)
class Public:
    """One family as its repositories ship it.

    Attributes:
        stop: the token that ends an answer there.
        space: whether a space stands between the generation prompt and the answer.
        rewrites: whether earlier turns look otherwise once more follow.
    """

    make: Callable[[str, str | None], Any]
    template: str | None
    stop: str
    space: bool = False
    rewrites: bool = False

    def processor(self, kind: str) -> Any:
        return self.make(kind, self.template)


PUBLIC = {
    "llava-1.5": Public(_llava, LLAVA, "</s>", space=True),
    "llava, chatml of its own string": Public(_llava, OWN_STRING, "<|im_end|>"),
    "llava, qwen3": Public(_llava, QWEN3, "<|im_end|>"),
    "llava, llama 3": Public(_llava, LLAMA3, "<|eot_id|>"),
    "llava, prompt ends in a space": Public(_llava, SPACE_AT_THE_END, "</s>", rewrites=True),
    "tinyllava": Public(lambda kind, _: _llava(kind, tinyllava()), None, "</s>", space=True),
    "llava-next mistral": Public(_next, MISTRAL, "</s>", space=True),
    "llava-next vicuna": Public(_next, LLAVA, "</s>", space=True),
    "llava-next 34b": Public(
        lambda kind, template: _next(kind, template, eos_token="<|im_end|>"),
        NEXT_34B,
        "<|im_end|>",
    ),
    "llava-onevision": Public(_onevision, ONEVISION, "<|im_end|>"),
    "llava-onevision, spaced": Public(_onevision, ONEVISION_SPACED, "<|im_end|>", rewrites=True),
    "qwen2-vl": Public(lambda k, t: _qwen(k, t, "Qwen2VL"), QWEN_VL, "<|im_end|>"),
    "qwen2.5-vl": Public(lambda k, t: _qwen(k, t, "Qwen2_5_VL"), QWEN_VL, "<|im_end|>"),
    "qwen3-vl": Public(lambda k, t: _qwen(k, t, "Qwen3VL"), QWEN3_VL, "<|im_end|>"),
    "smolvlm": Public(
        lambda k, t: _idefics(k, t, "SmolVLM"), SMOLVLM, "<end_of_utterance>", space=True
    ),
    "idefics3": Public(
        lambda k, t: _idefics(k, t, "Idefics3"), SMOLVLM, "<end_of_utterance>", space=True
    ),
    "internvl": Public(_internvl, INTERNVL, "<|im_end|>"),
    "gemma3": Public(_gemma3, GEMMA3, "<end_of_turn>"),
    "paligemma": Public(_paligemma, None, "</s>"),
}


def image(colour: str = "red", size: tuple[int, int] = (70, 40)) -> Image.Image:
    return Image.new("RGB", size, colour)
