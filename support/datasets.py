"""Prepared datasets: data/<name>/ with train.bin, val.bin, tokenizer.json and meta.json, as prepare.py writes them."""

import contextlib
import hashlib
import json
import os
import re
from collections import namedtuple
from pathlib import Path

import numpy as np

from model import read_json
from support.files import latest_intact_dir
from support.settings import UserError, user_errors
from support.tokenizer import Tokenizer

DATA = Path(__file__).parent.parent / "data"
Dataset = namedtuple("Dataset", ["path", "meta", "tokenizer"])  # meta: the contents of meta.json


def open_dataset(name):
    """Open data/<name>. Raises UserError if it is missing or damaged."""
    with user_errors(f"--dataset={name!r}"):
        path = latest_intact_dir(DATA / name)
        if not (path / "meta.json").exists():
            why = " (its preparation was interrupted)" if path.with_name(f"{path.name}.part").exists() else ""
            raise UserError(f"--dataset={name}: no such dataset in {DATA}{why}; run python prepare.py --dataset={name}")
    tokenizer = Tokenizer.load(path)
    with user_errors(f"{path / 'meta.json'} does not match the files beside it, prepare the dataset again"):
        meta = read_json(path / "meta.json")
        if meta["vocab_size"] != tokenizer.vocab_size:
            raise ValueError(f"vocab_size {meta['vocab_size']}, tokenizer.json has {tokenizer.vocab_size}")
        if meta["dtype"] not in ("uint16", "uint32") or not isinstance(meta["floor_bits_per_byte"], float | None):
            raise ValueError("dtype or floor_bits_per_byte has the wrong type")
        for split in ("train", "val"):
            size, tokens = (path / f"{split}.bin").stat().st_size, meta[split]["tokens"]
            if not (tokens > 0 < meta[split]["bytes"]):
                raise ValueError(f"no tokens in {split}")
            if size != (expected := tokens * np.dtype(meta["dtype"]).itemsize):
                raise ValueError(f"{tokens} tokens in {split}.bin are {expected} bytes, the file has {size}")
    return Dataset(path, meta, tokenizer)


def document_ends(tokens, path, tokenizer):
    """Return the positions of the end-of-text tokens. Raises UserError for a token beyond the vocabulary."""
    ends = []
    for i in range(0, len(tokens), 2**24):  # piece by piece, to save memory
        piece = tokens[i : i + 2**24]
        if (largest := int(piece.max())) >= tokenizer.vocab_size:
            found = f"token {i + int(piece.argmax())} is {largest}, beyond the vocabulary of {tokenizer.vocab_size}"
            raise UserError(f"{path}: {found}: prepare it again")
        ends.append(np.flatnonzero(piece == tokenizer.eot) + i)
    return np.concatenate(ends)


def fingerprint(path, tokenizer):
    """Return a digest of a prepared dataset's token ids and vocabulary."""
    digest = hashlib.blake2b(tokenizer.dtype.name.encode(), digest_size=16)
    digest.update(json.dumps(tokenizer.spec["model"], sort_keys=True).encode())
    for name in ("train.bin", "val.bin"):
        with open(path / name, "rb") as f:
            digest.update(hashlib.file_digest(f, hashlib.blake2b).digest())
    return digest.hexdigest()


def output_directory(dataset, name, source):
    """Return data/<name>. Raises UserError if it holds anything but a dataset prepared from the same source."""
    path = Path(dataset)
    name = name or (path.resolve().stem if os.path.exists(path) else path.name)
    if not name.isprintable() or len(name.encode()) > 200 or re.search(r"[/\\]|^\.{0,2}$|\.(part|replaced)$", name):
        raise UserError(f"--name={name!r}: give the plain name of a folder in data/, without .part or .replaced")
    out = DATA / name
    for suffix in ("", ".part", ".replaced"):
        folder, found, fix = out.with_name(name + suffix), None, "choose another --name, or delete it"
        is_dir = folder.is_dir() and not folder.is_symlink()
        if not os.path.lexists(folder) or (is_dir and not os.listdir(folder)):
            continue
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found = json.loads((folder / "meta.json").read_text())["source"]
        if found is None or not is_dir:
            raise UserError(f"{folder} exists and is not a prepared dataset: {fix}")
        if found != source:
            raise UserError(f"{folder} was prepared from {found}, not from {source}: {fix}")
    if latest_intact_dir(out) != out:
        os.replace(latest_intact_dir(out), out)
    return out
