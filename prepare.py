"""
Text to tokens on disk: data/<name>/ with train.bin, val.bin, tokenizer.json and meta.json.

    python prepare.py                                             # TinyStories from the Hub, GPT-2's vocabulary
    python prepare.py --dataset=fables                            # the bundled corpus, no network
    python prepare.py --dataset=stories.txt --tokenizer=bpe:4096  # a file or folder: .txt .jsonl .json .parquet

A preparation that was cut off goes on where it stood when it is started again.

The bins are flat arrays of token ids, an end-of-text token after each document. Tokenizers are stored in the Hugging
Face format and run through tiktoken where they are byte-level BPE, through `tokenizers` otherwise.
"""

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import tiktoken
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from config import NO_LIMIT, UserError, check_range, run


@dataclass
class PrepareConfig:
    dataset: str = "tinystories"  # tinystories, fables, a Hub id, or a file or folder of .txt .jsonl .json .parquet
    tokenizer: str = ""  # gpt2 or another tiktoken name, bpe:SIZE to train one, a tokenizer.json; fables: bpe:2048
    name: str = ""  # write to data/<name>; by default named after the dataset
    subset: str = ""  # which configuration of a Hub dataset, as sample-10BT
    streaming: bool = False  # read a Hub dataset as it comes, for one that is too large for the disk
    text_column: str = "text"  # where the text stands in .jsonl, .json, .parquet and Hub datasets
    separator: str = "<|endoftext|>"  # what stands between the documents of a .txt file
    val_fraction: float = 0.01  # share of documents held out, where the dataset has no validation split
    max_documents: int = 0  # stop after so many documents; 0: all of them (fables: 40,000)
    seed: int = 0  # which fables are told

    def __post_init__(self):
        check_range(self, 0, 0.999, "val_fraction")
        check_range(self, 0, NO_LIMIT, "max_documents")
        if not self.separator:
            raise ValueError("separator is empty: name what stands between documents")


END_OF_TEXT = "<|endoftext|>"
DATA = Path(__file__).parent / "data"

# ----------------------------------------------------------------------------------------------------------------------
# tokenizers


class Tokenizer:
    """A tokenizer in the Hugging Face format. Text is text: no special token is ever read out of it."""

    def __init__(self, spec, config=None):
        """spec: the dict of a tokenizer.json. config: of the tokenizer_config.json that came with it, if one did."""
        self.spec, self.config = spec, config or {}
        special = {t["content"]: t["id"] for t in spec["added_tokens"] if t["special"]}
        named = self.config.get("eos_token")
        usual = [named["content"] if isinstance(named, dict) else named]
        usual += [END_OF_TEXT, "<eos>", "</s>", "<|end_of_text|>"]
        self.eot_token = next((name for name in usual if name in special), None)
        if self.eot_token is None:
            raise UserError(
                f"the tokenizer has no end-of-text token: none of {', '.join(usual[1:])} is in added_tokens"
            )
        self.bos_token = next((t for t in ("<bos>", "<s>", "<|begin_of_text|>") if t in special), self.eot_token)
        self.pad_token = "<pad>" if "<pad>" in special else self.eot_token
        self.eot = special[self.eot_token]
        self.bos = special[self.bos_token]  # what a text begins after
        self.pad = special[self.pad_token]
        self.special_ids = set(special.values())
        # ids that a text can have: a tokenizer may name more special tokens than its models have rows for
        plain = [t["id"] for t in spec["added_tokens"] if not t["special"]]
        if len(set(spec["model"]["vocab"].values())) < len(spec["model"]["vocab"]):
            raise UserError("two tokens of the vocabulary have the same id")
        self.text_ids = {*spec["model"]["vocab"].values(), *plain} - self.special_ids
        self.vocab_size = 1 + max(*self.text_ids, self.eot, self.bos)
        self.bpe = byte_level_bpe(spec, special)
        if self.bpe is None:
            self.hf = tokenizers.Tokenizer.from_str(json.dumps(spec))
            self.hf.encode_special_tokens = True

    @classmethod
    def load(cls, path):
        """Read a tokenizer.json, or the one in a directory, and what lies beside it."""
        path = Path(path)
        path = path / "tokenizer.json" if path.is_dir() else path
        beside, chat = path.with_name("tokenizer_config.json"), path.with_name("chat_template.jinja")
        if not path.exists():
            raise UserError(f"{path}: no such file")
        try:
            spec = json.loads(path.read_text(encoding="utf-8"))
            config = json.loads(beside.read_text(encoding="utf-8")) if beside.exists() else {}
            if chat.exists():
                config["chat_template"] = chat.read_text(encoding="utf-8")
            return cls(spec, config)
        except UserError as e:
            raise UserError(f"{path}: {e}") from None
        except Exception as e:  # whatever is odd in it
            raise UserError(f"{path}: not a tokenizer.json: {type(e).__name__}: {str(e)[:200]}") from None

    def save(self, path):
        """Write the files that transformers' AutoTokenizer opens: tokenizer.json and tokenizer_config.json."""
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
        end = np.array([self.eot], dtype=np.uint32)
        return np.concatenate([part for text in texts for part in (self.encode(text), end)])

    def decode(self, ids):
        """Token ids -> str, special tokens left out. An incomplete character at the end becomes U+FFFD."""
        # an embedding may have more rows than the tokenizer has entries: those decode to nothing
        ids = [int(i) for i in ids if int(i) in self.text_ids]
        return self.bpe.decode(ids) if self.bpe else self.hf.decode(ids)


def byte_level_bpe(spec, special):
    """The tiktoken encoding equal to a tokenizer.json, or None where it is no plain byte-level BPE."""
    model, split = spec["model"], spec.get("pre_tokenizer") or {}
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


def tokenizer_spec(vocab, merges, pre_tokenizer, special):
    """The dict of a tokenizer.json for a byte-level BPE."""
    hf = tokenizers.Tokenizer(models.BPE(vocab, merges))
    hf.pre_tokenizer, hf.decoder = pre_tokenizer, decoders.ByteLevel()
    spec = json.loads(hf.to_str())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    spec["added_tokens"] = [
        {"id": i, "content": name, **flags} for name, i in sorted(special.items(), key=lambda x: x[1])
    ]
    return spec


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
                at = min(range(len(pairs)), key=pairs.__getitem__)
                if pairs[at] >= rank:
                    break
                parts[at : at + 2] = [parts[at] + parts[at + 1]]
            assert len(parts) == 2, f"{token}: not a merge of two earlier tokens"
            merges.append(tuple(printable(part) for part in parts))
    vocab = {printable(token): rank for token, rank in ranks.items()}
    if encoding.name == "gpt2":
        pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        # the two regex dialects differ: to Oniguruma, {1,3}+ repeats the repetition and $ ends any line
        pattern = encoding._pat_str.replace("{1,3}+", "{1,3}").replace("$", r"\z")
        cut = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        pre_tokenizer = pre_tokenizers.Sequence([cut, byte_level])
    return tokenizer_spec(vocab, merges, pre_tokenizer, encoding._special_tokens)


def printable(token):
    return "".join(BYTE_TO_CHAR[b] for b in token)


def train_bpe(texts, vocab_size):
    """Train a byte-level BPE of vocab_size entries, the last of them end-of-text, on an iterator of texts."""
    if vocab_size < 257:
        raise UserError(f"--tokenizer=bpe:{vocab_size} is too small: 256 bytes and end-of-text make 257")
    hf = tokenizers.Tokenizer(models.BPE())
    hf.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
    hf.train_from_iterator(texts, trainer)
    model = json.loads(hf.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    return tokenizer_spec(model["vocab"], merges, hf.pre_tokenizer, {END_OF_TEXT: len(model["vocab"])})


def make_tokenizer(name, texts):
    """The tokenizer that --tokenizer names; texts() iterates over the training documents, for bpe:SIZE."""
    if name.startswith("bpe:"):
        if not name[4:].isdigit():
            raise UserError(f"--tokenizer={name}: the size must be a whole number, as in bpe:4096")
        return Tokenizer(train_bpe(texts(), int(name[4:])))
    path = hub_directory(name, ["tokenizer*", "*.jinja"])
    if path.exists():
        return Tokenizer.load(path)
    if name not in tiktoken.list_encoding_names():
        known = ", ".join(tiktoken.list_encoding_names())
        raise UserError(f"--tokenizer={name}: no such file, and tiktoken knows only {known}; or train one: bpe:4096")
    try:
        return Tokenizer(spec_of_tiktoken(tiktoken.get_encoding(name)))
    except OSError as e:
        hint = "check the network, set TIKTOKEN_CACHE_DIR, or train your own with --tokenizer=bpe:4096"
        raise UserError(f"--tokenizer={name}: tiktoken could not download it ({type(e).__name__}): {hint}") from None


def hub_directory(name, files=("*.json", "*.safetensors", "*.jinja")):
    """`name` as a path; where nothing lies there and it reads like a Hub id, a download of that repository's files."""
    path = Path(name)
    if path.exists() or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name)):
        return path
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except errors.GatedRepoError:
        why = f"gated: accept its terms at https://huggingface.co/{name}, then log in with `hf auth login`"
    except errors.RepositoryNotFoundError:
        why = "neither a directory here nor a repository on the Hugging Face Hub (a private one needs `hf auth login`)"
    except Exception as e:  # the network fails in many ways; each has one line to say
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        why = f"not a directory here, and not to be had from the Hugging Face Hub: {reason}"
    raise UserError(f"{name}: {why}")


# ----------------------------------------------------------------------------------------------------------------------
# corpora


def open_corpus(cfg):
    """The corpus as {"train": f} or {"train": f, "val": g}; each call of f() iterates anew over document texts."""
    if cfg.dataset == "fables":
        from data import fable_grammar

        count = cfg.max_documents or 40_000
        return {"train": lambda: (fable_grammar.tell(f"{cfg.seed}/{i}")[0] for i in range(count))}
    path = Path(cfg.dataset)
    if path.exists():
        files = source_files(path)
        if not files:
            raise UserError(f"{path}: no .txt, .jsonl, .json or .parquet file here")
        held_out = [f for f in files if re.search(r"(^|[-_. ])(val|valid|validation)([-_. ]|$)", f.stem)]
        if not held_out or len(held_out) == len(files):
            return {"train": lambda: read_files(files, cfg)}
        rest = [f for f in files if f not in held_out]
        return {"train": lambda: read_files(rest, cfg), "val": lambda: read_files(held_out, cfg)}
    if cfg.dataset.startswith((".", "/")) or path.suffix in (".txt", ".jsonl", ".json", ".parquet"):
        raise UserError(f"--dataset={cfg.dataset}: no such file or folder")
    return open_hub("roneneldan/TinyStories" if cfg.dataset == "tinystories" else cfg.dataset, cfg)


def load_from_hub(name, flag, subset="", streaming=False):
    import datasets  # slow to import, and only needed for the Hub, .json and .parquet

    try:
        return datasets.load_dataset(name, subset or None, streaming=streaming)
    except Exception as e:  # the Hub fails in many ways; each has one line to say
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise UserError(
            f"--{flag}={name}: not a file or folder here, and not to be had from the Hugging Face Hub: {reason}"
        ) from None


def open_hub(name, cfg):
    splits = load_from_hub(name, "dataset", cfg.subset, cfg.streaming)
    train = splits.get("train") or next(iter(splits.values()))
    held_out = splits.get("validation")
    corpus = {"train": lambda: column(train, cfg.text_column, name)}
    if held_out is not None:
        corpus["val"] = lambda: column(held_out, cfg.text_column, name)
    return corpus


def column(rows, name, source):
    for row in rows:
        if name not in row:
            raise UserError(f"{source}: no column {name!r}; --text_column can be one of {', '.join(row)}")
        if not isinstance(row[name], str):
            raise UserError(f"{source}: column {name!r} holds {type(row[name]).__name__}, not text")
        yield row[name]


def read_files(files, cfg):
    for path in files:
        if path.suffix == ".txt":
            yield from read_txt(path, cfg.separator.encode())
            continue
        yield from column(read_rows(path), cfg.text_column, path)


def read_txt(path, separator):
    """The documents of a text file, one at a time, so that its size does not matter."""
    rest, start = b"", 0
    with open(path, "rb") as f:
        while True:
            block = f.read(1 << 20)
            *documents, rest = (rest + block).split(separator) if block else [rest, b""]
            for document in documents:
                try:
                    yield document.decode("utf-8")
                except UnicodeDecodeError as e:
                    raise UserError(f"{path}: not UTF-8 at byte {start + e.start}; convert it, as with iconv") from None
                start += len(document) + len(separator)
            if not block:
                return


def read_rows(path):
    """The rows of a .json, .jsonl or .parquet file, one at a time."""
    import datasets  # a second's work

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs, its exceptions say again
    kind = "parquet" if path.suffix == ".parquet" else "json"
    try:
        yield from datasets.load_dataset(kind, data_files=str(path), split="train", streaming=True)
    except (datasets.exceptions.DatasetGenerationError, ValueError, TypeError, KeyError, OSError, StopIteration) as e:
        reason = str(e).splitlines()[0][:200] if str(e) else "no record in it"
        raise UserError(f"{path}: not readable as {kind}: {reason}") from None


def is_held_out(text, fraction):
    """Whether a document belongs to the validation split. Its text alone decides, so neither order nor duplicates
    can move it across."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


# ----------------------------------------------------------------------------------------------------------------------
# writing


class Split:
    """One split in the making: a bin that grows, and what is counted on the way. state: of one that was cut off."""

    def __init__(self, path, dtype, state=None):
        self.file, self.dtype = open(path, "r+b" if state else "wb"), dtype
        self.bytes = 0
        self.lengths = np.zeros(0, dtype=np.int64)  # how many documents have 0, 1, 2, ... tokens
        if state:
            self.file.truncate(state["size"])
            self.file.seek(state["size"])
            self.bytes, (lengths, counts) = state["bytes"], state["lengths"]
            self.lengths = np.bincount(lengths, counts).astype(np.int64)

    def state(self):
        """What is needed to go on from here, all of it on the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())
        lengths = np.flatnonzero(self.lengths)
        return {
            "size": self.file.tell(),
            "bytes": self.bytes,
            "lengths": [lengths.tolist(), self.lengths[lengths].tolist()],
        }

    def add(self, tokens, lengths, num_bytes):
        self.file.write(tokens.astype(self.dtype).tobytes())
        self.bytes += num_bytes
        counts = np.bincount(lengths, minlength=len(self.lengths))
        counts[: len(self.lengths)] += self.lengths
        self.lengths = counts

    def close(self):
        """The counts of the finished bin. A document's length here counts its end-of-text token."""
        self.file.close()
        documents = int(self.lengths.sum())
        tokens = int(self.lengths @ np.arange(len(self.lengths)))
        median, long = (int(np.searchsorted(self.lengths.cumsum(), q * documents)) for q in (0.5, 0.95))
        return {
            "tokens": tokens,
            "documents": documents,
            "bytes": self.bytes,
            "median_document_tokens": median,
            "p95_document_tokens": long,
        }


def batches(texts, num_bytes=1 << 19):
    """Lists of texts of about num_bytes together."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= num_bytes:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode(tokenizer, texts):
    """Texts -> (tokens of all of them, each ended, as one array; their lengths in tokens; their bytes)."""
    tokens = tokenizer.encode_documents(texts)
    lengths = np.diff(np.flatnonzero(tokens == tokenizer.eot), prepend=-1)
    return tokens, lengths, sum(len(text.encode()) for text in texts)


def map_in_order(function, jobs, num_threads):
    """Results of function(*job) in the jobs' order. Few jobs are under way at once, so memory stays small however many
    there are."""
    pending = deque()
    with ThreadPoolExecutor(num_threads) as pool:
        for job in jobs:
            pending.append(pool.submit(function, *job))
            if len(pending) > 2 * num_threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def swap_in(new, old):
    """Put the finished directory `new` in the place of `old`. At every moment one of them is there and whole, also
    after a power cut."""
    for path in (*new.iterdir(), new):
        flush(path)
    aside = old.with_name(old.name + ".replaced")
    if old.exists():  # else a crash left it aside, where it stays until the new one is in place
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(old, aside)
    os.replace(new, old)
    flush(old.parent)
    shutil.rmtree(aside, ignore_errors=True)


atomic_replace_dir = swap_in


def intact_dir(path):
    aside = path.with_name(path.name + ".replaced")
    return path if path.exists() or not aside.exists() else aside


def flush(path):
    """Wait until a file, or a directory's list of files, is on the disk."""
    with contextlib.suppress(PermissionError):  # Windows opens no directories
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def main(cfg):
    is_fables = cfg.dataset == "fables"
    path = Path(cfg.dataset)
    out = DATA / (cfg.name or (path.resolve().stem if path.exists() else path.name))
    corpus = open_corpus(cfg)

    def documents(split):
        texts = itertools.islice(corpus[split](), cfg.max_documents or None)
        return filter(None, map(str.strip, texts))

    def split_of(text, split):
        """The documents of "train" are shared out where the dataset has no "val" of its own."""
        return "val" if "val" not in corpus and is_held_out(text, cfg.val_fraction) else split

    def training_texts():
        progress = tqdm(documents("train"), "training the tokenizer", unit=" documents", mininterval=1, disable=None)
        return (text for text in progress if split_of(text, "train") == "train")

    tokenizer_name = cfg.tokenizer or ("bpe:2048" if is_fables else "gpt2")
    part = out.with_name(out.name + ".part")  # nothing reads this name, so half a dataset is never taken for one
    task = asdict(cfg) | {"files": [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in source_files(path)]}
    progress = read_progress(part, task)
    if progress:
        tokenizer = Tokenizer.load(part)
        print(f"{part}: going on after {progress['batches']} batches of texts")
    else:
        tokenizer = make_tokenizer(tokenizer_name, training_texts)
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        tokenizer.save(part)
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    states = progress.get("splits", {})
    splits = {name: Split(part / f"{name}.bin", dtype, states.get(name)) for name in ("train", "val")}
    floor_bits, done = progress.get("floor_bits", 0.0), progress.get("batches", 0)

    def encode_batch(split, texts):
        """Runs in a thread: tiktoken leaves Python to the others while it works."""
        shares = {name: [text for text in texts if split_of(text, split) == name] for name in splits}
        encoded = {name: encode(tokenizer, share) for name, share in shares.items() if share}
        return encoded, fable_bits(shares["val"]) if is_fables else 0.0

    jobs = ((name, texts) for name in corpus for texts in batches(documents(name)))
    with tqdm(desc="tokenizing", unit="B", unit_scale=True, mininterval=1, disable=None) as bar:
        for encoded, bits in map_in_order(encode_batch, itertools.islice(jobs, done, None), os.cpu_count()):
            floor_bits += bits
            for name, (tokens, lengths, num_bytes) in encoded.items():
                splits[name].add(tokens, lengths, num_bytes)
                bar.update(num_bytes)
            done += 1
            if done % PROGRESS_EVERY == 0:
                states = {name: split.state() for name, split in splits.items()}
                write_progress(part, {"task": task, "batches": done, "floor_bits": floor_bits, "splits": states})

    counts = {name: split.close() for name, split in splits.items()}
    if not counts["train"]["tokens"]:
        raise UserError(f"--dataset={cfg.dataset}: no text in it")
    if not counts["val"]["tokens"]:
        n = counts["train"]["documents"]
        raise UserError(f"--val_fraction={cfg.val_fraction} left none of {n} documents for validation: raise it")
    meta = {
        "source": cfg.dataset,
        "tokenizer": tokenizer_name,
        "vocab_size": tokenizer.vocab_size,
        "dtype": dtype.name,
        "train": counts["train"],
        "val": counts["val"],
        "floor_bits_per_byte": floor_bits / counts["val"]["bytes"] if is_fables else None,
    }
    (part / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    (part / "progress.json").unlink(missing_ok=True)
    swap_in(part, out)
    report(out, meta)


PROGRESS_EVERY = 64  # batches of half a megabyte between two notes of how far a preparation has come


def write_progress(part, progress):
    (part / "progress.json.new").write_text(json.dumps(progress))
    os.replace(part / "progress.json.new", part / "progress.json")


def read_progress(part, task):
    """How far the same preparation had come when it was cut off; {} where there is none."""
    try:
        progress = json.loads((part / "progress.json").read_text())
        return progress if progress["task"] == json.loads(json.dumps(task)) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def source_files(path):
    """The files of a local corpus."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [f for f in files if f.suffix in (".txt", ".jsonl", ".json", ".parquet") and f.exists()]


def fable_bits(texts):
    """-log2 of the probability with which the grammar tells these fables, summed."""
    from data import fable_grammar

    bits = 0.0
    for text in texts:
        ((information, _),) = fable_grammar.derivations(text)  # exactly one, or the floor would be wrong
        bits += information
    return bits


def report(out, meta):
    print(f"\n{out}: {meta['tokenizer']} with {meta['vocab_size']:,} tokens, stored as {meta['dtype']}")
    row = "{:6}{:>14}{:>16}{:>18}{:>14}{:>18}{:>6}"
    print(row.format("", "documents", "tokens", "bytes", "bytes/token", "median document", "95%"))
    for name in ("train", "val"):
        c = meta[name]
        counts = (f"{c[key]:,}" for key in ("documents", "tokens", "bytes"))
        lengths = c["median_document_tokens"], c["p95_document_tokens"]
        print(row.format(name, *counts, f"{c['bytes'] / c['tokens']:.3f}", *lengths))
    if meta["floor_bits_per_byte"] is not None:
        print(f"entropy floor of the validation split: {meta['floor_bits_per_byte']:.4f} bits per byte")


if __name__ == "__main__":
    run(main, PrepareConfig)
