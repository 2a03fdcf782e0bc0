from __future__ import annotations

import threading
from pathlib import Path

import gguf
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from coral_spec.targets import load_target
from coral_spec.targets.gguf import _vocabulary, known_architectures, restore_merges, settle_tokenizer
from coral_spec.targets.load import prepare_gguf
from expkit.errors import UsageError
from making import make_gguf
from tiny import tiny_tokenizer


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CORAL_SPEC_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def leftovers(home: Path) -> list[Path]:
    return [*home.glob("models/.tmp-*"), *home.glob("tmp/*")]


def test_a_gguf_file_becomes_the_same_model(tmp_path: Path) -> None:
    made = make_gguf(tmp_path / "tiny.gguf")
    loaded = load_target(str(tmp_path / "tiny.gguf"), device="cpu", dtype="bf16")
    tokens = torch.tensor([made.encode("what is the time?")])
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(tokens).logits, made.model(tokens).logits)
    for key in ("rms_norm_eps", "rope_parameters", "max_position_embeddings", "tie_word_embeddings", "vocab_size"):
        ours, theirs = getattr(loaded.model.config, key), getattr(made.model.config, key)
        assert ours == (pytest.approx(theirs) if isinstance(theirs, float) else theirs), key
    assert loaded.eos_token_ids == made.eos_token_ids
    assert loaded.encode("what is the time?") == made.encode("what is the time?")
    assert loaded.encode("the time", chat=False) == made.encode("the time", chat=False)


def test_configuration_files_beside_a_gguf_file_are_not_mixed_in(tmp_path: Path) -> None:
    make_gguf(tmp_path / "tiny.gguf")
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        (tmp_path / name).write_text('{"eos_token_id": 7, "model_type": "gpt2", "eos_token": "x"}')
    target = load_target(str(tmp_path / "tiny.gguf"), device="cpu")
    assert (target.model.config.model_type, target.eos_token_ids) == ("llama", (2,))


def test_a_gguf_file_is_converted_once_and_again_when_it_changes(tmp_path: Path, home: Path) -> None:
    make_gguf(tmp_path / "tiny.gguf")
    folder = prepare_gguf(tmp_path / "tiny.gguf")
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert prepare_gguf(tmp_path / "tiny.gguf") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    make_gguf(tmp_path / "tiny.gguf", seed=1)
    assert prepare_gguf(tmp_path / "tiny.gguf") != folder
    assert leftovers(home) == []


def test_two_preparations_at_once_both_get_the_whole_model(tmp_path: Path, home: Path) -> None:
    make_gguf(tmp_path / "tiny.gguf")
    folders: list[Path] = []
    threads = [threading.Thread(target=lambda: folders.append(prepare_gguf(tmp_path / "tiny.gguf"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folders) == 2 and folders[0] == folders[1]
    assert list((home / "models").iterdir()) == [folders[0]]


def test_an_unknown_architecture_is_refused_with_the_known_ones(tmp_path: Path, home: Path) -> None:
    make_gguf(tmp_path / "odd.gguf", architecture="rwkv7")
    with pytest.raises(UsageError, match=r'"rwkv7" is not known; known are .*gemma3, .*llama, .*qwen3') as caught:
        load_target(str(tmp_path / "odd.gguf"))
    assert "\n" not in str(caught.value)
    assert {"llama", "qwen2", "qwen3", "gemma3", "mistral"} <= set(known_architectures())
    assert not list(home.glob("models/*"))


@pytest.mark.parametrize("kept", [0, 3, 20, 60, 0.5, 0.97])
def test_a_truncated_gguf_file_is_refused_and_leaves_nothing(tmp_path: Path, home: Path, kept: float) -> None:
    path = tmp_path / "tiny.gguf"
    make_gguf(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    with pytest.raises(UsageError, match=r"GGUF|damaged") as caught:
        load_target(str(path))
    assert "\n" not in str(caught.value)
    assert not list(home.glob("models/*")) and leftovers(home) == []


def test_a_file_that_only_claims_to_be_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + b"\xff" * 400)
    with pytest.raises(UsageError, match="not a readable GGUF"):
        load_target(str(tmp_path / "a.gguf"))


def test_the_header_settles_the_tokenizer() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = tokenizer.bos_token = "<|im_start|>"
    tokenizer.backend_tokenizer.decoder = decoders.Metaspace()
    names = {"model": "gpt2", "pre": "smollm", "bos_token_id": 1, "eos_token_id": 2, "padding_token_id": 2}
    settle_tokenizer(tokenizer, {f"tokenizer.ggml.{name}": value for name, value in names.items()})
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.decode(tokenizer("a  12 \u00e9")["input_ids"]) == "a  12 \u00e9"


def test_smollm_cuts_digits_apart_before_anything_else() -> None:
    tokenizer = tiny_tokenizer()
    settle_tokenizer(tokenizer, {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm"})
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a  12")
    assert [piece for piece, _ in pieces] == ["a", "\u0120\u0120", "1", "2"]


def sentencepiece(merges: list[tuple[str, str]]) -> tuple[PreTrainedTokenizerFast, list[tuple[str, int]]]:
    """A tokenizer as a loader makes it of a vocabulary, and the vocabulary as a GGUF file lists it."""
    special = {"<pad>": 3, "<bos>": 3, "<unk>": 3, "<turn>": 4, "<mask>": 3, "  ": 4}
    pieces = [*special, "he", "ll", "hell", "hello", "hel", "llo", "\u2581", "h", "e", "l", "o"]
    ids = {piece.replace(" ", "\u2581"): index for index, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>")
    return tokenizer, [(piece, special.get(piece, 1)) for piece in pieces]


HEADER = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.bos_token_id": 1}


def test_lost_merges_and_special_tokens_are_restored() -> None:
    tokenizer, vocabulary = sentencepiece([])
    assert tokenizer.tokenize("hello") == [*"hello"]
    restore_merges(tokenizer, HEADER, lambda: vocabulary)
    assert tokenizer.tokenize("hello  <turn> hel") == ["hello", "\u2581\u2581", "<turn>", "\u2581", "hel"]
    assert tokenizer("hello")["input_ids"] == [1, vocabulary.index(("hello", 1))]
    assert tokenizer("o", "h")["input_ids"] == [1, 16, 1, 13]
    assert len(tokenizer) == len(vocabulary)
    ids = tokenizer("hello<turn><mask>")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == "hello<turn>"  # control tokens only


def test_merges_that_are_there_stay_and_a_file_may_forbid_the_first_token() -> None:
    tokenizer, vocabulary = sentencepiece([("h", "e")])
    restore_merges(tokenizer, {**HEADER, "tokenizer.ggml.add_bos_token": False}, lambda: pytest.fail("was read"))
    assert tokenizer("hello")["input_ids"] == [vocabulary.index((each, 1)) for each in ("he", "l", "l", "o")]


def test_a_first_token_that_is_there_stays_with_what_comes_last() -> None:
    tokenizer, vocabulary = sentencepiece([("h", "e")])
    ends = processors.TemplateProcessing(single="<bos> $A <turn>", special_tokens=[("<bos>", 1), ("<turn>", 3)])
    tokenizer.backend_tokenizer.post_processor = ends
    restore_merges(tokenizer, HEADER, lambda: pytest.fail("was read"))
    assert tokenizer("he")["input_ids"] == [1, vocabulary.index(("he", 1)), 3]


def test_byte_level_vocabularies_are_left_alone() -> None:
    tokenizer, _ = sentencepiece([])
    restore_merges(tokenizer, {**HEADER, "tokenizer.ggml.model": "gpt2"}, lambda: pytest.fail("was read"))
    assert tokenizer("o")["input_ids"] == [tokenizer.convert_tokens_to_ids("o")]


@pytest.mark.parametrize("types", [[3, 1, 4], None])
def test_pieces_come_with_their_types_where_the_file_has_them(tmp_path: Path, types: list[int] | None) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_token_list(["<s>", "a", "  "])
    if types:
        writer.add_token_types(types)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert _vocabulary(tmp_path / "a.gguf") == list(zip(["<s>", "a", "  "], types or [1, 1, 1], strict=True))
