"""prepare.py: tokenizers against tiktoken and transformers, corpora of every kind, and what must never be lost."""

import contextlib
import errno
import fcntl
import http.server
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tokenizers
from conftest import SHARED, publish_gemma, run_script
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

import prepare
from config import UserError
from prepare import END_OF_TEXT, Tokenizer, is_held_out, spec_of_tiktoken, train_bpe

STORY = "Once upon a time, there was a fox. It said: 'I'll go!'\n\nÜber naïve café 12345 Ω \t a  — 你好 🦊"


def trained(size=400):
    return Tokenizer(train_bpe([STORY * 3, "the fox and the crow and the fox"], size))


def hf_ids(tokenizer, text):
    hf = tokenizers.Tokenizer.from_str(json.dumps(tokenizer.spec))
    hf.encode_special_tokens = True
    return hf.encode(text, add_special_tokens=False).ids


def mini_tiktoken(pattern):
    """An encoding in the style of tiktoken's own, on the vocabulary of `trained`."""
    ranks = trained().bpe._mergeable_ranks
    return tiktoken.Encoding("mini", pat_str=pattern, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: len(ranks)})


# ----------------------------------------------------------------------------------------------------------------------
# tokenizers


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_round_trip_of_any_text(text):
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
    """The way each encoding cuts words, in tiktoken, in our tokenizer.json run by tiktoken and by tokenizers."""
    constructor = getattr(__import__("tiktoken_ext.openai_public", fromlist=[name]), name)
    oracle = mini_tiktoken(pattern_of(constructor))
    ours = Tokenizer(spec_of_tiktoken(oracle))
    assert ours.bpe is not None
    assert list(ours.encode(text)) == oracle.encode_ordinary(text) == hf_ids(ours, text)


def pattern_of(constructor):
    """A tiktoken encoding's regex, without the download of its vocabulary."""
    fake = {"load_tiktoken_bpe": lambda *a, **k: {}, "data_gym_to_mergeable_bpe_ranks": lambda *a, **k: {}}
    return types.FunctionType(constructor.__code__, {**constructor.__globals__, **fake})()["pat_str"]


def test_trained_size_is_the_size_asked_for():
    tokenizer = trained(300)
    assert tokenizer.vocab_size == 300 and tokenizer.eot == 299


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    return publish_gemma(tmp_path_factory.mktemp("gemma"), instructed=True)


def test_gemmas_tokenizer_runs_through_tokenizers(gemma):
    """BPE with byte fallback, spaces as underlines, added tokens that are not special, special ones without a row."""
    ours, theirs = Tokenizer.load(gemma), AutoTokenizer.from_pretrained(gemma)
    assert ours.bpe is None and (ours.eot, ours.bos, ours.pad) == (1, 2, 0)
    assert ours.vocab_size <= json.loads((gemma / "config.json").read_text())["vocab_size"]
    for text in ["A fox.\n\nHello wörld 🦆\n <eos>x<end_of_turn> y", "", " ", "\n\n\n", *random_texts(300)]:
        ids = ours.encode(text)
        assert ids.tolist() == theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert ours.decode(ids) == theirs.decode(ids)
        assert not {1, 2, 482} & set(ids.tolist())


def random_texts(count, seed=0):
    """Strings of Unicode from everywhere, assigned or not, and a little markup."""
    rng = random.Random(seed)
    odd = ["<|endoftext|>", " ", "\n", "'s", "  ", "\u200d", "\ufeff"]
    for _ in range(count):
        codes = (rng.choice([rng.randrange(1, 0x80), rng.randrange(0x110000)]) for _ in range(rng.randrange(40)))
        yield "".join(rng.choice(odd) if rng.random() < 0.1 else chr(c) for c in codes if not 0xD800 <= c < 0xE000)


def test_tokenizers_of_the_hub(project, hub, gemma):
    hub["google/gemma-3-270m-it"], hub["google/gated"] = gemma, None
    (project / "names.py").write_text(
        "import config, prepare\nfor name in ('gemma-3-270m-it', 'gated', 'none'):\n    try:\n"
        "        print(prepare.make_tokenizer('google/' + name, None).vocab_size)\n"
        "    except config.UserError as e:\n        print(e)\n"
    )
    size, gated, unknown = run_script(project, "names.py").stdout.splitlines()
    assert int(size) == Tokenizer.load(gemma).vocab_size
    assert "accept its terms" in gated and "neither" in unknown


# ----------------------------------------------------------------------------------------------------------------------
# corpora and bins


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to stand in, with a data/ of its own."""
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare, "DATA", tmp_path / "data")
    return tmp_path


def prepared(**settings):
    """prepare.py in this process -> (path, meta) of what it made."""
    prepare.main(prepare.PrepareConfig(**{"tokenizer": "bpe:300", **settings}))
    path = prepare.DATA / (settings.get("name") or Path(settings["dataset"]).stem)
    return path, json.loads((path / "meta.json").read_text())


def documents_of(path, meta, split):
    """The texts of a bin, read back with no help from prepare's own bookkeeping."""
    tokenizer = Tokenizer.load(path)
    tokens = np.fromfile(path / f"{split}.bin", dtype=meta["dtype"])
    assert tokens[-1] == tokenizer.eot
    parts = np.split(tokens, np.flatnonzero(tokens == tokenizer.eot) + 1)[:-1]
    assert len(tokens) == meta[split]["tokens"] and len(parts) == meta[split]["documents"]
    return [tokenizer.decode(part[:-1]) for part in parts]


STORIES = [f"Story number {i}: the {w} ran. Ünïcode {'x' * (i % 40)}." for i in range(300) for w in ("fox", "crow")]


def write_corpus(path, texts=STORIES):
    if path.suffix == ".txt":
        path.write_text(f"\n{END_OF_TEXT}\n".join(texts) + f"\n{END_OF_TEXT}\n  \n", encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"id": i, "text": s}) + "\n" for i, s in enumerate(texts)))
    elif path.suffix == ".json":
        path.write_text(json.dumps([{"text": s} for s in texts]))
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)


@pytest.mark.parametrize("kind", ["txt", "jsonl", "json", "parquet"])
def test_every_kind_of_file(here, kind):
    write_corpus(here / f"c.{kind}")
    path, meta = prepared(dataset=f"c.{kind}", val_fraction=0.2)
    train, val = documents_of(path, meta, "train"), documents_of(path, meta, "val")
    assert sorted(train + val) == sorted(STORIES)
    assert val == [s for s in STORIES if is_held_out(s, 0.2)] and 80 < len(val) < 160
    for split, texts in (("train", train), ("val", val)):
        assert meta[split]["bytes"] == sum(len(t.encode()) for t in texts)
    assert meta["train"]["tokens"] == sum(len(Tokenizer.load(path).encode(t)) + 1 for t in train)
    assert meta["source"] == str(here / f"c.{kind}") and {f.name for f in path.iterdir()} == set(FILES)


FILES = ["train.bin", "val.bin", "meta.json", "tokenizer.json", "tokenizer_config.json"]


def test_a_folder_with_a_validation_file(here):
    (here / "c").mkdir()
    write_corpus(here / "c" / "tiny-train.jsonl")
    (here / "c" / "tiny-valid.txt").write_text(f"one{END_OF_TEXT}two")
    path, meta = prepared(dataset="c", name="mine")
    assert documents_of(path, meta, "val") == ["one", "two"]
    assert documents_of(path, meta, "train") == STORIES


def test_a_folder_as_people_have_it(here):
    """Hidden files, a byte-order mark, records without a text."""
    (here / "c" / ".git").mkdir(parents=True)
    for name in ("._a.txt", ".git/b.txt"):
        (here / "c" / name).write_bytes(b"\xff")
    (here / "c" / "a.txt").write_text(f"one{END_OF_TEXT}two", encoding="utf-8-sig")
    (here / "c" / "b.jsonl").write_text('{"text": "three"}\n{"text": null}\n{"other": 1}\n{"text": "four"}\n')
    path, meta = prepared(dataset="c", name="mine", val_fraction=0.5)
    texts = documents_of(path, meta, "train") + documents_of(path, meta, "val")
    assert sorted(texts) == sorted(["one", "two", "three", "four"])


def test_texts_are_read_as_they_are(here):
    """`datasets` gave a column one type, and made a date of a text, or JSON source of texts beside a number."""
    texts = ["2024-03-05", "a\nb", "\u2028 c", "1"]
    for name, content in (
        ("a[1].jsonl", "\n\n".join(json.dumps({"text": t}) for t in texts)),
        ("b.json", " \n" + json.dumps([{"text": t} for t in texts] + [{"text": None}], indent=1)),
    ):
        (here / name).write_text(content)
        assert list(prepare.read_files([here / name], prepare.PrepareConfig())) == [t.strip() for t in texts]
    (here / "c.jsonl").write_text('{"text": "half \\ud83d a face"}')
    assert list(prepare.read_files([here / "c.jsonl"], prepare.PrepareConfig())) == ["half ? a face"]


def test_folders_named_after_their_split(here):
    """Validation files in a folder of theirs, a test split that is left out, names in capitals."""
    for name in ("train/A.TXT", "train/latest.txt", "val/c.txt", "test/d.txt"):
        (here / "c" / name).parent.mkdir(parents=True, exist_ok=True)
        (here / "c" / name).write_text(name)
    path, meta = prepared(dataset="c", name="mine")
    assert documents_of(path, meta, "val") == ["val/c.txt"]
    assert documents_of(path, meta, "train") == ["train/A.TXT", "train/latest.txt"]


def test_a_separator_of_lines_in_a_file_from_windows(here):
    (here / "c.txt").write_text("\r\n\r\n".join(STORIES), newline="")
    path, meta = prepared(dataset="c.txt", separator="\\n\\n", val_fraction=0.2)
    texts = documents_of(path, meta, "train") + documents_of(path, meta, "val")
    assert sorted(texts) == sorted(STORIES)


def test_one_document_is_cut_whatever_max_documents_says(here):
    write_corpus(here / "c.jsonl", [" ".join(STORIES)])
    assert whole_text(*prepared(dataset="c.jsonl", max_documents=1))[2] == " ".join(STORIES)


def test_a_tokenizer_that_was_saved_with_truncation_cuts_nothing(gemma, tmp_path):
    theirs = AutoTokenizer.from_pretrained(gemma)
    theirs("a", truncation=True, max_length=8, padding="max_length")
    theirs.save_pretrained(tmp_path)
    assert '"max_length": 8' in (tmp_path / "tokenizer.json").read_text()
    text = "Once upon a time there was a fox. " * 9
    assert Tokenizer.load(tmp_path).encode(text).tolist() == Tokenizer.load(gemma).encode(text).tolist()


def test_a_tokenizer_from_before_models_had_a_type():
    tokenizer = trained()
    old = Tokenizer(tokenizer.spec | {"model": {k: v for k, v in tokenizer.spec["model"].items() if k != "type"}})
    assert old.bpe and old.encode(STORY).tolist() == tokenizer.encode(STORY).tolist()


def test_held_out_documents_depend_on_their_text_alone():
    held_out = {s for s in STORIES if is_held_out(s, 0.1)}
    assert held_out == {s for s in reversed(STORIES) if is_held_out(s, 0.1)}
    assert 0.05 < len(held_out) / len(STORIES) < 0.15
    assert not any(is_held_out(s, 0.0) for s in STORIES)


def test_large_vocabularies_are_stored_as_uint32(here):
    """Not byte-level BPE by tiktoken's rules, either: the documents run through `tokenizers`."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    how = {"pat_str": prepare.GPT2_PATTERN, "mergeable_ranks": ranks, "special_tokens": {"<eos>": 70_000}}
    spec = prepare.spec_of_tiktoken(prepare.tiktoken.Encoding("gpt2", **how))
    spec["pre_tokenizer"]["add_prefix_space"] = True
    (here / "big.json").write_text(json.dumps(spec))
    write_corpus(here / "c.txt")
    path, meta = prepared(dataset="c.txt", tokenizer="big.json")
    assert meta["dtype"] == "uint32" and Tokenizer.load(path).bpe is None
    assert np.fromfile(path / "val.bin", dtype=np.uint32)[-1] == 70_000


def test_documents_encoded_together_are_encoded_one_by_one():
    tokenizer = trained()
    for texts in (STORIES, [*STORIES, f"an {END_OF_TEXT} in a text"]):
        expected = [i for text in texts for i in [*tokenizer.encode(text), tokenizer.eot]]
        assert tokenizer.encode_documents(texts).tolist() == expected


def test_fables_have_a_floor(here):
    from data import fable_grammar

    path, meta = prepared(dataset="fables", tokenizer="", max_documents=300, val_fraction=0.1)
    val = documents_of(path, meta, "val")
    bits = sum(fable_grammar.derivations(text)[0][0] for text in val)
    assert meta["floor_bits_per_byte"] == pytest.approx(bits / sum(len(t.encode()) for t in val))
    assert meta["train"]["documents"] + len(val) == 300 and meta["tokenizer"] == "bpe:2048"
    assert documents_of(path, meta, "train")[0] in (fable_grammar.tell("0/0")[0], fable_grammar.tell("0/1")[0])


@pytest.mark.parametrize("bits", [None, lambda text: 10.0])
def test_another_bundled_corpus_is_one_module(here, monkeypatch, bits):
    numbers = types.ModuleType("numbers_corpus")
    numbers.documents = lambda seed, count: (f"{seed + i} and {seed * i}" for i in range(count or 500))
    numbers.bits, numbers.TOKENIZER = bits, "bpe:270"
    monkeypatch.setitem(sys.modules, "numbers_corpus", numbers)
    monkeypatch.setitem(prepare.CORPORA, "numbers", "numbers_corpus")
    path, meta = prepared(dataset="numbers", tokenizer="", seed=7, val_fraction=0.1)
    val = documents_of(path, meta, "val")
    assert len(val) + meta["train"]["documents"] == 500 and "7 and 0" in val + documents_of(path, meta, "train")
    assert meta["tokenizer"] == "bpe:270" and (meta["floor_bits_per_byte"] is None) == (bits is None)
    if bits:
        assert meta["floor_bits_per_byte"] == pytest.approx(10 * len(val) / sum(map(len, val)))


def test_tinystories_table(here, tinystories, capsys):
    prepared(dataset=str(tinystories), tokenizer="bpe:1024")
    row = next(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("train"))
    assert row[1] == "1,710" and row[5] == "1,384,017"


def test_the_fingerprint_tells_sets_apart(here):
    write_corpus(here / "c.txt")
    seen = [prepared(dataset="c.txt", **how)[1]["fingerprint"] for how in ({}, {}, {"val_fraction": 0.02})]
    seen += [prepared(dataset="c.txt", tokenizer="bpe:299")[1]["fingerprint"]]
    write_corpus(here / "c.txt", [*STORIES[:-1], "Another end."])
    seen += [prepared(dataset="c.txt")[1]["fingerprint"]]
    assert seen[0] == seen[1] and len(set(seen)) == 4 and len(bytes.fromhex(seen[0])) == 16


# ----------------------------------------------------------------------------------------------------------------------
# one long text, and few documents


def whole_text(path, meta):
    train, val = documents_of(path, meta, "train"), documents_of(path, meta, "val")
    return train, val, "".join(train + val)


def test_tiny_shakespeare(here, capsys):
    """The first thing a nanoGPT user tries: one text without separators. Its last tenth is held out."""
    file = SHARED / "data" / "tinyshakespeare.txt"
    if not file.exists():
        pytest.skip(f"{file} is not here")
    train, val, text = whole_text(*prepared(dataset=str(file), tokenizer="bpe:512"))
    assert text == file.read_text().strip()
    assert 0.09 < sum(map(len, val)) / len(text) < 0.11
    assert all(piece.endswith("\n\n") for piece in [*train, *val[:-1]]) and max(map(len, train)) <= prepare.PIECE_CHARS
    assert "one text without separators" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text",
    [
        "word " * 20_000,
        "ß" * 50_000,
        "line\n" * 9000,
        "a\r\n\r\nb\r\n\r\n" * 4000,
        "one",
        "éé",
        "One.\n\nTwo.\n\nThree.",
    ],
)
def test_any_plain_text_can_be_split(here, text):
    (here / "c.txt").write_text(text, newline="")
    assert whole_text(*prepared(dataset="c.txt", val_fraction=0.25))[2] == text.strip()


@pytest.mark.parametrize("asked, held_out", [(None, 3), (0.01, 1)])
def test_what_is_held_out_of_one_text_can_be_asked_for(here, asked, held_out):
    (here / "c.txt").write_text("line\n" * 100_000)  # 31 pieces
    assert len(documents_of(*prepared(dataset="c.txt", val_fraction=asked), "val")) == held_out


def test_one_record_is_one_text(here):
    write_corpus(here / "c.jsonl", [" ".join(STORIES)])
    train, val, text = whole_text(*prepared(dataset="c.jsonl"))
    assert text == " ".join(STORIES) and val and all(piece.endswith(" ") for piece in train)


def test_separators_mean_what_they_look_like(here):
    (here / "c.txt").write_text("\n\n".join(STORIES))
    path, meta = prepared(dataset="c.txt", separator=r"\n\n")
    assert sorted(documents_of(path, meta, "train") + documents_of(path, meta, "val")) == sorted(STORIES)


@pytest.mark.parametrize("fraction", [0.0001, 0.999])
def test_few_documents_are_split_all_the_same(here, capsys, fraction):
    """Five documents, none (or all) of which the fraction would hold out: their texts decide, not their order."""
    write_corpus(here / "c.txt", STORIES[:5])
    path, meta = prepared(dataset="c.txt", val_fraction=fraction)
    val = documents_of(path, meta, "val")
    assert len(val) == (1 if fraction < 0.5 else 4) and "few documents" in capsys.readouterr().out
    write_corpus(here / "c.txt", STORIES[4::-1])
    assert sorted(documents_of(*prepared(dataset="c.txt", val_fraction=fraction), "val")) == sorted(val)


def test_reading_takes_time_in_proportion_to_the_size(here):
    """A file without separators was once searched from its beginning for every block that was read."""
    seconds = []
    for megabytes in (8, 48):
        (here / "c.txt").write_bytes(b"abcdefg " * (megabytes << 17))
        started = time.process_time()
        assert len(list(prepare.read_txt(here / "c.txt", b"<|endoftext|>"))) == 1
        seconds.append(time.process_time() - started)
    assert seconds[1] < 3 * 6 * seconds[0], seconds


# ----------------------------------------------------------------------------------------------------------------------
# mistakes, and what must not be lost


@pytest.mark.parametrize("answers", [True, False])
def test_the_hub_s_library_is_told_where_there_is_no_network(monkeypatch, capsys, answers):
    """It retried for 25 seconds."""
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)  # to all it says 501
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.delenv("HF_HUB_OFFLINE")  # of conftest.py
    thread = threading.Thread(target=server.handle_request, daemon=True)
    if answers:
        thread.start()
    else:
        server.server_close()
    prepare.look_for_hub()
    server.server_close()
    assert ("HF_HUB_OFFLINE" in os.environ) == ("can't be reached" in capsys.readouterr().out) == (not answers)


@pytest.mark.parametrize(
    "name, content, settings, message",
    [
        ("c.txt", b"fine\xff text", {}, "not UTF-8 at byte 4"),
        ("c.txt", b"a" * 40 + b"<|endoftext|>ok\xff", {}, "not UTF-8 at byte 55"),
        ("c.txt", b"", {}, "no text in it"),
        ("c.txt", b" \n<|endoftext|>\n ", {}, "no text in it"),
        ("c.txt", b" \n\n ", {}, "no text in it"),
        ("c.txt", b"a", {}, "too short to hold out 0.1 of it"),
        ("c.jsonl", b"", {}, "not readable as jsonl, or empty"),
        ("c.jsonl", b'{"story": "x"}\n', {}, "no text in a column 'text'; choose --text_column from story (str)"),
        ("c.jsonl", b'{"text": 3}\n', {}, "text (int)"),
        ("c.json", b"[1, 2", {}, "not readable as json"),
        ("c.parquet", b"nonsense", {}, "not readable as parquet"),
        ("c.txt", b"one text", {"tokenizer": "bpe:12"}, "whole number from 257"),
        ("c.txt", b"one text", {"tokenizer": "bpe:x"}, "whole number from 257"),
        ("c.txt", b"one text", {"tokenizer": "bpe:\u00b2"}, "whole number from 257"),
        ("c.txt", b"one text", {"tokenizer": "bpe:" + "9" * 40}, "whole number from 257"),
        ("c.txt", b"one text", {"tokenizer": "gpt5"}, "tiktoken knows only"),
        ("c.txt", b"one text", {"tokenizer": "c.txt"}, "not a tokenizer.json"),
        ("c.txt", b"one text", {"val_fraction": 0.0}, "raise it"),
        ("c.txt", b"one text", {"val_fraction": 2.0}, "between 0 and 0.999"),
        ("c.txt", b"one text", {"separator": ""}, "separator is empty"),
        ("c.txt", b"one text", {"dataset": ""}, "dataset is empty"),
        ("c.txt", b"one text", {"dataset": "nowhere.txt"}, "no such file"),
        ("c.txt", b"one text", {"dataset": "/no/such/path"}, "no such file"),
        ("c.txt", b"one text", {"dataset": "no/such/path"}, "no such file"),
        ("c.txt", b"one text", {"dataset": "a**"}, "no such file"),
        ("c.txt", b"one text", {"dataset": "a\0b"}, "no such file"),
        ("c.txt", b"one text", {"dataset": "data"}, "no .txt, .jsonl, .json, .parquet file here"),
        ("c.txt", b"one text", {"dataset": "nobody/nothing"}, "not to be had from the Hugging Face Hub"),
    ],
)
def test_mistakes_end_in_one_line_and_leave_nothing(here, name, content, settings, message):
    (here / name).write_bytes(content)
    with pytest.raises((UserError, ValueError)) as error:  # a dataclass's own ValueError becomes a line in config.py
        prepared(**{"dataset": name, **settings})
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not os.listdir(here / "data")


def test_an_exception_without_a_text_is_one_line_too(monkeypatch):
    import datasets

    def fails(*args, **settings):
        raise ConnectionError

    monkeypatch.setattr(datasets, "load_dataset", fails)
    with pytest.raises(UserError, match=r"nobody/nothing.*ConnectionError"):
        prepare.load_from_hub("nobody/nothing", "dataset")


def snapshot(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


@pytest.mark.parametrize(
    "name", [".", "..", "a/b", "../photos", "{here}/photos", "a\\b", "a\0b", "a\nb", "x" * 300, "c.part", "c.replaced"]
)
def test_a_name_is_one_plain_name(here, name):
    """--name=/home/me/photos deleted that folder, and --name=. the grammar."""
    write_corpus(here / "c.txt")
    for folder in (here / "photos", here / "data", here / "data" / "a"):
        folder.mkdir(exist_ok=True)
        (folder / "1.jpg").write_text("a photo")
    before = snapshot(here)
    with pytest.raises(UserError, match="plain name"):
        prepared(dataset="c.txt", name=name.format(here=here))
    assert snapshot(here) == before


@pytest.mark.parametrize("where", ["c", "c.part", "c.replaced"])
@pytest.mark.parametrize("content", ["photos", "file", "link", "source"])
def test_what_is_not_a_set_of_this_source_is_not_replaced(here, where, content):
    write_corpus(here / "c.txt")
    path, fix = here / "data" / where, "choose another --name"
    if content == "photos":
        path.mkdir()
        (path / "1.jpg").write_text("a photo")
    elif content == "file":
        path.write_text("a text")
    elif content == "link":
        (here / "elsewhere").mkdir()
        path.symlink_to(here / "elsewhere")
    else:
        (here / "other").mkdir()
        shutil.copy("c.txt", here / "other" / "c.txt")
        os.rename(prepared(dataset="other/c.txt")[0], path)
        fix = f"was prepared from {here / 'other' / 'c.txt'}, not from {here / 'c.txt'}: {fix}"
    before = snapshot(here)
    with pytest.raises(UserError) as error:
        prepared(dataset="c.txt")
    assert fix in str(error.value) and str(path) in str(error.value)
    assert snapshot(here) == before
    prepared(dataset="c.txt", name="mine")


def test_a_set_of_the_same_source_and_an_empty_folder_are_replaced(here):
    write_corpus(here / "c.txt")
    for folder in ("c", "c.part", "c.replaced"):
        (here / "data" / folder).mkdir()
    prepared(dataset="c.txt")
    write_corpus(here / "c.txt", STORIES[:50])
    path, meta = prepared(dataset="c.txt")
    assert meta["train"]["documents"] + meta["val"]["documents"] == 50 and os.listdir(here / "data") == ["c"]
    assert set(os.listdir(path)) == set(FILES)


def test_an_interrupted_prepare_keeps_the_old_dataset(here):
    write_corpus(here / "c.txt")
    path, meta = prepared(dataset="c.txt")
    (here / "c.txt").write_bytes(b"good text<|endoftext|>" * 9 + b"\xff")
    with pytest.raises(UserError):
        prepared(dataset="c.txt")
    assert json.loads((path / "meta.json").read_text()) == meta
    assert sorted(documents_of(path, meta, "train") + documents_of(path, meta, "val")) == sorted(STORIES)


def test_a_crash_between_two_renames_is_mended(here, monkeypatch):
    """The old set lay in data/c.replaced for ever. Even a preparation that fails puts it back."""
    write_corpus(here / "c.txt")
    path, meta = prepared(dataset="c.txt")
    replace = os.replace

    def dies(old, new):
        if new == path:
            raise KeyboardInterrupt
        replace(old, new)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", dies)
        prepared(dataset="c.txt", val_fraction=0.5)
    assert not path.exists() and prepare.intact_dir(path) == here / "data" / "c.replaced"
    with pytest.raises(UserError):
        prepared(dataset="c.txt", tokenizer="bpe:1")
    assert prepare.intact_dir(path) == path and json.loads((path / "meta.json").read_text()) == meta
    assert prepared(dataset="c.txt", val_fraction=0.5)[1] != meta and os.listdir(here / "data") == ["c"]


def test_files_are_synced_as_windows_demands(tmp_path, monkeypatch):
    """There fsync needs a handle that may write, and directories can't be opened."""
    fsync, open_ = os.fsync, os.open

    def strict_open(path, flags, *args):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied")
        return open_(path, flags, *args)

    def strict_fsync(handle):
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        fsync(handle)

    monkeypatch.setattr(os, "open", strict_open)
    monkeypatch.setattr(os, "fsync", strict_fsync)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "file").write_text("text")
    prepare.atomic_replace_dir(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old" / "file").read_text() == "text"


@pytest.mark.parametrize("number, lost", [(errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True)])
def test_a_filesystem_that_can_not_sync_directories_loses_no_save(tmp_path, monkeypatch, number, lost):
    def fsync(handle):
        if os.path.isdir(f"/proc/self/fd/{handle}") or number == errno.EIO:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError) if lost else contextlib.nullcontext():
        prepare.fsync(tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# large corpora, and preparations that are cut off


def bins(folder):
    return [(folder / name).read_bytes() for name in FILES]


def test_a_preparation_that_was_cut_off_goes_on(here, monkeypatch, capsys):
    """Killed after some shards, in any order: they are kept, the rest is made, and the result is as undisturbed."""
    write_corpus(here / "c.txt", [f"Story {i}. {f'The cat sat on mat {i % 97}. ' * 40}" for i in range(400)])
    how = {"dataset": "c.txt", "val_fraction": 0.1}
    whole = bins(prepared(**how)[0])
    shutil.rmtree(here / "data" / "c")
    monkeypatch.setattr(prepare, "SHARD_CHARS", 20_000)
    encode_shard, made = prepare.encode_shard, []

    def dies(path, *args):
        if "3" in path.name:
            raise KeyboardInterrupt
        encode_shard(path, *args)

    def counts(path, *args):
        made.append(path.name)
        encode_shard(path, *args)

    monkeypatch.setattr(prepare, "encode_shard", dies)
    with pytest.raises(KeyboardInterrupt):
        prepared(**how)
    kept = {path.name for path in (here / "data" / "c.part").glob("*.npz")}
    assert "shard-000002.npz" in kept and not (here / "data" / "c").exists()
    monkeypatch.setattr(prepare, "encode_shard", counts)
    assert bins(prepared(**how)[0]) == whole
    assert f"going on after {len(kept)} shards" in capsys.readouterr().out
    assert "shard-000003.npz" in made and not kept & set(made) and os.listdir(here / "data") == ["c"]


def test_a_preparation_with_other_settings_begins_anew(here, capsys):
    write_corpus(here / "c.txt")
    prepared(dataset="c.txt")
    os.rename(here / "data" / "c", here / "data" / "c.part")
    (here / "data" / "c.part" / "shard-000000.npz").write_bytes(b"of other settings")
    (here / "data" / "c.part" / "task.json").write_text("{}")
    assert sum(map(len, documents_of(*prepared(dataset="c.txt"), "train"))) > 1000
    assert "going on" not in capsys.readouterr().out


def write_shards(folder, count, size):
    """Parquet files of about `size` bytes of text each, a held-out one among them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    rng = np.random.default_rng(0)
    words = np.array(["".join(rng.choice(list("abcdefghij"), 5)) for _ in range(5000)])
    for i in range(count):
        texts = [" ".join(rng.choice(words, 2000)) for _ in range(max(1, size // 12_000))]
        name = f"{'validation' if i == 1 else 'train'}-{i:03}.parquet"
        pq.write_table(pa.table({"text": texts}), folder / name, compression="none", row_group_size=100)


def test_streaming_gives_the_same_documents(here):
    """A Hub dataset is read as a folder of shards in its layout: `datasets` treats both alike."""
    write_shards(here / "shards", 3, 50_000)
    both = []
    for streaming in (False, True):
        splits = prepare.open_hub("shards", prepare.PrepareConfig(streaming=streaming))
        both.append({split: list(texts()) for split, texts in splits.items()})
    assert both[0] == both[1] and len(both[0]["train"]) == 8


@pytest.mark.parametrize("names", [["validation"], ["test", "validation"]])
def test_a_hub_dataset_without_a_train_split(monkeypatch, names):
    monkeypatch.setattr(prepare, "load_from_hub", lambda *_: {name: [{"text": name}] for name in names})
    splits = prepare.open_hub("x", prepare.PrepareConfig())
    assert {split: list(texts()) for split, texts in splits.items()} == dict(
        zip(["train", "val"], [[name] for name in names], strict=False)
    )


@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["shards", "long.txt"])
def test_text_larger_than_the_memory_allowed(project, dataset):
    """0.7 GB of shards or one text, 0.63 GB of memory. Allocators that reserve more than they use are told not to."""
    import resource

    write_shards(project / "shards", 14, 50_000_000)
    if dataset == "long.txt":
        with open(project / dataset, "w") as f:
            for path in sorted((project / "shards").iterdir()):
                f.writelines(row["text"] + "\n" for row in prepare.read_rows(path))
    limit = 600 << 20
    assert sum(p.stat().st_size for p in (project / "shards").iterdir()) > limit
    flags = [f"--dataset={dataset}", "--tokenizer=bpe:1000", "--streaming=True"]
    result = subprocess.run(
        [sys.executable, "prepare.py", *flags, "--name=limited"], cwd=project, capture_output=True, text=True,
        env=os.environ | {"ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1",
                          "OPENBLAS_NUM_THREADS": "1", "RAYON_NUM_THREADS": "2"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    run_script(project, "prepare.py", f"--dataset={dataset}", "--tokenizer=bpe:1000", "--name=free", timeout=600)
    limited, free = (bins(project / "data" / name) for name in ("limited", "free"))
    assert limited == free
