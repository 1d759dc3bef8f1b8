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
import io
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
from support.documents import check_bad_rows, column, open_splits, read_files, source_files
from support.files import atomic_replace_dir, lock_folder, write_atomically
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
        check_range(self, 0, 0.999, "val_fraction")
        check_range(self, 0, 1, "max_bad_rows")
        self.separator = self.separator.replace(r"\n", "\n").replace(r"\t", "\t")
        if not self.separator or not self.dataset:
            raise ValueError(f"{'separator' if self.dataset else 'dataset'} is empty")


def main(cfg):
    corpus = open_corpus(cfg)
    out = output_directory(cfg.dataset, cfg.name, corpus.source)
    part = out.with_name(out.name + ".part")  # no script reads this name, so no script reads half a dataset
    with lock_folder(out):
        tokenizer = start_or_resume(part, cfg, corpus)
        shards = tokenize(corpus, tokenizer, part)
        for source, note in corpus.notes.items():  # max_documents can stop column() before its final check
            check_bad_rows(source, note, cfg.max_bad_rows)
        figures = [json.loads(str(np.load(shard)["figures"])) for shard in shards]
        meta = {"source": corpus.source, "tokenizer": cfg.tokenizer or corpus.tokenizer}
        meta |= {"vocab_size": tokenizer.vocab_size, "dtype": tokenizer.dtype.name}
        for split in ("train", "val"):
            with open(part / f"{split}.bin", "wb") as f:
                f.writelines(np.load(shard)[split].tobytes() for shard in shards)
            meta[split] = {key: sum(found[split][key] for found in figures) for key in figures[0][split]}
        bits = math.fsum(found["bits"] for found in figures)
        meta["floor_bits_per_byte"] = bits / meta["val"]["bytes"] if corpus.bits else None
        meta["fingerprint"] = fingerprint(part, tokenizer)
        (part / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
        for file in (*part.glob("shard-*"), part / "task.json"):
            file.unlink()
        atomic_replace_dir(part, out)
    report(out, meta, corpus.notes, next((found["example"] for found in figures if found["example"]), ""))


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

    def documents(self):
        """Yield the documents in order, as (split, text)."""
        for split, texts in self.splits.items():
            for text in itertools.islice(texts(), self.max_documents):
                yield "val" if is_held_out(text, self.val_fraction) else split, text


def start_or_resume(part, cfg, corpus):
    """Return the tokenizer in the folder `part`. Create it, unless an interrupted run of the same task left one."""
    files = [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in source_files(Path(cfg.dataset))[0]]
    task = json.dumps(asdict(cfg) | {"source": corpus.source, "files": files, "shards": SHARD_CHARS})
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
    shards, pending = [], []
    documents = tqdm(corpus.documents(), "tokenizing", unit=" documents", mininterval=1, disable=None)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for batch in batches(documents):
            shards.append(part / f"shard-{len(shards):06}.npz")
            if not shards[-1].exists():
                pending.append(pool.submit(encode_shard, shards[-1], batch, tokenizer, corpus.bits))
            if len(pending) > 2 * os.cpu_count():  # limits the texts in memory
                pending.pop(0).result()
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
    """Write the tokens and figures of [(split, text), ...] to a file, which appears when it is complete. tiktoken
    releases the GIL, so threads are enough."""
    arrays, figures, content = {}, {"example": ""}, io.BytesIO()  # example: a text that the tokenizer changes
    is_lossless = tokenizer.bpe and tokenizer.bpe._pat_str == GPT2_PATTERN
    for name in ("train", "val"):
        texts = decoded = [text for split, text in documents if split == name]
        arrays[name] = tokens = tokenizer.encode_documents(texts).astype(tokenizer.dtype)
        if not is_lossless:  # others may drop characters: count the bytes of the decoded text
            decoded = [tokenizer.decode(ids) for ids in np.split(tokens, np.flatnonzero(tokens == tokenizer.eot))[:-1]]
        changed = [(text, read) for text, read in zip(texts, decoded, strict=True) if text != read]
        figures[name] = {"tokens": len(tokens), "documents": len(texts)}
        figures[name] |= {"bytes": sum(len(text.encode()) for text in decoded), "changed": len(changed)}
        for text, read in changed[:1]:
            num_equal = sum(itertools.takewhile(bool, map(str.__eq__, text, read)))
            at = max(0, num_equal - 10)
            figures["example"] = f"{text[at : at + 30]!r} becomes {read[at : at + 30]!r}"
    figures["bits"] = math.fsum(bits(text) for split, text in documents if split == "val") if bits else 0.0
    np.savez(content, **arrays, figures=json.dumps(figures))
    write_atomically(path, content.getvalue())


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
        elif not note["rows"]:
            print(f"{source}: no text in it")
    n = {key: sum(note[key] for note in notes.values()) for key in ("unreadable", "empty", "repaired", "line_ends")}
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
        corpus = Corpus(cfg.dataset, {"train": texts}, notes, module.TOKENIZER, module.bits)
    elif os.path.exists(path):
        how = cfg.separator, cfg.text_column, cfg.max_bad_rows, notes
        splits = {name: partial(read_files, files, *how) for name, files in open_splits(path).items()}
        corpus = Corpus(str(path.resolve()), splits, notes)
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


def open_hub(name, cfg, notes=None):
    """Return the splits of a dataset on the Hub."""
    splits = load_dataset_from_hub(name, "dataset", cfg.subset, cfg.streaming)

    def texts(split):
        numbered = ((f"row {i}", row) for i, row in enumerate(splits[split], 1))
        return column(numbered, cfg.text_column, f"{name}, {split}", cfg.max_bad_rows, notes)

    return {split: partial(texts, split) for split in splits}


if __name__ == "__main__":
    run(main, PrepareConfig)
