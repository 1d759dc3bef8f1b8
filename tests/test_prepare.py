"""prepare.py: corpora of every kind, held-out documents, interrupted preparations, and mistakes."""

import json
import os
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
import tokenizers
from conftest import SHARED, STORIES, documents_of, prepared, run_script, write_corpus

import prepare
from prepare import PrepareConfig, is_held_out
from support.documents import read_rows
from support.files import latest_intact_dir
from support.settings import UserError
from support.tokenizer import GPT2_PATTERN, Tokenizer, spec_of_tiktoken

FILES = ["train.bin", "val.bin", "meta.json", "tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize("kind", ["txt", "jsonl", "json", "parquet"])
def test_every_kind_of_file_can_be_prepared(workspace, kind):
    write_corpus(workspace / f"c.{kind}")
    path, meta = prepared(dataset=f"c.{kind}", val_fraction=0.2)
    train, val = documents_of(path, meta, "train"), documents_of(path, meta, "val")
    assert sorted(train + val) == sorted(STORIES)
    assert val == [s for s in STORIES if is_held_out(s, 0.2)] and 80 < len(val) < 160
    for split, texts in (("train", train), ("val", val)):
        assert meta[split]["bytes"] == sum(len(t.encode()) for t in texts)
    assert meta["train"]["tokens"] == sum(len(Tokenizer.load(path).encode(t)) + 1 for t in train)
    assert meta["source"] == str(workspace / f"c.{kind}") and {f.name for f in path.iterdir()} == set(FILES)


def test_a_validation_file_in_a_folder_becomes_the_validation_split(workspace):
    (workspace / "c").mkdir()
    write_corpus(workspace / "c" / "tiny-train.jsonl")
    (workspace / "c" / "tiny-valid.txt").write_text("one<|endoftext|>two")
    path, meta = prepared(dataset="c", name="mine")
    assert documents_of(path, meta, "val") == ["one", "two"]
    assert documents_of(path, meta, "train") == STORIES


def test_folders_are_read_as_the_splits_they_name(workspace):
    """Validation files in their own folder are held out, a test split is left out, and suffixes may be capitals."""
    for name in ("train/A.TXT", "train/latest.txt", "val/c.txt", "test/d.txt"):
        (workspace / "c" / name).parent.mkdir(parents=True, exist_ok=True)
        (workspace / "c" / name).write_text(name)
    path, meta = prepared(dataset="c", name="mine")
    assert documents_of(path, meta, "val") == ["val/c.txt"]
    assert documents_of(path, meta, "train") == ["train/A.TXT", "train/latest.txt"]


def test_max_documents_does_not_count_the_pieces_of_one_document(workspace):
    write_corpus(workspace / "c.jsonl", [" ".join(STORIES)])
    assert whole_text(*prepared(dataset="c.jsonl", max_documents=1))[2] == " ".join(STORIES)


def test_held_out_documents_depend_on_their_text_alone():
    held_out = {s for s in STORIES if is_held_out(s, 0.1)}
    assert held_out == {s for s in reversed(STORIES) if is_held_out(s, 0.1)}
    assert 0.05 < len(held_out) / len(STORIES) < 0.15
    assert not any(is_held_out(s, 0.0) for s in STORIES)


def test_large_vocabularies_are_stored_as_uint32(workspace):
    """This tokenizer is no byte-level BPE by tiktoken's rules, so `tokenizers` encodes the documents."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    how = {"pat_str": GPT2_PATTERN, "mergeable_ranks": ranks, "special_tokens": {"<eos>": 70_000}}
    spec = spec_of_tiktoken(prepare.tiktoken.Encoding("gpt2", **how))
    spec["normalizer"] = {"type": "NFC"}
    (workspace / "big.json").write_text(json.dumps(spec))
    write_corpus(workspace / "c.txt")
    path, meta = prepared(dataset="c.txt", tokenizer="big.json")
    assert meta["dtype"] == "uint32" and Tokenizer.load(path).bpe is None
    assert np.fromfile(path / "val.bin", dtype=np.uint32)[-1] == 70_000


def test_fables_have_a_floor(workspace):
    from data import fable_grammar

    path, meta = prepared(dataset="fables", tokenizer="", max_documents=300, val_fraction=0.1)
    val = documents_of(path, meta, "val")
    bits = sum(fable_grammar.derivations(text)[0][0] for text in val)
    assert meta["floor_bits_per_byte"] == pytest.approx(bits / sum(len(t.encode()) for t in val))
    assert meta["train"]["documents"] + len(val) == 300 and meta["tokenizer"] == "bpe:2048"
    assert documents_of(path, meta, "train")[0] in (fable_grammar.tell("0/0")[0], fable_grammar.tell("0/1")[0])


@pytest.mark.parametrize("bits", [None, lambda text: 10.0], ids=["no bits", "bits"])
def test_another_bundled_corpus_is_one_module(workspace, monkeypatch, bits):
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


def test_the_report_counts_tinystories_right(workspace, tinystories, capsys):
    prepared(dataset=str(tinystories), tokenizer="bpe:1024")
    row = next(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("train"))
    assert row[1] == "1,710" and row[5] == "1,384,017"


def whole_text(path, meta):
    train, val = documents_of(path, meta, "train"), documents_of(path, meta, "val")
    return train, val, "".join(train + val)


def test_the_last_tenth_of_tiny_shakespeare_is_held_out(workspace, capsys):
    """One text without separators is the first thing that a nanoGPT user tries. Its last tenth is held out."""
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
def test_any_plain_text_is_split_without_loss(workspace, text):
    (workspace / "c.txt").write_text(text, newline="")
    assert whole_text(*prepared(dataset="c.txt", val_fraction=0.25))[2] == text.replace("\r\n", "\n").strip()


@pytest.mark.parametrize("val_fraction, held_out", [(None, 3), (0.01, 1)])
def test_val_fraction_sets_how_much_of_one_text_is_held_out(workspace, val_fraction, held_out):
    (workspace / "c.txt").write_text("line\n" * 100_000)  # 31 pieces
    assert len(documents_of(*prepared(dataset="c.txt", val_fraction=val_fraction), "val")) == held_out


def test_one_record_is_cut_like_one_text(workspace):
    write_corpus(workspace / "c.jsonl", [" ".join(STORIES)])
    train, val, text = whole_text(*prepared(dataset="c.jsonl"))
    assert text == " ".join(STORIES) and val and all(piece.endswith(" ") for piece in train)


def test_a_separator_may_be_written_with_backslash_n(workspace):
    (workspace / "c.txt").write_text("\n\n".join(STORIES))
    path, meta = prepared(dataset="c.txt", separator=r"\n\n")
    assert sorted(documents_of(path, meta, "train") + documents_of(path, meta, "val")) == sorted(STORIES)


@pytest.mark.parametrize("fraction", [0.0001, 0.999])
def test_few_documents_get_a_validation_split_too(workspace, capsys, fraction):
    """The fraction alone would hold out none of the five documents, or all. Their texts decide which, not their
    order."""
    write_corpus(workspace / "c.txt", STORIES[:5])
    path, meta = prepared(dataset="c.txt", val_fraction=fraction)
    val = documents_of(path, meta, "val")
    assert len(val) == (1 if fraction < 0.5 else 4) and "few documents" in capsys.readouterr().out
    write_corpus(workspace / "c.txt", STORIES[4::-1])
    assert sorted(documents_of(*prepared(dataset="c.txt", val_fraction=fraction), "val")) == sorted(val)


@pytest.mark.parametrize(
    "name, content, settings, message",
    [
        ("c.txt", b"fine\xff text", {}, "not UTF-8 at byte 4"),
        ("c.txt", b"a" * 40 + b"<|endoftext|>ok\xff", {}, "not UTF-8 at byte 55"),
        ("c.txt", b"", {}, "no text in it"),
        ("c.txt", b" \n<|endoftext|>\n ", {}, "no text in it"),
        ("c.txt", b" \n\n ", {}, "no text in it"),
        ("c.txt", b"a", {}, "too short to hold out 0.1 of it"),
        ("c.jsonl", b"", {}, "no text in it"),
        ("c.jsonl", b'{"story": "x"}\n', {}, "no text in a column 'text'; it has story (str)"),
        ("c.jsonl", b'{"text": 3}\n', {}, "text (int)"),
        ("c.json", b"[1, 2", {}, "not readable as json"),
        ("c.parquet", b"nonsense", {}, "not readable as parquet"),
        ("c.txt", b"one text", {"tokenizer": "bpe:12"}, "whole number from 257"),
        ("c.txt", b"one text", {"tokenizer": "bpe:x"}, "whole number from 257"),
        ("c.txt", b"one text", {"tokenizer": "bpe:\u00b2"}, "whole number from 257"),
        ("c.txt", b"one text", {"tokenizer": "bpe:" + "9" * 40}, "whole number from 257"),
        ("c.txt", b"one text", {"tokenizer": "gpt5"}, "tiktoken knows only"),
        ("c.txt", b"one text", {"tokenizer": "c.txt"}, "not a tokenizer.json"),
        ("c.txt", b"one text", {"val_fraction": 0.0}, "between 1e-06 and 0.999"),
        ("c.txt", b"one text", {"val_fraction": 2.0}, "between 1e-06 and 0.999"),
        ("c.txt", b"one text", {"separator": ""}, "separator is empty"),
        ("c.txt", b"one text", {"dataset": ""}, "dataset is empty"),
        ("c.txt", b"one text", {"dataset": "nowhere.txt"}, "no such file"),
        ("c.txt", b"one text", {"dataset": "/no/such/path"}, "no such file"),
        ("c.txt", b"one text", {"dataset": "no/such/path"}, "no such file"),
        ("c.txt", b"one text", {"dataset": "a**"}, "no such file"),
        ("c.txt", b"one text", {"dataset": "a\0b"}, "no such file"),
        ("c.txt", b"one text", {"dataset": "data"}, "no .txt, .md, .jsonl, .ndjson, .json, .csv"),
        ("c.txt", b"one text", {"dataset": "nobody/nothing"}, "not downloaded from the Hugging Face Hub"),
    ],
)
def test_mistakes_end_in_one_line_and_leave_nothing(workspace, name, content, settings, message):
    (workspace / name).write_bytes(content)
    with pytest.raises((UserError, ValueError)) as error:  # settings.run() turns a dataclass's ValueError into a line
        prepared(**{"dataset": name, **settings})
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not os.listdir(workspace / "data")


def test_a_preparation_that_fails_keeps_the_old_dataset(workspace):
    write_corpus(workspace / "c.txt")
    path, meta = prepared(dataset="c.txt")
    (workspace / "c.txt").write_bytes(b"good text<|endoftext|>" * 9 + b"\xff")
    with pytest.raises(UserError):
        prepared(dataset="c.txt")
    assert json.loads((path / "meta.json").read_text()) == meta
    assert sorted(documents_of(path, meta, "train") + documents_of(path, meta, "val")) == sorted(STORIES)


def test_a_crash_between_two_renames_is_repaired(workspace, monkeypatch):
    """The old dataset once stayed in data/c.replaced forever. Even a preparation that fails now puts it back."""
    write_corpus(workspace / "c.txt")
    path, meta = prepared(dataset="c.txt")
    replace = os.replace

    def dies(old, new):
        if new == path:
            raise KeyboardInterrupt
        replace(old, new)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", dies)
        prepared(dataset="c.txt", val_fraction=0.5)
    assert not path.exists() and latest_intact_dir(path) == workspace / "data" / "c.replaced"
    with pytest.raises(UserError):
        prepared(dataset="c.txt", tokenizer="bpe:1")
    assert latest_intact_dir(path) == path and json.loads((path / "meta.json").read_text()) == meta
    assert prepared(dataset="c.txt", val_fraction=0.5)[1] != meta and os.listdir(workspace / "data") == ["c"]


def bins(folder):
    return [(folder / name).read_bytes() for name in FILES]


def test_a_preparation_that_was_cut_off_continues(workspace, monkeypatch, capsys):
    """The process is killed after some batches, while it appends another. The finished batches are kept, the others are
    made, and the result is the same as without an interruption."""
    write_corpus(workspace / "c.txt", [f"Story {i}. {f'The cat sat on mat {i % 97}. ' * 40}" for i in range(400)])
    how = {"dataset": "c.txt", "val_fraction": 0.1}
    whole = bins(prepared(**how)[0])
    shutil.rmtree(workspace / "data" / "c")
    monkeypatch.setattr(prepare, "BATCH_CHARS", 20_000)
    encode_batch, part, made = prepare.encode_batch, workspace / "data" / "c.part", []

    def dies(batch, *args):
        if any(text.startswith("Story 300.") for text in batch["train"] + batch["val"]):
            raise KeyboardInterrupt
        return encode_batch(batch, *args)

    def counts(batch, *args):
        made.extend(batch["train"] + batch["val"])
        return encode_batch(batch, *args)

    monkeypatch.setattr(prepare, "encode_batch", dies)
    with pytest.raises(KeyboardInterrupt):
        prepared(**how)
    meta = json.loads((part / "meta.json").read_text())
    done = meta["train"]["documents"] + meta["val"]["documents"]
    assert 250 < done <= 300 and not (workspace / "data" / "c").exists()
    with open(part / "train.bin", "ab") as f:
        f.write(b"torn")
    monkeypatch.setattr(prepare, "encode_batch", counts)
    assert bins(prepared(**how)[0]) == whole
    assert f"continuing after {done} documents" in capsys.readouterr().out
    assert len(made) == 400 - done and os.listdir(workspace / "data") == ["c"]


def test_a_preparation_with_other_settings_starts_again(workspace, capsys):
    write_corpus(workspace / "c.txt")
    path, meta = prepared(dataset="c.txt")
    (path / "meta.json").write_text(json.dumps(meta | {"task": "of other settings"}))
    os.rename(path, workspace / "data" / "c.part")
    assert prepared(dataset="c.txt")[1] == meta
    assert "continuing" not in capsys.readouterr().out


def write_shards(folder, count, size):
    """Write Parquet files of about `size` bytes of text each. One of them is a validation file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    rng = np.random.default_rng(0)
    words = np.array(["".join(rng.choice(list("abcdefghij"), 5)) for _ in range(5000)])
    for i in range(count):
        texts = [" ".join(rng.choice(words, 2000)) for _ in range(max(1, size // 12_000))]
        name = f"{'validation' if i == 1 else 'train'}-{i:03}.parquet"
        pq.write_table(pa.table({"text": texts}), folder / name, compression="none", row_group_size=100)


def test_streaming_gives_the_same_documents(workspace):
    """`datasets` reads a folder of shards like a dataset on the Hub."""
    write_shards(workspace / "shards", 3, 50_000)
    both = []
    for streaming in (False, True):
        splits = prepare.open_hub("shards", PrepareConfig(streaming=streaming))
        both.append({split: list(texts()) for split, texts in splits.items()})
    assert both[0] == both[1] and len(both[0]["train"]) == 8


@pytest.mark.parametrize("names", [["validation"], ["test", "validation"]])
def test_a_hub_dataset_may_have_no_train_split(monkeypatch, names):
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: {name: [{"text": name}] for name in names})
    splits = prepare.open_hub("x", PrepareConfig())
    found = {split: list(texts()) for split, texts in splits.items()}
    assert found == dict(zip(["train", "val"], [[name] for name in names], strict=False))


@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["shards", "long.txt"])
def test_text_may_be_larger_than_the_memory(project, dataset):
    """0.7 GB of shards, or one text of that size, are prepared in 0.63 GB of memory. The environment keeps allocators
    from reserving more than they use."""
    import resource

    write_shards(project / "shards", 14, 50_000_000)
    if dataset == "long.txt":
        with open(project / dataset, "w") as f:
            for path in sorted((project / "shards").iterdir()):
                f.writelines(row["text"] + "\n" for row in read_rows(path))
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


def test_characters_that_the_tokenizer_loses_are_reported_and_count_for_nothing(workspace, capsys):
    """A vocabulary without bytes dropped them in silence, and bits per byte came out too low."""
    letters = {c: i for i, c in enumerate("abcdefghijklmnopqrstuvwxyz .")}
    spec = json.loads(tokenizers.Tokenizer(tokenizers.models.BPE(letters, [])).to_str())
    spec["decoder"] = {"type": "Fuse"}
    spec["added_tokens"] = [{"id": len(letters), "content": "<|endoftext|>", "single_word": False, "lstrip": False,
                             "rstrip": False, "normalized": False, "special": True}]  # fmt: skip
    (workspace / "tok.json").write_text(json.dumps(spec))
    (workspace / "c.txt").write_text("<|endoftext|>".join(["na\u00efve fox", *(f"a fox {c}" for c in "abcdefghij")]))
    path, meta = prepared(dataset="c.txt", tokenizer="tok.json", val_fraction=0.3)
    printed = capsys.readouterr().out
    assert meta["train"]["changed"] + meta["val"]["changed"] == 1 and "1 by the tokenizer" in printed
    assert "such as 'na\u00efve fox', which becomes 'nave fox'" in printed
    for split in ("train", "val"):
        assert meta[split]["bytes"] == sum(len(text) for text in documents_of(path, meta, split))


def test_rows_that_cannot_be_read_count_also_if_few_documents_are_wanted(workspace):
    rows = ['{"x": 1}'] * 30 + [json.dumps({"text": text}) for text in STORIES]
    (workspace / "c.jsonl").write_text("\n".join(rows))
    with pytest.raises(UserError, match=r"30 of \d+ rows cannot be read"):
        prepared(dataset="c.jsonl", max_documents=8, val_fraction=0.5)


def test_documents_that_are_all_the_same_are_not_taken_for_one_text(workspace):
    write_corpus(workspace / "c.jsonl", [STORIES[0]] * 9)
    with pytest.raises(UserError, match="all 9 documents are the same"):
        prepared(dataset="c.jsonl")
