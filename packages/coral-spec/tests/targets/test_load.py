from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from coral_spec.targets import load_target
from coral_spec.targets.target import Target
from expkit.errors import UsageError
from tiny import ARCHITECTURES, tiny_target


def save(target: Target, folder: Path) -> Path:
    target.model.save_pretrained(folder)
    target.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_target("llama"), tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def damaged(llama: Path, tmp_path: Path) -> Path:
    """A copy of a good folder, to be damaged."""
    for file in llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def load(folder: Path | str, **options: str) -> Target:
    return load_target(str(folder), device="cpu", **{"dtype": "fp32", **options})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_folder_loads_as_it_was_saved(architecture: str, tmp_path: Path) -> None:
    made = tiny_target(architecture)
    loaded = load(save(made, tmp_path))
    tokens = torch.randint(3, 259, (1, 40), generator=torch.Generator().manual_seed(0))  # longer than the window
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(tokens).logits, made.model(tokens).logits)
    assert type(loaded.model) is type(made.model)
    assert loaded.eos_token_ids == made.eos_token_ids
    if architecture != "qwen2":  # transformers adds a token of its own to every Qwen2 vocabulary that it loads
        assert loaded.tokenizer_hash == made.tokenizer_hash
    assert loaded.encode("hello there") == made.encode("hello there")
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


@pytest.mark.parametrize("architecture", ["qwen2", "gemma3"])
def test_a_tied_head_stays_tied(architecture: str, tmp_path: Path) -> None:
    model = load(save(tiny_target(architecture), tmp_path), dtype="bf16").model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_gemma_keeps_its_layer_pattern_and_scales_its_embeddings(tmp_path: Path) -> None:
    model = load(save(tiny_target("gemma3"), tmp_path)).model
    assert model.config.layer_types == ["sliding_attention", "full_attention"]
    embedding = model.get_input_embeddings()
    ratio = embedding(torch.tensor([5])) / embedding.weight[5]
    torch.testing.assert_close(ratio, torch.full_like(ratio, model.config.hidden_size**0.5))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_is_as_asked(llama: Path, attention: str) -> None:
    assert load(llama, attention=attention).model.config._attn_implementation == attention


def test_dtype_is_as_asked(llama: Path) -> None:
    target = load(llama, dtype="bf16")
    assert target.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in target.model.parameters()} == {torch.bfloat16}


def test_an_unknown_attention_is_refused(llama: Path) -> None:
    with pytest.raises(UsageError, match="sdpa, eager"):
        load(llama, attention="flash")


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "no such thing", "missing.gguf"])
def test_a_path_that_does_not_exist_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        load(name)


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.bin"
    file.write_bytes(b"x")
    with pytest.raises(UsageError, match="is a file"):
        load(file)


def test_a_folder_without_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no config\.json"):
        load(tmp_path)


def test_a_damaged_configuration_is_refused(damaged: Path) -> None:
    (damaged / "config.json").write_text("{")
    with pytest.raises(UsageError, match=r"config\.json cannot be used"):
        load(damaged)


def test_code_of_a_repository_is_never_run(damaged: Path) -> None:
    config = json.loads((damaged / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (damaged / "config.json").write_text(json.dumps(config))
    (damaged / "own.py").write_text("raise SystemExit('code of the repository ran')")
    with pytest.raises(UsageError, match=r"config\.json cannot be used"):
        load(damaged)


def test_truncated_weights_are_refused(damaged: Path) -> None:
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UsageError, match="weights are damaged"):
        load(damaged)


def test_garbage_for_weights_is_refused(damaged: Path) -> None:
    (damaged / "model.safetensors").write_bytes(b"\x00" * 1000)
    with pytest.raises(UsageError, match="weights are damaged"):
        load(damaged)


def test_missing_weights_are_refused_and_not_made_up(damaged: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(damaged / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match=r"1 weights are missing .*layers\.1\.mlp\.up_proj"):
        load(damaged)


def test_weights_of_another_width_are_refused(damaged: Path) -> None:
    config = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises(UsageError, match="do not fit"):
        load(damaged)


def test_pickled_weights_are_not_read(damaged: Path) -> None:
    from safetensors.torch import load_file

    torch.save(load_file(damaged / "model.safetensors"), damaged / "pytorch_model.bin")
    (damaged / "model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"no \.safetensors"):
        load(damaged)


def test_a_folder_without_tokenizer_is_refused(damaged: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (damaged / name).unlink()
    with pytest.raises(UsageError, match="tokenizer"):
        load(damaged)


SMALL = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1}
BERT = BertConfig(**SMALL, num_attention_heads=2, intermediate_size=16)
T5 = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
OTHERS = {
    "an encoder": (lambda: BertForMaskedLM(BERT), "BertForMaskedLM"),
    "an encoder-decoder": (lambda: T5ForConditionalGeneration(T5), "expected a decoder-only"),
    "a recurrent model": (lambda: MambaForCausalLM(MambaConfig(**SMALL, state_size=4)), "attention layers only"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_decoder_with_attention_is_refused(kind: str, tmp_path: Path) -> None:
    make, words = OTHERS[kind]
    make().save_pretrained(tmp_path)
    tiny_target().tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=words):
        load(tmp_path)


def test_a_repository_that_is_not_cached_names_the_way_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="hf download nobody/nothing-at-all"):
        load("nobody/nothing-at-all")
