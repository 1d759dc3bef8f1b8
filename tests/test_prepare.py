import json
import os
import random
import re
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
import tiktoken
import tokenizers
from conftest import fails, publish_gemma, run_script
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

import prepare
from prepare import (
    END_OF_TEXT,
    TEMPLATES,
    Tokenizer,
    chat_template,
    encode,
    encode_conversation,
    is_held_out,
    spec_of_tiktoken,
    train_bpe,
)

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
        assert tokenizer.encode(text).tolist() == theirs(text, split_special_tokens=True).input_ids == ids
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


@pytest.mark.parametrize("template", list(TEMPLATES))
@pytest.mark.parametrize("kind", ["byte-level", "gemma"])
def test_the_chat_template_renders_as_training_does(gemma, tmp_path, template, kind):
    tokenizer = Tokenizer.load(gemma) if kind == "gemma" else trained(300)
    official = tokenizer.config.get("chat_template")
    tokenizer.config["chat_template"] = chat_template(tokenizer, template)
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    said = [("Who is it? ", "A fox."), ("\nAnd who\n\nelse?", "A crow, <b>I</b> think."), ("Where?", "Here.")]
    messages = [{"role": "system", "content": "You are an owl."}]
    turns = []
    for asked, answered in said:
        messages.append({"role": "user", "content": asked})
        turns.append((asked if turns else f"You are an owl.\n\n{asked}", "", None))
        ids = encode_conversation(tokenizer, turns, template)[0]
        rendered = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert rendered == ids, theirs.decode(rendered)
        if official and template == "gemma":
            merged = [{"role": "user", "content": turns[0][0]}, *messages[2:]]  # the official way with system messages
            assert ids == theirs.apply_chat_template(
                merged, chat_template=official, add_generation_prompt=True, return_dict=False
            )
        messages.append({"role": "assistant", "content": answered})
        turns[-1] = (*turns[-1][:2], answered)


def test_a_tokenizer_from_the_hub(project, hub, gemma):
    hub["google/gemma-3-270m-it"], hub["google/gated"] = gemma, None
    (project / "stories.txt").write_text(f"\n{END_OF_TEXT}\n".join(STORIES), encoding="utf-8")
    path, meta = prepared(project, "--dataset=stories.txt", "--tokenizer=google/gemma-3-270m-it")
    assert documents_of(path, meta, "train") and meta["vocab_size"] == Tokenizer.load(gemma).vocab_size
    assert "accept its terms" in fails(project, "prepare.py", "--dataset=stories.txt", "--tokenizer=google/gated")
    assert "neither" in fails(project, "prepare.py", "--dataset=stories.txt", "--tokenizer=google/none")


# ----------------------------------------------------------------------------------------------------------------------
# corpora and bins


def prepared(project, *args):
    run_script(project, "prepare.py", *args)
    (path,) = (p.parent for p in (project / "data").glob("*/meta.json"))
    return path, json.loads((path / "meta.json").read_text())


def documents_of(path, meta, split):
    """The texts of a bin, read back with no help from prepare's own bookkeeping."""
    tokenizer = Tokenizer.load(path)
    tokens = np.fromfile(path / f"{split}.bin", dtype=meta["dtype"])
    assert tokens[-1] == tokenizer.eot
    parts = np.split(tokens, np.flatnonzero(tokens == tokenizer.eot) + 1)[:-1]
    assert len(tokens) == meta[split]["tokens"]
    return [tokenizer.decode(part[:-1]) for part in parts]


STORIES = [f"Story number {i}: the {w} ran. Ünïcode {'x' * (i % 40)}." for i in range(300) for w in ("fox", "crow")]


def write_corpus(path, kind):
    if kind == "txt":
        path.write_text(f"\n{END_OF_TEXT}\n".join(STORIES) + f"\n{END_OF_TEXT}\n  \n", encoding="utf-8")
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"id": i, "text": s}) + "\n" for i, s in enumerate(STORIES)))
    elif kind == "json":
        path.write_text(json.dumps([{"text": s} for s in STORIES]))
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"text": STORIES}), path)


@pytest.mark.parametrize("kind", ["txt", "jsonl", "json", "parquet"])
def test_every_kind_of_file(project, kind):
    write_corpus(project / f"c.{kind}", kind)
    path, meta = prepared(project, f"--dataset=c.{kind}", "--tokenizer=bpe:300", "--val_fraction=0.2")
    train, val = documents_of(path, meta, "train"), documents_of(path, meta, "val")
    assert sorted(train + val) == sorted(STORIES)
    assert val == [s for s in STORIES if is_held_out(s, 0.2)] and 80 < len(val) < 160
    for split, texts in (("train", train), ("val", val)):
        assert meta[split]["documents"] == len(texts)
        assert meta[split]["bytes"] == sum(len(t.encode()) for t in texts)
    lengths = [len(Tokenizer.load(path).encode(t)) + 1 for t in train]
    assert abs(meta["train"]["median_document_tokens"] - np.median(lengths)) <= 1


def test_a_folder_with_a_validation_file(project):
    (project / "c").mkdir()
    write_corpus(project / "c" / "tiny-train.jsonl", "jsonl")
    (project / "c" / "tiny-valid.txt").write_text(f"one{END_OF_TEXT}two")
    path, meta = prepared(project, "--dataset=c", "--tokenizer=bpe:300", "--name=mine")
    assert path.name == "mine"
    assert documents_of(path, meta, "val") == ["one", "two"]
    assert documents_of(path, meta, "train") == STORIES


def test_held_out_documents_depend_on_their_text_alone():
    held_out = {s for s in STORIES if is_held_out(s, 0.1)}
    assert held_out == {s for s in reversed(STORIES) if is_held_out(s, 0.1)}
    assert 0.05 < len(held_out) / len(STORIES) < 0.15
    assert not any(is_held_out(s, 0.0) for s in STORIES)


def test_large_vocabularies_are_stored_as_uint32(project):
    hf = {"<eos>": 70_000} | {prepare.BYTE_TO_CHAR[b]: b for b in range(256)}
    spec = prepare.tokenizer_spec({k: v for k, v in hf.items() if v < 256}, [], prepare.pre_tokenizers.ByteLevel(), {})
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    spec["added_tokens"] = [{"id": 70_000, "content": "<eos>", **flags}]
    (project / "big.json").write_text(json.dumps(spec))
    write_corpus(project / "c.txt", "txt")
    path, meta = prepared(project, "--dataset=c.txt", "--tokenizer=big.json")
    assert meta["dtype"] == "uint32"
    assert np.fromfile(path / "val.bin", dtype=np.uint32)[-1] == 70_000


def test_order_does_not_depend_on_threads():
    tokenizer = trained()
    tokens, lengths, num_bytes = encode(tokenizer, STORIES)
    expected = [i for s in STORIES for i in [*tokenizer.encode(s), tokenizer.eot]]
    assert tokens.tolist() == expected and lengths.sum() == len(expected)
    assert num_bytes == sum(len(s.encode()) for s in STORIES)


def test_fables_have_a_floor(project):
    path, meta = prepared(project, "--dataset=fables", "--max_documents=300", "--val_fraction=0.1")
    from data import fable_grammar

    val = documents_of(path, meta, "val")
    bits = sum(fable_grammar.derivations(text)[0][0] for text in val)
    assert meta["floor_bits_per_byte"] == pytest.approx(bits / sum(len(t.encode()) for t in val))
    assert meta["train"]["documents"] + len(val) == 300


def test_tinystories_table(project, tinystories):
    result = run_script(project, "prepare.py", f"--dataset={tinystories}", "--tokenizer=bpe:1024")
    assert "1,727" in result.stdout or re.search(r"train +1,7\d\d", result.stdout)


@pytest.mark.parametrize(
    "name, content, args, message",
    [
        ("c.txt", b"fine\xff\xfe", [], "not UTF-8 at byte 4"),
        ("c.txt", b"a" * 40 + b"<|endoftext|>ok\xff", [], "not UTF-8 at byte 55"),
        ("c.txt", b"", [], "no text in it"),
        ("c.jsonl", b'{"story": "x"}\n', [], "no column 'text'; --text_column can be one of story"),
        ("c.jsonl", b'{"text": 3}\n', [], "holds int, not text"),
        ("c.json", b"[1, 2", [], "not readable as json"),
        ("c.parquet", b"nonsense", [], "not readable as parquet"),
        ("c.txt", b"one", ["--tokenizer=bpe:12"], "too small"),
        ("c.txt", b"one", ["--tokenizer=bpe:x"], "whole number"),
        ("c.txt", b"one", ["--tokenizer=gpt5"], "tiktoken knows only"),
        ("c.txt", b"one", ["--tokenizer=c.txt"], "not a tokenizer.json"),
        ("c.txt", b"one", ["--val_fraction=0"], "raise it"),
        ("c.txt", b"one", ["--val_fraction=2"], "between 0 and 0.999"),
        ("c.txt", b"one", ["--separator="], "separator is empty"),
        ("c.txt", b"one", ["--dataset=nowhere.txt"], "no such file"),
        ("c.txt", b"one", ["--dataset=nobody/nothing"], "not to be had from the Hugging Face Hub"),
    ],
)
def test_mistakes_end_in_one_line_and_leave_nothing(project, name, content, args, message):
    (project / name).write_bytes(content)
    assert message in fails(project, "prepare.py", f"--dataset={name}", "--tokenizer=bpe:300", *args)
    assert not list((project / "data").glob("*/meta.json"))


def test_an_interrupted_prepare_keeps_the_old_dataset(project):
    write_corpus(project / "c.txt", "txt")
    path, meta = prepared(project, "--dataset=c.txt", "--tokenizer=bpe:300")
    (project / "c.txt").write_bytes(b"good text<|endoftext|>" * 9 + b"\xff")
    fails(project, "prepare.py", "--dataset=c.txt", "--tokenizer=bpe:300")
    assert json.loads((path / "meta.json").read_text()) == meta
    assert sorted(documents_of(path, meta, "train") + documents_of(path, meta, "val")) == sorted(STORIES)


# ----------------------------------------------------------------------------------------------------------------------
# large corpora, and preparations that are cut off


def bins(folder):
    return [(folder / name).read_bytes() for name in ("train.bin", "val.bin", "meta.json", "tokenizer.json")]


@pytest.mark.parametrize("batches", [1, 3, 6])
def test_a_preparation_that_was_cut_off_goes_on(project, batches):
    """Killed between two notes of its progress, some tokens further on: the result is that of an undisturbed one."""
    with open(project / "long.txt", "w") as f:
        f.writelines(f"Story {i}. {f'The cat sat on mat {i % 97}. ' * 40}\n<|endoftext|>\n" for i in range(5000))
    flags = ["--dataset=long.txt", "--tokenizer=bpe:300", "--val_fraction=0.1"]
    run_script(project, "prepare.py", *flags)
    whole = bins(project / "data" / "long")
    shutil.rmtree(project / "data" / "long")
    (project / "dies.py").write_text(
        "import os, sys, prepare\nfrom config import run\nprepare.PROGRESS_EVERY = 2\n"
        f"add, calls = prepare.Split.add, []\n"
        f"def dies(self, *args):\n    calls.append(1)\n    add(self, *args)\n    self.file.flush()\n"
        f"    if len(calls) > {2 * batches + 1}: os._exit(9)\n"
        "prepare.Split.add = dies\nrun(prepare.main, prepare.PrepareConfig)\n"
    )
    assert run_script(project, "dies.py", *flags, ok=False).returncode == 9
    assert not (project / "data" / "long").exists()
    printed = run_script(project, "prepare.py", *flags).stdout
    assert ("going on after" in printed) == (batches > 1)
    assert bins(project / "data" / "long") == whole
    assert not list((project / "data").glob("*.part"))


def test_a_preparation_of_something_else_begins_anew(project):
    (project / "a.txt").write_text("".join(f"Number {i}.\n<|endoftext|>\n" for i in range(50)))
    part = project / "data" / "a.part"
    part.mkdir()
    (part / "progress.json").write_text('{"task": {}, "batches": 3, "floor_bits": 0, "splits": {}}')
    assert (
        "going on"
        not in run_script(project, "prepare.py", "--dataset=a.txt", "--tokenizer=bpe:270", "--val_fraction=0.5").stdout
    )


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


def test_streaming_gives_the_same_documents(project):
    """A Hub dataset is read as a folder of shards in its layout: `datasets` treats both alike."""
    write_shards(project / "shards", 3, 50_000)
    both = []
    for streaming in (False, True):
        cfg = prepare.PrepareConfig(streaming=streaming)
        corpus = prepare.open_hub(str(project / "shards"), cfg)
        both.append({split: list(texts()) for split, texts in corpus.items()})
    assert both[0] == both[1] and len(both[0]["train"]) == 8


@pytest.mark.slow
def test_shards_larger_than_the_memory_allowed(project):
    """0.7 GB of shards, 0.63 GB of memory. Allocators that reserve more than they use are told not to."""
    import resource

    write_shards(project / "shards", 14, 50_000_000)
    size = sum(p.stat().st_size for p in (project / "shards").iterdir())
    limit = 600 << 20
    assert size > limit
    flags = ["--dataset=shards", "--tokenizer=bpe:1000", "--streaming=True"]
    result = subprocess.run(
        [sys.executable, "prepare.py", *flags, "--name=limited"], cwd=project, capture_output=True, text=True,
        env=os.environ | {"ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1",
                          "OPENBLAS_NUM_THREADS": "1", "RAYON_NUM_THREADS": "2"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    run_script(project, "prepare.py", "--dataset=shards", "--tokenizer=bpe:1000", "--name=free", timeout=600)
    limited, free = (bins(project / "data" / name) for name in ("limited", "free"))
    assert limited == free
