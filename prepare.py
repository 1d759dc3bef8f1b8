"""
Turn text into tokens on disk: data/<name>/ with train.bin, val.bin, tokenizer.json and meta.json.

    python prepare.py                                             # TinyStories from the Hub, GPT-2's vocabulary
    python prepare.py --dataset=fables                            # the bundled corpus, no network
    python prepare.py --dataset=stories.txt --tokenizer=bpe:4096  # a file or folder of .txt .jsonl .csv .parquet ...

If interrupted, run it again: it continues after the text that is already tokenized. The .bin files are flat arrays of
token ids, with an end-of-text token after each document.
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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import tiktoken
from tqdm import tqdm

from support.datasets import fingerprint, output_directory
from support.documents import check_bad_rows, column, open_splits, read_files
from support.files import atomic_replace_dir, fsync, lock_folder, write_atomically
from support.hub import TEXTS_ON_THE_HUB, hub_directory, load_dataset_from_hub
from support.settings import UserError, check_range, run, user_errors
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
        check_range(self, 1e-6, 0.999, "val_fraction")
        check_range(self, 0, 1, "max_bad_rows")
        self.separator = self.separator.replace(r"\n", "\n").replace(r"\t", "\t")
        if not self.separator or not self.dataset:
            raise ValueError(f"{'separator' if self.dataset else 'dataset'} is empty")


def main(cfg):
    corpus = open_corpus(cfg)
    out = output_directory(cfg.dataset, cfg.name, corpus.source)
    part = out.with_name(out.name + ".part")  # no script reads this name, so no script reads half a dataset
    with lock_folder(out):
        tokenizer, meta = start_or_resume(part, cfg, corpus)
        tokenize(corpus, tokenizer, part, meta)
        for source, note in corpus.notes.items():  # max_documents can stop column() before its final check
            check_bad_rows(source, note, cfg.max_bad_rows)
        bits, example, _ = meta["val"].pop("bits", None), meta.pop("example"), meta.pop("task")
        meta["floor_bits_per_byte"] = None if bits is None else bits / meta["val"]["bytes"]
        meta["fingerprint"] = fingerprint(part, tokenizer)
        write_atomically(part / "meta.json", json.dumps(meta, indent=2) + "\n")
        atomic_replace_dir(part, out)
    report(out, meta, corpus.notes, example)


@dataclass
class Corpus:
    """The documents of --dataset."""

    source: str  # for meta.json: the name of a bundled corpus, an absolute path, or a Hub id and subset
    splits: dict[str, Callable]  # "train", perhaps "val": each call returns a new iterator over the texts
    notes: dict  # {file: counts of rows that were left out}, from column()
    tokenizer: str = "gpt2"  # unless --tokenizer names another
    bits: Callable | None = None  # text -> -log2 of its probability, if the corpus knows it
    max_documents: int | None = None  # limit for each split
    val_fraction: float = 0.0  # share of the training documents to hold out
    files: tuple = ()  # the files of a corpus on this disk

    def documents(self):
        """Yield the documents in order, as (split, text)."""
        for split, texts in self.splits.items():
            for text in itertools.islice(texts(), self.max_documents):
                yield "val" if is_held_out(text, self.val_fraction) else split, text


def start_or_resume(part, cfg, corpus):
    """Return the tokenizer and the contents of meta.json, either new or those in the folder `part`, if an interrupted
    run of the same task left it. meta["train"] and meta["val"] count what the .bin files hold."""
    files = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in corpus.files]
    task, file = json.dumps([asdict(cfg), corpus.source, files]), part / "meta.json"
    meta = json.loads(file.read_text()) if file.exists() else {}
    if meta.get("task") == task:
        for split in ("train", "val"):  # drop the tokens of a batch that was cut off
            os.truncate(part / f"{split}.bin", meta[split]["tokens"] * np.dtype(meta["dtype"]).itemsize)
        print(f"{part}: continuing after {meta['train']['documents'] + meta['val']['documents']:,} documents")
        return Tokenizer.load(part), meta
    name = cfg.tokenizer or corpus.tokenizer
    tokenizer = make_tokenizer(name, (text for split, text in corpus.documents() if split == "train"))
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    meta = {"source": corpus.source, "tokenizer": name, "vocab_size": tokenizer.vocab_size}
    meta |= {"dtype": tokenizer.dtype.name, "train": {"documents": 0}, "val": {"documents": 0}}
    write_atomically(file, json.dumps(meta))  # before other files: output_directory() looks for the source
    tokenizer.save(part)
    return tokenizer, meta | {"task": task, "example": ""}


def tokenize(corpus, tokenizer, part, meta):
    """Encode the documents in threads (tiktoken releases the GIL). Append the tokens to the .bin files in order."""
    documents = tqdm(corpus.documents(), "tokenizing", unit=" documents", mininterval=1, disable=None)
    done, pending = meta["train"]["documents"] + meta["val"]["documents"], []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for batch in batches(itertools.islice(documents, done, None)):
            pending.append(pool.submit(encode_batch, batch, tokenizer, corpus.bits))
            if len(pending) > 2 * os.cpu_count():  # limits the texts in memory
                append_batch(part, meta, *pending.pop(0).result())
        for future in pending:
            append_batch(part, meta, *future.result())


BATCH_CHARS = 1 << 21  # characters of text in a batch; an interruption loses the batches that are being encoded
PIECE_CHARS = 1 << 14  # longest piece of a text without separators


def batches(documents):
    """Yield {"train": texts, "val": texts} with about BATCH_CHARS characters."""
    batch, size = {"train": [], "val": []}, 0
    for split, text in documents:
        batch[split].append(text)
        size += len(text)
        if size >= BATCH_CHARS:
            yield batch
            batch, size = {"train": [], "val": []}, 0
    yield batch


def encode_batch(batch, tokenizer, bits):
    """Return {split: (tokens, counts)} of a batch, and an example of a text that the tokenizer changes, or ""."""
    encoded, example, is_lossless = {}, "", tokenizer.bpe and tokenizer.bpe._pat_str == GPT2_PATTERN
    for split, texts in batch.items():
        tokens, decoded = tokenizer.encode_documents(texts).astype(tokenizer.dtype), texts
        if not is_lossless:  # others may drop characters: count the bytes of the decoded text
            decoded = [tokenizer.decode(ids) for ids in np.split(tokens, np.flatnonzero(tokens == tokenizer.eot))[:-1]]
        counts = {"tokens": len(tokens), "documents": len(texts), "bytes": sum(len(text.encode()) for text in decoded)}
        changed = [(text, read) for text, read in zip(texts, decoded, strict=True) if text != read]
        counts["changed"] = len(changed)
        for text, read in changed[:1]:
            at = max(0, sum(itertools.takewhile(bool, map(str.__eq__, text, read))) - 10)
            example = f", such as {text[at : at + 30]!r}, which becomes {read[at : at + 30]!r}"
        if bits and split == "val":
            counts["bits"] = math.fsum(map(bits, texts))
        encoded[split] = tokens, counts
    return encoded, example


def append_batch(part, meta, encoded, example):
    """Append tokens to the .bin files, then count them in meta.json, so that a run can continue after a crash."""
    meta["example"] = meta["example"] or example
    for split, (tokens, counts) in encoded.items():
        with open(part / f"{split}.bin", "ab") as f:
            f.write(tokens)
        fsync(part / f"{split}.bin")
        meta[split] = {key: meta[split].get(key, 0) + count for key, count in counts.items()}
    write_atomically(part / "meta.json", json.dumps(meta))


def report(out, meta, notes, example):
    """Print the size of the dataset, and how many rows were left out or changed. example: a change by the tokenizer."""
    print(f"\n{out}: {meta['tokenizer']} with {meta['vocab_size']:,} tokens, stored as {meta['dtype']}")
    for name in ("train", "val"):
        c = meta[name]
        print(f"{name:5}: {c['documents']:,} documents, {c['tokens']:,} tokens, {c['bytes']:,} bytes, "
              f"{c['bytes'] / c['tokens']:.3f} bytes per token")  # fmt: skip
    if meta["floor_bits_per_byte"] is not None:
        print(f"entropy floor of the validation split: {meta['floor_bits_per_byte']:.4f} bits per byte")
    for source, note in notes.items():
        if note["unreadable"]:
            print(f"{source}: left out {note['unreadable']:,} of {note['rows']:,} rows, the first: {note['first']}")
    n = {key: sum(note[key] for note in notes.values()) for key in ("unreadable", "empty", "repaired", "line_ends")}
    changed = meta["train"]["changed"] + meta["val"]["changed"]
    print(f"rows left out: {n['unreadable']:,} without a text, {n['empty']:,} empty; texts changed: {n['repaired']:,} "
          f"with an unpaired surrogate, {n['line_ends']:,} with Windows line ends, {changed:,} by the tokenizer"
          f"{example}")  # fmt: skip
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

# Bundled corpora: modules with documents(seed, count), which returns an iterator of texts (count 0: a default number);
# bits(text), which returns -log2 of the text's probability, or bits = None; and TOKENIZER, the default of --tokenizer.
# For lora.py also records(seed, count, held_out) and follows(turn, answer). See data/fable_grammar.py.
CORPORA = {"fables": "data.fable_grammar"}


def open_corpus(cfg):
    """Return the documents of --dataset. If they have no validation split, hold one out."""
    path, hub_name, notes = Path(cfg.dataset), TEXTS_ON_THE_HUB.get(cfg.dataset, cfg.dataset), {}
    if cfg.dataset in CORPORA:
        module = importlib.import_module(CORPORA[cfg.dataset])
        texts = partial(module.documents, cfg.seed, cfg.max_documents)
        corpus = Corpus(cfg.dataset, {"train": texts}, notes, module.TOKENIZER, module.bits)
    elif os.path.exists(path):
        how = cfg.separator, cfg.text_column, cfg.max_bad_rows, notes
        files = open_splits(path)
        splits = {name: partial(read_files, files[name], *how) for name in files}
        corpus = Corpus(str(path.resolve()), splits, notes, files=tuple(itertools.chain(*files.values())))
    else:
        corpus = Corpus(f"{hub_name} {cfg.subset}".strip(), open_hub(hub_name, cfg, notes), notes)
    corpus.max_documents = cfg.max_documents or None
    for split, texts in corpus.splits.items():
        if not any(map(str.strip, texts())):
            raise UserError(f"--dataset={cfg.dataset}: no text in it (for the {split} split)")
    if "val" not in corpus.splits:
        hold_out(corpus, cfg)
    elif cfg.val_fraction is not None:
        raise UserError(f"--val_fraction={cfg.val_fraction}: {path} already has a validation split: remove the flag")
    return corpus


def hold_out(corpus, cfg):
    """Set corpus.val_fraction to --val_fraction, or for few documents to the nearest share that fills both splits."""
    fraction = 0.01 if cfg.val_fraction is None else cfg.val_fraction
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
    return text_hash(text) < fraction


def split_text(text, cfg):
    """Return the splits of one long text. It is cut between paragraphs, and the last tenth is held out, as in nanoGPT.
    Each piece becomes a document: short enough that threads share the work and the model often sees an end-of-text
    token before a text, but long compared with a row of train.py. The pieces joined together are the text."""
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


def open_hub(name, cfg, notes=None):
    """Return the splits of a dataset on the Hub."""
    splits = load_dataset_from_hub(name, "dataset", cfg.subset, cfg.streaming)

    def texts(split):
        numbered = ((f"row {i}", row) for i, row in enumerate(splits[split], 1))
        return column(numbered, cfg.text_column, f"{name}, {split}", cfg.max_bad_rows, notes)

    return {split: partial(texts, split) for split in splits}


if __name__ == "__main__":
    run(main, PrepareConfig)
