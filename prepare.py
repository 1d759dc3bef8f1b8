"""
Text to tokens on disk: data/<name>/ with train.bin, val.bin, tokenizer.json and meta.json.

    python prepare.py                                             # TinyStories from the Hub, GPT-2's vocabulary
    python prepare.py --dataset=fables                            # the bundled corpus, no network
    python prepare.py --dataset=stories.txt --tokenizer=bpe:4096  # a file or folder: .txt .jsonl .json .parquet

If interrupted, run it again: it skips what is already tokenized.

The bins are flat arrays of token ids, an end-of-text token after each document. Tokenizers are stored in the Hugging
Face format and run through tiktoken where they are byte-level BPE, through `tokenizers` otherwise.
"""

import contextlib
import errno
import glob
import hashlib
import importlib
import itertools
import json
import math
import mmap
import os
import re
import shlex
import shutil
import urllib.request
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import tiktoken
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm

from config import NO_LIMIT, UserError, check_range, run, user_errors


@dataclass
class PrepareConfig:
    dataset: str = "tinystories"  # tinystories, fables, a Hub id, or a file or folder of .txt .jsonl .json .parquet
    tokenizer: str = ""  # gpt2 or another tiktoken name, bpe:SIZE to train one, a tokenizer.json; fables: bpe:2048
    name: str = ""  # write to data/<name>; by default named after the dataset
    subset: str = ""  # which configuration of a Hub dataset, as sample-10BT
    streaming: bool = False  # read a Hub dataset as it comes, for one that is too large for the disk
    text_column: str = "text"  # where the text stands in .jsonl, .json, .parquet and Hub datasets
    separator: str = "<|endoftext|>"  # what stands between the documents of a .txt file; \n in it is a line's end
    val_fraction: float | None = None  # share held out where there is no validation split; 0.01, of one plain text 0.1
    max_documents: int = 0  # stop after so many documents; 0: all of them (fables: 40,000)
    seed: int = 0  # which texts a bundled corpus generates

    def __post_init__(self):
        check_range(self, 0, 0.999, "val_fraction")
        check_range(self, 0, NO_LIMIT, "max_documents")
        self.separator = self.separator.replace(r"\n", "\n").replace(r"\t", "\t")
        if not self.separator or not self.dataset:
            raise ValueError(f"{'separator' if self.dataset else 'dataset'} is empty")


END_OF_TEXT = "<|endoftext|>"
DATA = Path(__file__).parent / "data"


def main(cfg):
    corpus = open_corpus(cfg)
    out = output_directory(cfg, corpus.source)
    part = out.with_name(out.name + ".part")  # nothing reads this name, so half a set is never taken for one
    tokenizer = start_or_resume(part, cfg, corpus)
    shards = tokenize(corpus, tokenizer, part)
    meta = {
        "source": corpus.source,
        "tokenizer": cfg.tokenizer or corpus.tokenizer,
        "vocab_size": tokenizer.vocab_size,
        "dtype": tokenizer.dtype.name,
        "train": join_shards(shards, "train", tokenizer),
        "val": join_shards(shards, "val", tokenizer),
    }
    bits = math.fsum(np.load(shard)["bits"] for shard in shards)
    meta["floor_bits_per_byte"] = bits / meta["val"]["bytes"] if corpus.bits else None
    meta["fingerprint"] = fingerprint(part, tokenizer)
    (part / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    for file in (*part.glob("shard-*"), part / "task.json"):
        file.unlink()
    atomic_replace_dir(part, out)
    report(out, meta)


@dataclass
class Corpus:
    source: str  # what meta.json names: a bundled corpus, an absolute path, or a Hub id and subset
    splits: dict[str, Callable]  # "train", perhaps "val": each call iterates anew over the texts of its documents
    tokenizer: str = "gpt2"  # unless --tokenizer names another
    bits: Callable | None = None  # text -> -log2 of its probability, where the corpus knows it
    max_documents: int | None = None  # of each split
    val_fraction: float = 0.0  # share of the training documents to hold out

    def documents(self):
        """The documents in order, as (split, text)."""
        for split, texts in self.splits.items():
            for text in itertools.islice(texts(), self.max_documents):
                yield "val" if is_held_out(text, self.val_fraction) else split, text


def start_or_resume(part, cfg, corpus):
    """The tokenizer, stored in `part`: the one there if the same preparation was cut off, else a new one."""
    files = [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in source_files(Path(cfg.dataset))]
    task = json.dumps(asdict(cfg) | {"source": corpus.source, "files": files, "shard": SHARD_CHARS})
    shards = list(part.glob("shard-*.npz"))
    if shards and (part / "task.json").read_text() == task:
        print(f"{part}: going on after {len(shards)} shards")
        return Tokenizer.load(part)
    training = (text for split, text in corpus.documents() if split == "train")
    tokenizer = make_tokenizer(cfg.tokenizer or corpus.tokenizer, training)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    (part / "task.json").write_text(task)
    tokenizer.save(part)
    return tokenizer


def tokenize(corpus, tokenizer, part):
    """Encode the documents in threads -> the files of the shards, in order. Shards that are there already are kept."""
    shards, pending = [], deque()
    documents = tqdm(corpus.documents(), "tokenizing", unit=" documents", mininterval=1, disable=None)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for batch in batches(documents):
            shards.append(part / f"shard-{len(shards):06}.npz")
            if not shards[-1].exists():
                pending.append(pool.submit(encode_shard, shards[-1], batch, tokenizer, corpus.bits))
            if len(pending) > 2 * os.cpu_count():  # only so many texts are in memory at once
                pending.popleft().result()
    for shard in pending:
        shard.result()  # raises what went wrong in its thread
    return shards


SHARD_CHARS = 1 << 21  # characters of text in a shard: what is lost of each thread's work in an interruption


def batches(documents):
    """Lists of documents of about SHARD_CHARS characters together."""
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
    """Write the tokens of [(split, text), ...], and the bits of those held out, to a file that appears when it is
    complete. tiktoken leaves Python to the other threads while it works."""
    arrays = {}
    for name in ("train", "val"):
        texts = [text for split, text in documents if split == name]
        arrays[name] = tokenizer.encode_documents(texts).astype(tokenizer.dtype)
        arrays[f"{name}_bytes"] = sum(len(text.encode()) for text in texts)
    arrays["bits"] = math.fsum(bits(text) for split, text in documents if split == "val") if bits else 0.0
    new = path.with_suffix(".new")
    with open(new, "wb") as f:
        np.savez(f, **arrays)
    fsync(new)
    os.replace(new, path)


def join_shards(shards, split, tokenizer):
    """Write the split's bin from the shards -> its counts."""
    counts = {"tokens": 0, "documents": 0, "bytes": 0}
    with open(shards[0].with_name(f"{split}.bin"), "wb") as f:
        for shard in shards:
            with np.load(shard) as arrays:
                tokens = arrays[split]
                counts["bytes"] += int(arrays[f"{split}_bytes"])
            f.write(tokens.tobytes())
            counts["tokens"] += len(tokens)
            counts["documents"] += int((tokens == tokenizer.eot).sum())
    return counts


def fingerprint(path, tokenizer):
    """What tells one prepared set from another: a digest of its token ids and of what they mean."""
    digest = hashlib.blake2b(tokenizer.dtype.name.encode(), digest_size=16)
    digest.update(json.dumps(tokenizer.spec["model"], sort_keys=True).encode())
    for name in ("train.bin", "val.bin"):
        with open(path / name, "rb") as f:
            digest.update(hashlib.file_digest(f, hashlib.blake2b).digest())
    return digest.hexdigest()


def report(out, meta):
    print(f"\n{out}: {meta['tokenizer']} with {meta['vocab_size']:,} tokens, stored as {meta['dtype']}")
    for name in ("train", "val"):
        c = meta[name]
        print(f"{name:5}: {c['documents']:,} documents, {c['tokens']:,} tokens, {c['bytes']:,} bytes, "
              f"{c['bytes'] / c['tokens']:.3f} bytes a token")  # fmt: skip
    if meta["floor_bits_per_byte"] is not None:
        print(f"entropy floor of the validation split: {meta['floor_bits_per_byte']:.4f} bits per byte")
    recipe, name = DATA.parent / "config" / f"train_{out.name}.py", shlex.quote(out.name)
    other = f"train_tinystories_cpu.py --dataset={name} --out_dir=out/{name}"
    print(f"next: python train.py config/{recipe.name if recipe.exists() else other}")


# ---- what is on the disk stays whole, and what is not ours is left alone ---------------------------------------------


def atomic_replace_dir(new, old):
    """Put the finished directory `new` in the place of `old`. At every moment one of them is there and whole, also
    after a power cut; intact_dir finds it."""
    for path in (*new.iterdir(), new):
        fsync(path)
    aside = old.with_name(old.name + ".replaced")
    if old.exists():  # else a crash left it aside, where it stays until the new one is in place
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(old, aside)
    os.replace(new, old)
    fsync(old.parent)
    shutil.rmtree(aside, ignore_errors=True)


def intact_dir(path):
    """path, or where a crash in the middle of atomic_replace_dir left it."""
    aside = path.with_name(path.name + ".replaced")
    return path if path.exists() or not aside.exists() else aside


def fsync(path):
    """Wait until a file, or a directory's list of files, is on the disk."""
    is_dir = os.path.isdir(path)
    try:
        handle = os.open(path, os.O_RDONLY if is_dir else os.O_RDWR)  # Windows syncs only what it may write to
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as e:
        # Windows opens no directories, and some filesystems can't sync them: what they list is written all the same
        if not is_dir or e.errno not in (errno.EACCES, errno.EINVAL, errno.ENOTSUP):
            raise


def output_directory(cfg, source):
    """data/<name>, where there is nothing yet or a set from the same source."""
    path = Path(cfg.dataset)
    name = cfg.name or (path.resolve().stem if os.path.exists(path) else path.name)
    plain = name.isprintable() and len(name.encode()) <= 200 and not re.search(r"[/\\]|\.(part|replaced)$", name)
    if not plain or name in ("", ".", ".."):
        raise UserError(f"--name={name!r}: give the plain name of a folder in data/, without .part or .replaced")
    out = DATA / name
    for suffix in ("", ".part", ".replaced"):
        check_is_ours(out.with_name(name + suffix), source)
    if intact_dir(out) != out:
        os.replace(intact_dir(out), out)
    return out


def check_is_ours(path, source):
    """Refuse to replace anything but an empty folder or a set, finished or half, that was prepared from this source."""
    is_dir = path.is_dir() and not path.is_symlink()
    if not os.path.lexists(path) or (is_dir and not os.listdir(path)):
        return
    found, fix = None, "choose another --name, or delete it"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        about = path / ("meta.json" if (path / "meta.json").exists() else "task.json")
        found = json.loads(about.read_text())["source"]
    if found is None or not is_dir:
        raise UserError(f"{path} is there and is not a prepared set: {fix}")
    if found != source:
        raise UserError(f"{path} was prepared from {found}, not from {source}: {fix}")


# ---- tokenizers ------------------------------------------------------------------------------------------------------


class Tokenizer:
    """A tokenizer in the Hugging Face format. Text is text: no special token is ever read out of it."""

    def __init__(self, spec, config=None):
        """spec: the dict of a tokenizer.json. config: of the tokenizer_config.json that came with it, if one did."""
        # truncation and padding are leftovers of someone's fine-tuning
        self.spec = spec = spec | {"truncation": None, "padding": None}
        self.config = config or {}
        special = {t["content"]: t["id"] for t in spec["added_tokens"] if t["special"]}
        named = self.config.get("eos_token")
        usual = [named["content"] if isinstance(named, dict) else named]
        usual += [END_OF_TEXT, "<eos>", "</s>", "<|end_of_text|>"]
        if not special.keys() & set(usual):
            raise ValueError(f"no end-of-text token: none of {', '.join(usual[1:])} is in added_tokens")
        self.eot_token = next(name for name in usual if name in special)
        self.bos_token = next((t for t in ("<bos>", "<s>", "<|begin_of_text|>") if t in special), self.eot_token)
        self.pad_token = "<pad>" if "<pad>" in special else self.eot_token
        self.eot = special[self.eot_token]
        self.bos = special[self.bos_token]  # what a text begins after
        self.pad = special[self.pad_token]
        self.special_ids = set(special.values())
        # ids that a text can have: a tokenizer may name more special tokens than its models have rows for
        ids, plain = spec["model"]["vocab"].values(), [t["id"] for t in spec["added_tokens"] if not t["special"]]
        if len(set(ids)) < len(ids):
            raise ValueError("two tokens of the vocabulary have the same id")
        self.text_ids = {*ids, *plain} - self.special_ids
        self.vocab_size = 1 + max(*self.text_ids, self.eot, self.bos)
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 2**16 else np.uint32)  # in the bins
        self.bpe = byte_level_bpe(spec, special)
        if self.bpe is None:
            self.hf = tokenizers.Tokenizer.from_str(json.dumps(spec))
            self.hf.encode_special_tokens = True  # as plain text

    @classmethod
    def load(cls, path):
        """Read a tokenizer.json, or the one in a directory, and what lies beside it."""
        path = Path(path)
        path = path / "tokenizer.json" if path.is_dir() else path
        beside, chat = path.with_name("tokenizer_config.json"), path.with_name("chat_template.jinja")
        with user_errors(f"{path}: not a tokenizer.json that can be used"):
            spec = json.loads(path.read_text(encoding="utf-8"))
            config = json.loads(beside.read_text(encoding="utf-8")) if beside.exists() else {}
            if chat.exists():
                config["chat_template"] = chat.read_text(encoding="utf-8")
            return cls(spec, config)

    def save(self, path):
        """Write the files that transformers' AutoTokenizer opens: tokenizer.json and tokenizer_config.json."""
        if not self.spec.get("post_processor"):  # so that other programs start texts with our token
            hf = tokenizers.Tokenizer(models.BPE())
            special_tokens = [(self.bos_token, self.bos)]
            hf.post_processor = processors.TemplateProcessing(f"{self.bos_token} $A", special_tokens=special_tokens)
            self.spec["post_processor"] = json.loads(hf.to_str())["post_processor"]
        (path / "tokenizer.json").write_text(json.dumps(self.spec, ensure_ascii=False), encoding="utf-8")
        names = {"bos_token": self.bos_token, "eos_token": self.eot_token, "pad_token": self.pad_token}
        about = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
        about |= self.config  # what a published tokenizer came with goes on with it
        (path / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n")

    def encode(self, text, markers=False):
        """str -> uint32 array of token ids. With markers, the names of special tokens in it become those tokens: for
        templates of our own, never for text from outside."""
        if self.bpe:
            allowed = "all" if markers else set()
            return self.bpe.encode_to_numpy(text, allowed_special=allowed, disallowed_special=())
        if markers:
            self.hf.encode_special_tokens = False
        ids = self.hf.encode(text, add_special_tokens=False).ids
        if markers:
            self.hf.encode_special_tokens = True
        return np.array(ids, dtype=np.uint32)

    def encode_documents(self, texts):
        """Texts -> uint32 array of the token ids of all of them, each followed by end-of-text."""
        if self.bpe and not any(self.eot_token in text for text in texts):
            # one call for many: what stands between special tokens is encoded by itself, and Python's lock is free
            joined = "".join(text + self.eot_token for text in texts)
            return self.bpe.encode_to_numpy(joined, allowed_special={self.eot_token}, disallowed_special=())
        ended = [np.append(self.encode(text), np.uint32(self.eot)) for text in texts]
        return np.concatenate([np.zeros(0, dtype=np.uint32), *ended])

    def decode(self, ids):
        """Token ids -> str, special tokens left out. An incomplete character at the end becomes U+FFFD."""
        # an embedding may have more rows than the tokenizer has entries: those decode to nothing
        ids = [int(i) for i in ids if int(i) in self.text_ids]
        return self.bpe.decode(ids) if self.bpe else self.hf.decode(ids)


def byte_level_bpe(spec, special):
    """The tiktoken encoding equal to a tokenizer.json, or None where it is not a plain byte-level BPE."""
    model, split = {"type": "BPE"} | spec["model"], spec.get("pre_tokenizer") or {}
    steps = split.get("pretokenizers", [split])
    *before, last = steps
    if model["type"] != "BPE" or spec.get("normalizer") or last.get("type") != "ByteLevel" or last["add_prefix_space"]:
        return None
    if model.get("byte_fallback") or model.get("dropout") or len(before) + last.get("use_regex", True) != 1:
        return None
    pattern = GPT2_PATTERN
    if before:
        if before[0]["type"] != "Split" or before[0]["behavior"] != "Isolated" or "Regex" not in before[0]["pattern"]:
            return None
        pattern = before[0]["pattern"]["Regex"]
    byte = {char: value for value, char in BYTE_TO_CHAR.items()}
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    order = [model["vocab"].get(a + b) for a, b in merges]
    # tiktoken merges in the order of token ids, so ids must rise with the merges
    if None in order or order != sorted(set(order)) or not byte.keys() <= model["vocab"].keys():
        return None
    ranks = {
        bytes(byte[c] for c in token): rank
        for token, rank in model["vocab"].items()
        if token not in special and all(c in byte for c in token)
    }
    if len(ranks) != 256 + len(merges):
        return None
    return tiktoken.Encoding("ours", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


# how GPT-2 cuts text into words before merging
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# GPT-2's printable stand-ins for bytes: what prints stands for itself, the rest moves up past 255
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTE_TO_CHAR = {b: chr(b) for b in PRINTABLE}
BYTE_TO_CHAR |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in BYTE_TO_CHAR)}


def spec_of_tiktoken(encoding):
    """The dict of a tokenizer.json equal to a tiktoken encoding. tiktoken keeps the merged tokens only; the pair each
    came from is what its bytes merge to when just the earlier tokens are allowed."""
    ranks = encoding._mergeable_ranks
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda x: x[1]):
        if len(token) > 1:
            parts = [token[i : i + 1] for i in range(len(token))]
            while len(parts) > 2:
                pairs = [ranks.get(a + b, rank) for a, b in itertools.pairwise(parts)]
                at = pairs.index(min(pairs))
                parts[at : at + 2] = [parts[at] + parts[at + 1]]
            merges.append(tuple(map(printable, parts)))
    vocab = {printable(token): rank for token, rank in ranks.items()}
    if encoding.name == "gpt2":
        pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        # the two regex dialects differ: to Oniguruma, {1,3}+ repeats the repetition and $ ends any line
        pattern = encoding._pat_str.replace("{1,3}+", "{1,3}").replace("$", r"\z")
        cut = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        pre_tokenizer = pre_tokenizers.Sequence([cut, byte_level])
    hf = tokenizers.Tokenizer(models.BPE(vocab, merges))
    hf.pre_tokenizer, hf.decoder = pre_tokenizer, decoders.ByteLevel()
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    special = sorted(encoding._special_tokens.items(), key=lambda x: x[1])
    return json.loads(hf.to_str()) | {"added_tokens": [{"id": i, "content": name, **flags} for name, i in special]}


def printable(token):
    return "".join(BYTE_TO_CHAR[b] for b in token)


def train_bpe(texts, vocab_size):
    """Train a byte-level BPE of vocab_size entries, the last of them end-of-text, on an iterator of texts -> the dict
    of its tokenizer.json."""
    hf = tokenizers.Tokenizer(models.BPE())
    hf.pre_tokenizer, hf.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
    hf.train_from_iterator(texts, trainer)
    hf.add_special_tokens([END_OF_TEXT])
    return json.loads(hf.to_str())


def make_tokenizer(name, texts):
    """The tokenizer that --tokenizer names; on texts, an iterator, bpe:SIZE is trained."""
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


def is_hub_id(name):
    """Whether a name reads like USER/REPOSITORY, and nothing lies there on this disk."""
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name))) and not os.path.exists(name)


def hub_directory(name, files=("*.json", "*.safetensors", "*.jinja")):
    """`name` as a path; where it is a Hub id, a download of that repository's files."""
    if not is_hub_id(name):
        return Path(name)
    with user_errors(f"{name}: not a directory here, and not to be had from the Hugging Face Hub"):
        look_for_hub()
        from huggingface_hub import errors, snapshot_download

        try:
            return Path(snapshot_download(name, allow_patterns=list(files)))
        except errors.RepositoryNotFoundError as e:
            why = "neither a directory here nor a repository on the Hub (a private one needs `hf auth login`)"
            if isinstance(e, errors.GatedRepoError):
                why = f"gated: accept its terms at https://huggingface.co/{name}, then log in with `hf auth login`"
            raise UserError(f"{name}: {why}") from None


# ---- corpora ---------------------------------------------------------------------------------------------------------

# Bundled corpora, each a module that provides documents(seed, count), an iterator of texts (count 0: its own number);
# bits(text), -log2 of the probability that it generates this text, or None in place of the function; and TOKENIZER,
# the value that --tokenizer has by default. For lora.py --data also records(seed, count, held_out), conversations, and
# follows(turn, answer), whether an answer does what was asked (data/fable_grammar.py says what these are).
CORPORA = {"fables": "data.fable_grammar"}
ON_THE_HUB = {"tinystories": "roneneldan/TinyStories"}  # datasets with a name of their own here


def open_corpus(cfg):
    """The documents of --dataset. Where they have no validation split, one is held out."""
    path, hub_name = Path(cfg.dataset), ON_THE_HUB.get(cfg.dataset, cfg.dataset)
    if cfg.dataset in CORPORA:
        module = importlib.import_module(CORPORA[cfg.dataset])
        texts = partial(module.documents, cfg.seed, cfg.max_documents)
        corpus = Corpus(cfg.dataset, {"train": texts}, module.TOKENIZER, module.bits)
    elif os.path.exists(path):
        corpus = Corpus(str(path.resolve()), open_files(path, cfg))
    elif re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", hub_name) and path.suffix not in SUFFIXES:
        corpus = Corpus(f"{hub_name} {cfg.subset}".strip(), open_hub(hub_name, cfg))
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
    """Choose the share that is_held_out goes by: val_fraction, or, of few documents, what leaves some on both sides."""
    fraction = 0.01 if cfg.val_fraction is None else cfg.val_fraction
    if not fraction:
        raise UserError("--val_fraction=0 holds out nothing, and the dataset has no validation split: raise it")
    lowest, highest = 1.0, 0.0
    for _, text in corpus.documents():
        lowest, highest = min(lowest, text_hash(text)), max(highest, text_hash(text))
        if lowest < fraction <= highest:
            break
    if lowest == highest:  # one document
        corpus.splits, corpus.bits = split_text(text, cfg), None
        corpus.max_documents = None  # its pieces are no documents
        return
    corpus.val_fraction = min(max(fraction, math.nextafter(lowest, 1)), highest)
    if corpus.val_fraction != fraction:
        print(f"few documents: --val_fraction={corpus.val_fraction:.3f} in place of {fraction} splits them")


def text_hash(text):
    """A number in 0..1 drawn from the text alone, so that neither order nor duplicates can change it."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64


def is_held_out(text, fraction):
    """Whether a document belongs to the validation split."""
    return fraction > 0 and text_hash(text) < fraction


PIECE_CHARS = 1 << 14


def split_text(text, cfg):
    """The splits of one long text: pieces of whole paragraphs, the last tenth of them held out, as in nanoGPT.

    A piece stands for a document: small enough for many threads, with starts enough that a model learns to write after
    an end-of-text token, where generation begins, and so long that few rows of train.py are cut short by an end. Pieces
    are not stripped: together they are the text."""
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
    print(f"{cfg.dataset}: one text without separators, cut into {len(pieces)} pieces; held out are the last "
          f"{len(pieces) - first}")  # fmt: skip
    return {"train": pieces[:first].__iter__, "val": pieces[first:].__iter__}


def open_files(path, cfg):
    files = source_files(path)
    if not files:
        raise UserError(f"{path}: no {', '.join(SUFFIXES)} file here")
    held_out = [f for f in files if names_split("val|valid|validation|dev", f, path)]
    if held_out and (tests := [f for f in files if names_split("test", f, path)]):
        print(f"{path}: left out, as tests: {', '.join(f.name for f in tests)}")
        files = [f for f in files if f not in tests]
    if not held_out or len(held_out) == len(files):
        return {"train": partial(read_files, files, cfg)}
    rest = [f for f in files if f not in held_out]
    return {"train": partial(read_files, rest, cfg), "val": partial(read_files, held_out, cfg)}


def names_split(words, file, folder):
    """Whether a file of a corpus, or a folder that it is in, is called one of these words, as in tiny-valid.txt."""
    name = str(file.relative_to(folder).with_suffix("")) if folder.is_dir() else ""
    return re.search(rf"(^|[-_. /\\])({words})([-_. /\\]|$)", name)


SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")


def source_files(path):
    """The files of a local corpus; of a folder, those that are not hidden."""
    files = sorted(path / name for name in glob.glob("**", root_dir=path, recursive=True)) or [path]
    return [f for f in files if f.suffix.lower() in SUFFIXES and os.path.isfile(f)]


def read_files(files, cfg):
    for path in files:
        if path.suffix.lower() == ".txt":
            yield from read_txt(path, os.fsencode(cfg.separator))
        else:
            yield from column(read_rows(path), cfg.text_column, path)


def read_txt(path, separator):
    """The documents of a text file, one at a time, so that its size does not matter."""
    if not os.path.getsize(path):
        return
    with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as text:
        start, windows = 0, separator.replace(b"\n", b"\r\n")  # how Windows ends lines
        separator = windows if text.find(separator) < 0 <= text.find(windows) else separator
        while start < len(text):
            end = text.find(separator, start)
            end = len(text) if end < 0 else end
            try:
                document = text[start:end].decode("utf-8").removeprefix("\ufeff").strip()  # a mark of Windows
            except UnicodeDecodeError as e:
                raise UserError(f"{path}: not UTF-8 at byte {start + e.start}; convert it, as with iconv") from None
            if document:
                yield document
            start = end + len(separator)


def read_rows(path):
    """The rows of a .json, .jsonl or .parquet file, dicts, one at a time. Values are as they stand there: `datasets`
    would give a column one type, and change texts beside a number."""
    kind, count = path.suffix.lower().lstrip("."), 0
    with user_errors(f"{path}: not readable as {kind}, or empty"):
        for count, row in enumerate(read_parquet(path) if kind == "parquet" else read_json_rows(path), 1):
            if not isinstance(row, dict):
                raise ValueError(f"row {count} is not an object, but {type(row).__name__}")
            yield row
        if not count:
            raise ValueError("no row in it")


def read_parquet(path):
    from pyarrow.parquet import ParquetFile  # slow to import

    for batch in ParquetFile(path).iter_batches(1000):
        yield from batch.to_pylist()


def read_json_rows(path):
    """Of a list, or of one object a line."""
    with open(path, encoding="utf-8-sig") as f:
        is_list = f.read(1000).lstrip().startswith("[")
        f.seek(0)
        yield from json.load(f) if is_list else map(json.loads, filter(str.strip, f))


def column(rows, name, source):
    """The texts in a column of rows, as read_rows or the Hub gives them."""
    with user_errors(f"{source}: no further row can be read"):
        for i, row in enumerate(rows):
            if not isinstance(row.get(name), str | None) or (i == 0 and name not in row):
                kinds = ", ".join(f"{key} ({type(value).__name__})" for key, value in row.items())
                raise UserError(f"{source}: no text in a column {name!r}; choose --text_column from {kinds}")
            # JSON can name half a character
            if text := (row.get(name) or "").encode(errors="replace").decode().strip():
                yield text


def open_hub(name, cfg):
    splits = load_from_hub(name, "dataset", cfg.subset, cfg.streaming)
    train = "train" if "train" in splits else next(iter(splits))
    found = {"train": train} | ({"val": "validation"} if "validation" in splits and train != "validation" else {})
    return {k: partial(column, splits[split], cfg.text_column, name) for k, split in found.items()}


def load_from_hub(name, flag, subset="", streaming=False):
    """The splits of a dataset on the Hub. flag: the setting that names it."""
    with user_errors(f"--{flag}={name}: not a file or folder here, and not to be had from the Hugging Face Hub"):
        look_for_hub()
        import datasets  # slow to import

        return datasets.load_dataset(name, subset or None, streaming=streaming)


def look_for_hub():
    """Where the Hub can't be reached, tell its library, which would otherwise try for half a minute before it looks
    for what it has downloaded earlier."""
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if "HF_HUB_OFFLINE" in os.environ:  # they have been told
        return
    try:
        urllib.request.urlopen(urllib.request.Request(hub, method="HEAD"), timeout=10).close()
    except urllib.error.HTTPError:
        pass  # it answered
    except OSError as e:
        print(f"{hub} can't be reached ({getattr(e, 'reason', e)}): looking for what was downloaded before")
        os.environ["HF_HUB_OFFLINE"] = "1"


if __name__ == "__main__":
    run(main, PrepareConfig)
