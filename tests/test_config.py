"""Configurations: what is read from `config.json`, and the sentence for each way it can be wrong."""

import copy
import re

import pytest
import released
import tiny

from pvm_jax.config import ConfigError, ModelConfig, read_json


def changed(path: str, value, config: dict) -> dict:
    """A copy of `config` with one dotted key replaced, or removed if `value` is `...`."""
    config = copy.deepcopy(config)
    *sections, key = path.split(".")
    section = config
    for name in sections:
        section = section[name]
    if value is ...:
        del section[key]
    else:
        section[key] = value
    return config


def test_rope_settings_of_old_and_new_files_read_alike():
    old = tiny.hf_config()
    new = copy.deepcopy(old)
    theta = new["text_config"].pop("rope_theta")
    new["text_config"]["rope_parameters"] = new["text_config"].pop("rope_scaling") | {"rope_theta": theta}
    assert ModelConfig.from_hf(old) == ModelConfig.from_hf(new)
    assert ModelConfig.from_hf(old).text.rope_theta == 5e6


@pytest.mark.parametrize(("size", "head", "kv", "ffn"), [("8B", 4, 1, 1536), ("4B", 4, 1, 1945)], ids=["8B", "4B"])
def test_pvm_sizes_follow_from_the_text_model(size, head, kv, ffn):
    pvm = ModelConfig.from_hf(released.hf_config(size, pvm=True)).pvm
    assert (pvm.num_heads, pvm.num_key_value_heads, pvm.head_dim, pvm.intermediate_size) == (head, kv, 128, ffn)
    assert pvm.memory_mask == "all", "a checkpoint without the key is the public release's"
    assert pvm.slots == 0


def test_no_pvm_layers_is_a_stock_model():
    assert ModelConfig.from_hf(released.hf_config("2B")).pvm is None
    assert ModelConfig.from_hf(changed("text_config.pvm_layers", [], tiny.hf_config())).pvm is None


def test_layer_groups_separate_deepstack_plain_and_pvm_layers():
    groups = ModelConfig.from_hf(released.hf_config("8B", pvm=True)).layer_groups()
    assert [(g[0], g[-1]) for g in groups] == [
        (0, 2), (3, 7), (8, 8), (9, 15), (16, 16), (17, 23), (24, 24), (25, 35)
    ]  # fmt: skip
    tiny_config = ModelConfig.from_hf(tiny.hf_config(pvm_layers=(1, 4)))
    assert tiny_config.layer_groups() == ((0,), (1,), (2, 3), (4,), (5,))
    assert tiny_config.layer_groups(scan=False) == ((0,), (1,), (2,), (3,), (4,), (5,))


def test_adjacent_pvm_layers_stay_apart():
    config = ModelConfig.from_hf(tiny.hf_config(pvm_layers=(3, 4)))
    assert config.layer_groups() == ((0, 1), (2,), (3,), (4,), (5,))


PVM = tiny.hf_config(pvm_layers=(1, 4))
BROKEN = {
    "another architecture": ("model_type", "qwen2_vl", "model_type: expected 'qwen3_vl', got 'qwen2_vl'"),
    "mixture of experts": ("model_type", "qwen3_vl_moe", "mixture-of-experts sizes are not supported yet"),
    "no text section": ("text_config", ..., "text_config: expected an object, got None"),
    "missing key": ("text_config.hidden_size", ..., "text_config.hidden_size: expected int, found nothing"),
    "wrong type": ("text_config.vocab_size", "544", "text_config.vocab_size: expected int, got '544'"),
    "boolean as number": ("vision_config.depth", True, "vision_config.depth: expected int, got True"),
    "negative": ("vision_config.depth", -1, "vision_config.depth: expected a number of at least 0, got -1"),
    "missing token id": ("image_token_id", ..., "image_token_id: expected int, found nothing"),
    "rope type": (
        "text_config.rope_scaling.rope_type", "yarn", "rope_parameters.rope_type: expected 'default', got 'yarn'",
    ),
    "no rope base": ("text_config.rope_theta", ..., "text_config.rope_theta: expected float, found nothing"),
    "mrope sections": (
        "text_config.rope_scaling.mrope_section", [24, 20, 20],
        "mrope_section: expected three sizes that add up to head_dim / 2 = 8, got [24, 20, 20]",
    ),
    "attention biases": ("text_config.attention_bias", True, "no Qwen3-VL has attention biases"),
    "text activation": ("text_config.hidden_act", "gelu", "text_config.hidden_act: expected 'silu', got 'gelu'"),
    "kv heads": (
        "text_config.num_key_value_heads", 3,
        "num_key_value_heads: expected a divisor of num_attention_heads = 4, got 3",
    ),
    "vision activation": ("vision_config.hidden_act", "gelu", "hidden_act: expected 'gelu_pytorch_tanh', got 'gelu'"),
    "vision heads": ("vision_config.num_heads", 3, "num_heads: expected a divisor of hidden_size = 32"),
    "tap beyond the tower": (
        "vision_config.deepstack_visual_indexes", [0, 4],
        "deepstack_visual_indexes: expected increasing blocks below depth = 4, got [0, 4]",
    ),
    "taps out of order": ("vision_config.deepstack_visual_indexes", [2, 0], "expected increasing blocks"),
    "taps not a list": ("vision_config.deepstack_visual_indexes", 2, "expected a list of integers, got 2"),
    "more taps than layers": ("text_config.num_hidden_layers", 1, "expected at most 1 entries"),
    "position table": ("vision_config.num_position_embeddings", 60, "expected a square number, got 60"),
    "widths disagree": (
        "vision_config.out_hidden_size", 96, "out_hidden_size: expected text_config.hidden_size = 64, got 96",
    ),
    "pvm layer out of range": (
        "text_config.pvm_layers", [1, 6], "pvm_layers: expected different layers from 0 to 5, got [1, 6]",
    ),
    "pvm layer twice": ("text_config.pvm_layers", [1, 1], "expected different layers from 0 to 5, got [1, 1]"),
    "pvm layers not integers": ("text_config.pvm_layers", "1,4", "expected a list of integers, got '1,4'"),
    "pvm width": (
        "text_config.pvm_hidden_size", 40,
        "pvm_hidden_size: expected a multiple of head_dim = 16 (each PVM head is one head wide), got 40",
    ),
    "no pvm width": ("text_config.pvm_hidden_size", ..., "pvm_hidden_size: expected int, found nothing"),
    "pvm heads": ("text_config.pvm_hidden_size", 80, "expected PVM heads divisible by its KV heads, got 5 and 2"),
    "memory mask": (
        "text_config.pvm_memory_mask", "none",
        "pvm_memory_mask: expected one of ['all', 'causal'], got 'none'",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("path", "value", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_each_mistake_has_its_sentence(path, value, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        ModelConfig.from_hf(changed(path, value, PVM), "some/config.json")
    assert str(error.value).startswith("some/config.json: "), "the file is named first"
    assert "\n" not in str(error.value)


def test_files_that_are_no_json_object(tmp_path):
    file = tmp_path / "config.json"
    with pytest.raises(ConfigError, match="expected a file, found none; is this a model directory"):
        ModelConfig.load(tmp_path)
    file.write_text('{"model_type": ')
    with pytest.raises(ConfigError, match="expected JSON, but it does not parse"):
        read_json(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="expected JSON, but it does not parse"):
        read_json(file)
    file.write_text("[1]")
    with pytest.raises(ConfigError, match="expected a JSON object, got list"):
        read_json(file)
