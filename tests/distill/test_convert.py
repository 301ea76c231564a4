"""TinyLLaVA checkpoints become transformers' LLaVA."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from kd_bench.distill.build import (
    convert_tinyllava,
    from_tinyllava_key,
)
from kd_bench.distill.models import load_model, load_processor
from kd_bench.errors import UsageError
from tests.support import tiny


@pytest.fixture(scope="module")
def tinyllava(tmp_path_factory):
    """A tiny TinyLLaVA checkpoint in its own names, written by hand from random weights."""
    folder = tmp_path_factory.mktemp("source") / "tinyllava"
    folder.mkdir()
    from transformers import Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(0)
    whole = tiny.model(rows=32)
    vision, text = whole.config.vision_config, whole.config.text_config
    assert isinstance(vision, SiglipVisionConfig)
    assert isinstance(text, Qwen2Config)
    eyes, language = SiglipVisionModel(vision), Qwen2ForCausalLM(text)
    tensors = {
        f"vision_tower._vision_tower.vision_model.{name.removeprefix('vision_model.')}": tensor
        for name, tensor in eyes.state_dict().items()
    }
    for name, tensor in language.state_dict().items():
        if name != "lm_head.weight":  # tied
            tensors[f"language_model.{name}"] = tensor
    for layer, shape in (("0", (32, 16)), ("2", (32, 32))):
        tensors[f"connector._connector.{layer}.weight"] = torch.randn(shape)
        tensors[f"connector._connector.{layer}.bias"] = torch.randn(32)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()},
              folder / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
    config = {
        "model_type": "tinyllava",
        "connector_type": "mlp2x_gelu",
        "image_aspect_ratio": "square",
        "image_token_index": -200,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "patch",
        "text_config": text.to_dict(),
        "vision_config": {**vision.to_dict(), "model_name_or_path": "somewhere"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    without_image_token().save_pretrained(folder)
    return folder


def without_image_token():
    """A language model's tokenizer, which knows nothing of pictures."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(
        models.WordLevel(
            {"<pad>": 0, "</s>": 1, "<unk>": 2, **{w: 3 + i for i, w in enumerate(tiny.WORDS)}},
            unk_token="<unk>",
        )
    )
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def test_keys_get_transformers_names():
    pairs = {
        "vision_tower._vision_tower.vision_model.embeddings.patch_embedding.weight": (
            "vision_tower.vision_model.embeddings.patch_embedding.weight"
        ),
        "connector._connector.0.weight": "multi_modal_projector.linear_1.weight",
        "connector._connector.2.bias": "multi_modal_projector.linear_2.bias",
        "language_model.model.layers.0.mlp.up_proj.weight": (
            "language_model.model.layers.0.mlp.up_proj.weight"
        ),
        "language_model.lm_head.weight": "language_model.lm_head.weight",
    }
    for theirs, ours in pairs.items():
        assert from_tinyllava_key(theirs) == ours
    for unknown in ("connector._connector.1.weight", "vision_tower2.x", "other"):
        with pytest.raises(UsageError, match="has no place"):
            from_tinyllava_key(unknown)


def reference_logits(folder, ids, pixels):
    """TinyLLaVA's own arithmetic: last layer but one, first patch dropped, two-layer connector."""
    from transformers import Qwen2ForCausalLM, SiglipVisionModel

    tensors = load_file(folder / "model.safetensors")
    whole = tiny.model(rows=32)
    eyes = SiglipVisionModel(whole.config.vision_config).eval()
    prefix = "vision_tower._vision_tower.vision_model."
    names = set(eyes.state_dict())
    eyes.load_state_dict(
        {
            (k if (k := name.removeprefix(prefix)) in names else f"vision_model.{k}"): tensor
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }
    )
    language = Qwen2ForCausalLM(whole.config.text_config).eval()
    language.load_state_dict(
        {
            name.removeprefix("language_model."): tensor
            for name, tensor in tensors.items()
            if name.startswith("language_model.")
        },
        strict=False,
    )
    language.tie_weights()
    with torch.no_grad():
        seen = eyes(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        for layer in ("0", "2"):
            weight, bias = (
                tensors[f"connector._connector.{layer}.{n}"] for n in ("weight", "bias")
            )
            seen = seen @ weight.T + bias
            if layer == "0":
                seen = torch.nn.functional.gelu(seen)
        before, after = ids[: ids.index(-200)], ids[ids.index(-200) + 1 :]
        embed = language.get_input_embeddings()
        parts = [embed(torch.tensor([before])), seen, embed(torch.tensor([after]))]
        return language(inputs_embeds=torch.cat(parts, dim=1)).logits[0]


def test_a_converted_model_computes_what_tinyllava_computes(tinyllava, tmp_path):
    converted = convert_tinyllava(tinyllava, tmp_path / "llava")
    model, processor = load_model(converted), load_processor(converted)
    assert model.config.image_seq_length == 3
    pixels = torch.randn(1, 3, 16, 16)
    ids = [4, 7, -200, 12, 13]
    expanded = [
        token for i in ids for token in ([model.config.image_token_id] * 3 if i < 0 else [i])
    ]
    with torch.no_grad():
        found = model(input_ids=torch.tensor([expanded]), pixel_values=pixels).logits[0]
    torch.testing.assert_close(
        found, reference_logits(tinyllava, ids, pixels), atol=1e-5, rtol=1e-5
    )
    made = processor(text="user : <image> say it", images=tiny.picture("red", 40))
    assert sum(token == model.config.image_token_id for token in made["input_ids"][0]) == 3
    assert processor.image_processor.resample == 3
    assert "ASSISTANT:" in processor.chat_template


def test_every_weight_is_copied_byte_for_byte(tinyllava, tmp_path):
    converted = convert_tinyllava(tinyllava, tmp_path / "llava")
    before, after = (load_file(folder / "model.safetensors") for folder in (tinyllava, converted))
    assert {from_tinyllava_key(name) for name in before} == set(after)
    for name, tensor in before.items():
        found = after[from_tinyllava_key(name)]
        assert tensor.dtype == found.dtype
        assert torch.equal(tensor, found)


def test_pictures_are_padded_where_the_config_says_so(tinyllava, tmp_path):
    import shutil

    source = shutil.copytree(tinyllava, tmp_path / "source")
    config = json.loads((source / "config.json").read_text()) | {"image_aspect_ratio": "pad"}
    (source / "config.json").write_text(json.dumps(config))
    processor = load_processor(convert_tinyllava(source, tmp_path / "out"))
    from PIL import Image

    wide = Image.new("RGB", (64, 16), "white")
    pixels = processor.image_processor(wide, return_tensors="pt")["pixel_values"][0]
    assert pixels.shape == (3, 16, 16)
    assert pixels[:, 0].abs().max() < 0.02  # grey bars above and below
    assert pixels[:, 8].min() > 0.9


@pytest.mark.parametrize(
    "change,message",
    [
        ({"model_type": "llava"}, "not a TinyLLaVA one"),
        ({"connector_type": "resampler"}, "connector 'resampler'"),
    ],
)
def test_what_cannot_be_converted_is_refused(tinyllava, tmp_path, change, message):
    config = json.loads((tinyllava / "config.json").read_text()) | change
    source = tmp_path / "source"
    source.mkdir()
    for file in tinyllava.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=message):
        convert_tinyllava(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_taken_destination_and_a_missing_source(tinyllava, tmp_path):
    with pytest.raises(UsageError, match="exists already"):
        convert_tinyllava(tinyllava, tmp_path)
    with pytest.raises(UsageError, match="There is no checkpoint"):
        convert_tinyllava(tmp_path / "absent", tmp_path / "out")
