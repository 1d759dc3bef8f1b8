"""
Turn text into tokens on disk: data/<name>/ with train.bin, val.bin, tokenizer.json and meta.json.

    python prepare.py                                             # TinyStories from the Hub, GPT-2's vocabulary
    python prepare.py --dataset=fables                            # the bundled corpus, no network
    python prepare.py --dataset=stories.txt --tokenizer=bpe:4096  # a file or folder of .txt .jsonl .csv .parquet ...

If interrupted, run it again: it continues after the text that is already tokenized.

The .bin files are flat arrays of token ids, with an end-of-text token after each document.
"""

import hashlib
import importlib
import itertools
import json
import math
import os
import re
import shlex
import shutil
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import tiktoken
from tqdm import tqdm

from support.datasets import fingerprint, output_directory
from support.documents import (
    ROWS,
    TEXTS,
    check_bad_rows,
    column,
    kind_of,
    names_split,
    print_left_out,
    read_files,
    source_files,
)
from support.files import atomic_replace_dir, fsync, lock_folder
from support.hub import TEXTS_ON_THE_HUB, hub_directory, load_dataset_from_hub
from support.settings import NO_LIMIT, UserError, check_range, run, user_errors
from support.tokenizer import GPT2_PATTERN, Tokenizer, spec_of_tiktoken, train_bpe


@dataclass
class PrepareConfig:
    """Settings of prepare.py."""

    dataset: str = "tinystories"  # tinystories, fables, a Hub id, or a file or folder of texts (docs/records.md)
    tokenizer: str = ""  # gpt2 or another tiktoken name, bpe:SIZE to train one, or a tokenizer.json
    name: str = ""  # write to data/<name>; by default named after the dataset
    subset: str = ""  # configuration of a Hub dataset, such as sample-10BT
    streaming: bool = False  # read a Hub dataset without storing it, if it is too large for the disk
    text_column: str = "text"  # column of the text in .jsonl, .csv, .parquet, ... and Hub datasets
    max_bad_rows: float = 0.1  # share of a file's rows that may be left out because they hold no text
    separator: str = "<|endoftext|>"  # text between the documents of a .txt file; \n stands for a line break
    val_fraction: float | None = None  # share to hold out without a validation split; None: 0.01, or 0.1 of one text
    max_documents: int = 0  # stop after this many documents; 0: all (fables: 40,000)
    seed: int = 0  # chooses the texts that a bundled corpus generates

    def __post_init__(self):
        check_range(self, 0, 0.999, "val_fraction")
        check_range(self, 0, 1, "max_bad_rows")
        check_range(self, 0, NO_LIMIT, "max_documents")
        self.separator = self.separator.replace(r"\n", "\n").replace(r"\t", "\t")
        if not self.separator or not self.dataset:
            raise ValueError(f"{'separator' if self.dataset else 'dataset'} is empty")


def main(cfg):
    corpus = open_corpus(cfg)
    out = output_directory(cfg.dataset, cfg.name, corpus.source)
    with lock_folder(out):
        meta, example = prepare(cfg, corpus, out)
    report(out, meta, corpus, example)


def prepare(cfg, corpus, out):
    """Write the dataset to the folder `out`. Return the content of meta.json, and an example of a text that the
    tokenizer changes ("" if there is none)."""
    part = out.with_name(out.name + ".part")  # no script reads this name, so no script reads half a dataset
    tokenizer = start_or_resume(part, cfg, corpus)
    shards = tokenize(corpus, tokenizer, part)
    for source, note in corpus.notes.items():  # max_documents can stop column() before its final check
        check_bad_rows(source, note, cfg.max_bad_rows)
    meta = {
        "source": corpus.source, "tokenizer": cfg.tokenizer or corpus.tokenizer, "vocab_size": tokenizer.vocab_size,
        "dtype": tokenizer.dtype.name, **{split: join_shards(shards, split, tokenizer) for split in ("train", "val")},
    }  # fmt: skip
    bits = math.fsum(np.load(shard)["bits"] for shard in shards)
    example = next((text for shard in shards if (text := str(np.load(shard)["example"]))), "")
    meta["floor_bits_per_byte"] = bits / meta["val"]["bytes"] if corpus.bits else None
    meta["fingerprint"] = fingerprint(part, tokenizer)
    (part / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    for file in (*part.glob("shard-*"), part / "task.json"):
        file.unlink()
    atomic_replace_dir(part, out)
    return meta, example


@dataclass
class Corpus:
    """The documents of --dataset."""

    source: str  # for meta.json: the name of a bundled corpus, an absolute path, or a Hub id and subset
    splits: dict[str, Callable]  # "train", perhaps "val": each call returns a new iterator over the texts
    tokenizer: str = "gpt2"  # unless --tokenizer names another
    bits: Callable | None = None  # text -> -log2 of its probability, if the corpus knows it
    max_documents: int | None = None  # limit for each split
    val_fraction: float = 0.0  # share of the training documents to hold out
    notes: dict = field(default_factory=dict)  # {file: counts of rows that were left out}, from column()

    def documents(self):
        """Yield the documents in order, as (split, text)."""
        for split, texts in self.splits.items():
            for text in itertools.islice(texts(), self.max_documents):
                yield "val" if is_held_out(text, self.val_fraction) else split, text


def start_or_resume(part, cfg, corpus):
    """Return the tokenizer in the folder `part`. Create it, unless an interrupted run of the same task left one."""
    files = [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in source_files(Path(cfg.dataset))[0]]
    task = json.dumps(asdict(cfg) | {"source": corpus.source, "files": files, "shard": SHARD_CHARS})
    shards = list(part.glob("shard-*.npz"))
    if shards and (part / "task.json").read_text() == task:
        print(f"{part}: continuing after {len(shards)} shards")
        return Tokenizer.load(part)
    training = (text for split, text in corpus.documents() if split == "train")
    tokenizer = make_tokenizer(cfg.tokenizer or corpus.tokenizer, training)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    (part / "task.json").write_text(task)
    tokenizer.save(part)
    return tokenizer


def tokenize(corpus, tokenizer, part):
    """Encode the documents in threads. Return the files of the shards, in order. Existing shards are kept."""
    shards, pending = [], deque()
    documents = tqdm(corpus.documents(), "tokenizing", unit=" documents", mininterval=1, disable=None)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for batch in batches(documents):
            shards.append(part / f"shard-{len(shards):06}.npz")
            if not shards[-1].exists():
                pending.append(pool.submit(encode_shard, shards[-1], batch, tokenizer, corpus.bits))
            if len(pending) > 2 * os.cpu_count():  # limits the texts in memory
                pending.popleft().result()
    for shard in pending:
        shard.result()  # raises its thread's exception
    return shards


SHARD_CHARS = 1 << 21  # characters of text in a shard; an interruption loses at most this much of each thread's work
PIECE_CHARS = 1 << 14  # longest piece of a text without separators


def batches(documents):
    """Yield lists of documents that have about SHARD_CHARS characters together."""
    batch, size = [], 0
    for split, text in documents:
        batch.append((split, text))
        size += len(text)
        if size >= SHARD_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode_shard(path, documents, tokenizer, bits):
    """Write the tokens of [(split, text), ...], and the bits of the validation texts, to a file, which appears when it
    is complete. tiktoken releases the GIL, so threads are enough."""
    arrays = {"example": ""}
    for name in ("train", "val"):
        texts = [text for split, text in documents if split == name]
        arrays[name] = tokens = tokenizer.encode_documents(texts).astype(tokenizer.dtype)
        decoded = texts
        is_lossless = tokenizer.bpe and tokenizer.bpe._pat_str == GPT2_PATTERN
        if not is_lossless:  # others may drop characters: count the bytes of the decoded text
            decoded = [tokenizer.decode(ids) for ids in np.split(tokens, np.flatnonzero(tokens == tokenizer.eot))[:-1]]
        changed = [(text, read) for text, read in zip(texts, decoded, strict=True) if text != read]
        arrays[f"{name}_changed"] = len(changed)
        arrays[f"{name}_bytes"] = sum(len(text.encode()) for text in decoded)
        for text, read in changed[:1]:
            same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(text, read, strict=False))
            at = max(0, len(list(same)) - 10)
            arrays["example"] = f"{text[at : at + 30]!r} becomes {read[at : at + 30]!r}"
    arrays["bits"] = math.fsum(bits(text) for split, text in documents if split == "val") if bits else 0.0
    new = path.with_suffix(".new")
    with open(new, "wb") as f:
        np.savez(f, **arrays)
    fsync(new)
    os.replace(new, path)


def join_shards(shards, split, tokenizer):
    """Write the split's .bin from the shards. Return its counts."""
    counts = {"tokens": 0, "documents": 0, "bytes": 0, "changed": 0}
    with open(shards[0].with_name(f"{split}.bin"), "wb") as f:
        for shard in shards:
            with np.load(shard) as arrays:
                tokens = arrays[split]
                counts["bytes"] += int(arrays[f"{split}_bytes"])
                counts["changed"] += int(arrays[f"{split}_changed"])
            f.write(tokens.tobytes())
            counts["tokens"] += len(tokens)
            counts["documents"] += int((tokens == tokenizer.eot).sum())
    return counts


def report(out, meta, corpus, example):
    """Print the size of the dataset, and how many rows were left out or changed. example: a change by the tokenizer."""
    print(f"\n{out}: {meta['tokenizer']} with {meta['vocab_size']:,} tokens, stored as {meta['dtype']}")
    for name in ("train", "val"):
        c = meta[name]
        print(f"{name:5}: {c['documents']:,} documents, {c['tokens']:,} tokens, {c['bytes']:,} bytes, "
              f"{c['bytes'] / c['tokens']:.3f} bytes per token")  # fmt: skip
    if meta["floor_bits_per_byte"] is not None:
        print(f"entropy floor of the validation split: {meta['floor_bits_per_byte']:.4f} bits per byte")
    for source, note in corpus.notes.items():
        if note["unreadable"]:
            print(f"{source}: left out {note['unreadable']:,} of {note['rows']:,} rows, the first: {note['first']}")
        elif not note["rows"]:
            print(f"{source}: no text in it")
    keys = ("unreadable", "empty", "repaired", "line_ends")
    n = {key: sum(note.get(key, 0) for note in corpus.notes.values()) for key in keys}
    changed = meta["train"]["changed"] + meta["val"]["changed"]
    print(f"rows left out: {n['unreadable']:,} without a text, {n['empty']:,} empty; texts changed: {n['repaired']:,} "
          f"with an unpaired surrogate, {n['line_ends']:,} with Windows line ends, {changed:,} by the tokenizer"
          f"{f', such as {example}' if example else ''}")  # fmt: skip
    recipe, name = Path(__file__).parent / "config" / f"train_{out.name}.py", shlex.quote(out.name)
    other = f"train_tinystories_cpu.py --dataset={name} --out_dir=out/{name}"
    print(f"next: python train.py config/{recipe.name if recipe.exists() else other}")


def make_tokenizer(name, texts):
    """Return the tokenizer that --tokenizer names. texts: an iterator of texts to train bpe:SIZE on."""
    if name.startswith("bpe:"):
        size = int(name[4:]) if re.fullmatch("[0-9]{1,6}", name[4:]) else 0
        if size < 257:  # 256 bytes and end-of-text
            raise UserError(f"--tokenizer={name}: the size must be a whole number from 257 to 999999, as in bpe:4096")
        texts = tqdm(texts, "training the tokenizer", unit=" documents", mininterval=1, disable=None)
        return Tokenizer(train_bpe(texts, size))
    path = hub_directory(name, ["tokenizer*", "*.jinja"])
    if os.path.exists(path):
        return Tokenizer.load(path)
    if name not in tiktoken.list_encoding_names():
        known = ", ".join(tiktoken.list_encoding_names())
        raise UserError(f"--tokenizer={name}: no such file, and tiktoken knows only {known}; or train one: bpe:4096")
    hint = "check the network, set TIKTOKEN_CACHE_DIR, or train your own with --tokenizer=bpe:4096"
    with user_errors(f"--tokenizer={name}: tiktoken could not download it ({hint})"):
        return Tokenizer(spec_of_tiktoken(tiktoken.get_encoding(name)))


# ---- corpora ---------------------------------------------------------------------------------------------------------

# Bundled corpora. Each is a module with documents(seed, count), which returns an iterator of texts (count 0: a default
# number); bits(text), which returns -log2 of the text's probability, or bits = None; and TOKENIZER, the default of
# --tokenizer. lora.py --data also needs records(seed, count, held_out), which yields conversations, and follows(turn,
# answer), which returns whether an answer follows the instruction. See data/fable_grammar.py.
CORPORA = {"fables": "data.fable_grammar"}


def open_corpus(cfg):
    """Return the documents of --dataset. If they have no validation split, hold one out."""
    path, hub_name, notes = Path(cfg.dataset), TEXTS_ON_THE_HUB.get(cfg.dataset, cfg.dataset), {}
    if cfg.dataset in CORPORA:
        module = importlib.import_module(CORPORA[cfg.dataset])
        texts = partial(module.documents, cfg.seed, cfg.max_documents)
        corpus = Corpus(cfg.dataset, {"train": texts}, module.TOKENIZER, module.bits)
    elif os.path.exists(path):
        corpus = Corpus(str(path.resolve()), open_files(path, cfg, notes), notes=notes)
    elif re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", hub_name) and not kind_of(path):
        corpus = Corpus(f"{hub_name} {cfg.subset}".strip(), open_hub(hub_name, cfg, notes), notes=notes)
    else:
        raise UserError(f"--dataset={cfg.dataset!r}: no such file or folder, and not the name of a dataset")
    corpus.max_documents = cfg.max_documents or None
    for split, texts in corpus.splits.items():
        if not any(map(str.strip, texts())):
            raise UserError(f"--dataset={cfg.dataset}: no text in it (for the {split} split)")
    if "val" not in corpus.splits:
        hold_out(corpus, cfg)
    return corpus


def hold_out(corpus, cfg):
    """Set corpus.val_fraction to --val_fraction, or for few documents to the nearest share that fills both splits."""
    fraction = 0.01 if cfg.val_fraction is None else cfg.val_fraction
    if not fraction:
        raise UserError("--val_fraction=0 holds out nothing, and the dataset has no validation split: raise it")
    lowest, highest, count = 1.0, 0.0, 0
    for _, text in corpus.documents():
        count += 1
        lowest, highest = min(lowest, text_hash(text)), max(highest, text_hash(text))
        if lowest < fraction <= highest:
            break
    if lowest == highest and count > 1:
        raise UserError(f"--dataset={cfg.dataset}: all {count} documents are the same, so none can be held out")
    if lowest == highest:  # one document
        corpus.splits, corpus.bits, corpus.max_documents = split_text(text, cfg), None, None
        return
    corpus.val_fraction = min(max(fraction, math.nextafter(lowest, 1)), highest)
    if corpus.val_fraction != fraction:
        print(f"few documents: --val_fraction={corpus.val_fraction:.3f} instead of {fraction}, to fill both splits")


def text_hash(text):
    """Return a number in 0..1 that depends on the text alone, so that neither order nor duplicates change it."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64


def is_held_out(text, fraction):
    """Return whether a document belongs to the validation split."""
    return fraction > 0 and text_hash(text) < fraction


def split_text(text, cfg):
    """Return the splits of one long text. It is cut between paragraphs, and the last tenth is held out, as in nanoGPT.

    Each piece becomes a document. Pieces are short, so that many threads can work, and so that the model often sees an
    end-of-text token before a text, which is where generation begins. They are long compared with a row of train.py,
    so few rows end early. They are not stripped, so the pieces joined together are the text."""
    pieces, start, size = [], 0, min(PIECE_CHARS, max(1, len(text) // 20))
    while start < len(text):
        end = start + size
        for mark in ("\n\n", "\n\r\n", "\n", " ") if end < len(text) else ():
            if (found := text.rfind(mark, start + size // 2, end)) >= 0:
                end = found + len(mark)
                break
        pieces.append(text[start:end])
        start = end
    fraction = 0.1 if cfg.val_fraction is None else cfg.val_fraction
    first = len(pieces) - max(1, round(fraction * len(pieces)))
    if first < 1:
        raise UserError(f"{cfg.dataset}: one text of {len(text)} characters, too short to hold out {fraction} of it")
    print(f"{cfg.dataset}: one text without separators, cut into {len(pieces)} pieces; the last "
          f"{len(pieces) - first} are held out")  # fmt: skip
    return {"train": pieces[:first].__iter__, "val": pieces[first:].__iter__}


def open_files(path, cfg, notes=None):
    """Return the splits of a file, or of the files in a folder. Print which files are left out."""
    files, left_out = source_files(path)
    held_out = [f for f in files if names_split("val|valid|validation|dev", f, path)]
    if held_out and cfg.val_fraction is not None:
        raise UserError(
            f"val_fraction={cfg.val_fraction}: {path} already has a validation split: remove --val_fraction"
        )
    left_out |= {f: "a test split" for f in files if names_split("test", f, path)}
    files = [f for f in files if f not in left_out]
    print_left_out(path, left_out)
    if not files:
        raise UserError(f"{path}: no {', '.join(TEXTS + ROWS)} file here, plain or .gz, .bz2, .zst")
    splits = {"train": files}
    if held_out and len(held_out) < len(files):
        splits = {"train": [f for f in files if f not in held_out], "val": held_out}
    how = cfg.separator, cfg.text_column, cfg.max_bad_rows, notes
    return {name: partial(read_files, fs, *how) for name, fs in splits.items()}


def open_hub(name, cfg, notes=None):
    """Return the splits of a dataset on the Hub."""
    splits = load_dataset_from_hub(name, "dataset", cfg.subset, cfg.streaming)
    train = "train" if "train" in splits else next(iter(splits))
    found = {"train": train} | ({"val": "validation"} if "validation" in splits and train != "validation" else {})
    if others := sorted(splits.keys() - found.values()):
        print(f"{name}: left out the splits {', '.join(others)}")

    def texts(split):
        numbered = ((f"row {i}", row) for i, row in enumerate(splits[split], 1))
        return column(numbered, cfg.text_column, f"{name}, {split}", cfg.max_bad_rows, notes)

    return {name: partial(texts, split) for name, split in found.items()}


if __name__ == "__main__":
    run(main, PrepareConfig)
