"""support/tokenizer.py: our tokenizers against tiktoken, `tokenizers` and transformers."""

import json
import re
import types

import pytest
import tiktoken
import tokenizers
from conftest import STORIES, prepared, random_texts
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from support.settings import UserError
from support.tokenizer import END_OF_TEXT, Tokenizer, spec_of_tiktoken, split_long_words, train_bpe

STORY = "Once upon a time, there was a fox. It said: 'I'll go!'\n\nÜber naïve café 12345 Ω \t a  — 你好 🦊"


def trained(size=400):
    return Tokenizer(train_bpe([STORY * 3, "the fox and the crow and the fox"], size))


def hf_ids(tokenizer, text):
    hf = tokenizers.Tokenizer.from_str(json.dumps(tokenizer.spec))
    hf.encode_special_tokens = True
    return hf.encode(text, add_special_tokens=False).ids


def mini_tiktoken(pattern):
    """Return an encoding like tiktoken's own, with the vocabulary of trained()."""
    ranks = trained().bpe._mergeable_ranks
    return tiktoken.Encoding("mini", pat_str=pattern, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: len(ranks)})


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_any_text_survives_a_round_trip(text):
    tokenizer = trained()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eot not in ids
    assert list(ids) == hf_ids(tokenizer, text)


def test_special_tokens_in_text_are_text():
    tokenizer = trained()
    text = f"a {END_OF_TEXT} b"
    assert tokenizer.eot not in tokenizer.encode(text) and tokenizer.decode(tokenizer.encode(text)) == text


def test_gpt2_equals_tiktoken(needs_gpt2, tinystories, tmp_path):
    tokenizer, oracle = Tokenizer(spec_of_tiktoken(tiktoken.get_encoding("gpt2"))), tiktoken.get_encoding("gpt2")
    stories = tinystories.read_text()[:1_000_000].replace(END_OF_TEXT, "")
    assert tokenizer.vocab_size == 50257 and tokenizer.eot == 50256
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in [stories, STORY, *random_texts(1000)]:
        ids = oracle.encode_ordinary(text)
        assert tokenizer.encode(text).tolist() == ids
        assert theirs(text, split_special_tokens=True).input_ids == [tokenizer.bos, *ids]
        assert theirs.decode(ids) == text


@pytest.mark.parametrize("name", ["gpt2", "cl100k_base", "o200k_base"])
@settings(max_examples=150, deadline=None)
@given(text=st.text(st.characters(codec="utf-8") | st.sampled_from("aA1 \n\t'.s")))
def test_patterns_of_tiktoken_survive_the_conversion(name, text):
    """Each encoding's way to split words is the same in tiktoken, and in our tokenizer.json that tiktoken or
    `tokenizers` runs."""
    constructor = getattr(__import__("tiktoken_ext.openai_public", fromlist=[name]), name)
    oracle = mini_tiktoken(pattern_of(constructor))
    ours = Tokenizer(spec_of_tiktoken(oracle))
    assert ours.bpe is not None
    assert list(ours.encode(text)) == oracle.encode_ordinary(text) == hf_ids(ours, text)


def pattern_of(constructor):
    """Return the regex of a tiktoken encoding, without the download of its vocabulary."""
    fake = {"load_tiktoken_bpe": lambda *a, **k: {}, "data_gym_to_mergeable_bpe_ranks": lambda *a, **k: {}}
    return types.FunctionType(constructor.__code__, {**constructor.__globals__, **fake})()["pat_str"]


def test_a_trained_tokenizer_has_the_requested_size():
    tokenizer = trained(300)
    assert tokenizer.vocab_size == 300 and tokenizer.eot == 299


def test_gemmas_tokenizer_runs_through_tokenizers(gemma):
    """It is a BPE with byte fallback, has underlines for spaces, added tokens that are not special, and special tokens
    without a row in the embedding."""
    ours, theirs = Tokenizer.load(gemma), AutoTokenizer.from_pretrained(gemma)
    assert ours.bpe is None and (ours.eot, ours.bos, ours.pad) == (1, 2, 0)
    assert ours.vocab_size <= json.loads((gemma / "config.json").read_text())["vocab_size"]
    for text in ["A fox.\n\nHello wörld 🦆\n <eos>x<end_of_turn> y", "", " ", "\n\n\n", *random_texts(300)]:
        ids = ours.encode(text)
        assert ids.tolist() == theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert ours.decode(ids) == theirs.decode(ids)
        assert not {1, 2, 482} & set(ids.tolist())


def test_a_tokenizer_saved_with_truncation_truncates_nothing(gemma, tmp_path):
    theirs = AutoTokenizer.from_pretrained(gemma)
    theirs("a", truncation=True, max_length=8, padding="max_length")
    theirs.save_pretrained(tmp_path)
    assert '"max_length": 8' in (tmp_path / "tokenizer.json").read_text()
    text = "Once upon a time there was a fox. " * 9
    assert Tokenizer.load(tmp_path).encode(text).tolist() == Tokenizer.load(gemma).encode(text).tolist()


def test_an_old_tokenizer_without_a_model_type_is_read():
    tokenizer = trained()
    old = Tokenizer(tokenizer.spec | {"model": {k: v for k, v in tokenizer.spec["model"].items() if k != "type"}})
    assert old.bpe and old.encode(STORY).tolist() == tokenizer.encode(STORY).tolist()


def test_documents_encoded_together_equal_documents_encoded_one_by_one():
    tokenizer = trained()
    for texts in (STORIES, [*STORIES, f"an {END_OF_TEXT} in a text"]):
        expected = [i for text in texts for i in [*tokenizer.encode(text), tokenizer.eot]]
        assert tokenizer.encode_documents(texts).tolist() == expected


def with_added(*contents, **changes):
    """Return the small tokenizer with tokens that are not special, numbered after its own."""
    spec = trained().spec
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    first = 1 + max(token["id"] for token in spec["added_tokens"])
    added = [{"id": first + i, "content": content, **flags} for i, content in enumerate(contents)]
    return spec | {"added_tokens": spec["added_tokens"] + added} | changes


def test_added_tokens_that_are_not_special_are_found_in_text():
    """tokenizer.add_tokens() makes them. They were cut into pieces, and drawing one of their ids was a KeyError."""
    tokenizer = Tokenizer(with_added("    ", "[ADA]"))
    text = "    [ADA] said hi"
    ids = tokenizer.encode(text).tolist()
    first = tokenizer.eot + 1
    assert ids == hf_ids(tokenizer, text) and ids[:2] == [first, first + 1] and tokenizer.decode(ids) == text


LLAMA = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True}
REPLACE = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
STRIPPING = {"type": "Sequence", "decoders": [REPLACE, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}


@pytest.mark.parametrize(
    "changes",
    [
        {"pre_tokenizer": LLAMA, "decoder": STRIPPING},
        {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}},
        {"normalizer": {"type": "Prepend", "prepend": "_"}},
        {"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}},
    ],
)
def test_a_tokenizer_that_cannot_continue_a_text_is_refused(changes):
    """Words were joined where a decoder strips the space at the start of a text, as Llama 2's does."""
    with pytest.raises(ValueError, match="so a text cannot be continued"):
        Tokenizer(with_added(**changes))


@pytest.mark.parametrize("post_processor", [None, {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False,
                                                  "use_regex": True}])  # fmt: skip
@pytest.mark.parametrize("saved_class", [None, "GPT2Tokenizer"])
def test_transformers_begins_a_text_with_the_token_that_sample_begins_with(tmp_path, post_processor, saved_class):
    """GPT-2's own post-processor adds no token, so AutoTokenizer on our export began without one."""
    tokenizer = Tokenizer(
        with_added(post_processor=post_processor), {"tokenizer_class": saved_class} if saved_class else {}
    )
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)("the fox").input_ids
    assert theirs == [tokenizer.bos, *tokenizer.encode("the fox")]
    Tokenizer.load(tmp_path).save(tmp_path)  # and once more changes nothing
    assert AutoTokenizer.from_pretrained(tmp_path)("the fox").input_ids == theirs


@pytest.mark.parametrize("sign", [" ", "\n", "a", "7", "^", "_", "\u3000", "你"])
def test_a_giant_word_is_encoded_in_no_time(sign):
    """A million letters took hours, and a million spaces ended in "Max stack size exceeded"."""
    tokenizer, text = trained(), "the fox" + sign * 300_000 + "the crow"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(tokenizer.encode_documents([text, "the fox"])) == text + "the fox"
    train_bpe([text, STORY], 300)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(alphabet="ab \n.7_é你", min_size=1, max_size=900), min_size=5, max_size=20))
def test_a_long_text_of_ordinary_words_is_not_cut(parts):
    text = ". ".join(parts)
    assert split_long_words(text) == [text]


def test_a_tokenizer_larger_than_the_embedding_is_refused():
    tokenizer = Tokenizer(with_added("<hero>"))
    tokenizer.check_rows(tokenizer.vocab_size)
    with pytest.raises(UserError, match=f"{tokenizer.eot + 2} entries do not fit into vocab_size={tokenizer.eot + 1}"):
        tokenizer.check_rows(tokenizer.eot + 1)


def test_an_added_token_that_other_programs_would_number_otherwise_is_refused():
    spec = with_added("<hero>")
    spec["added_tokens"][-1]["id"] += 5
    with pytest.raises(ValueError, match=r"'<hero>' has the id .* but other programs read"):
        Tokenizer(spec)


@pytest.mark.parametrize(
    "changes, config, message",
    [
        ({"model": {"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0]]}}, {}, "of the kind Unigram"),
        ({}, {"eos_token": "the"}, "eos_token='the' is no special token"),
        ({}, {"bos_token": {"content": "[BOS]"}}, "is no special token"),
    ],
)
def test_a_tokenizer_whose_own_words_contradict_it_is_refused(changes, config, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Tokenizer(trained().spec | changes, config)


def test_a_pattern_that_skips_characters_is_not_run_by_tiktoken_unnoticed(workspace, capsys):
    spec = trained().spec
    split = {"type": "Split", "pattern": {"Regex": r" ?\p{L}+| ?\p{N}+|."}, "behavior": "Isolated", "invert": False}
    byte_level = spec["pre_tokenizer"] | {"use_regex": False}
    spec = spec | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]}}
    (workspace / "tok.json").write_text(json.dumps(spec))
    (workspace / "c.jsonl").write_text("".join(json.dumps({"text": f"a fox\nand a crow {i}"}) + "\n" for i in range(9)))
    _, meta = prepared(dataset="c.jsonl", tokenizer="tok.json", val_fraction=0.3)
    assert meta["train"]["changed"] + meta["val"]["changed"] == 9 and "9 by the tokenizer" in capsys.readouterr().out
