"""Tokenizers in the Hugging Face format. tiktoken runs byte-level BPE tokenizers, `tokenizers` runs the others."""

import itertools
import json
import re
from pathlib import Path

import numpy as np
import tiktoken
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from model import read_json
from support.settings import UserError, user_errors

END_OF_TEXT = "<|endoftext|>"
# GPT-2 splits text into these words before merging
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# GPT-2 writes bytes as printable characters: printable bytes as themselves, the others as characters from 256 up
BYTE_TO_CHAR = {b: chr(b) for b in (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))}
BYTE_TO_CHAR |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in BYTE_TO_CHAR)}
# names of special tokens if tokenizer_config.json has none. End-of-text stands in for the others
USUAL_NAMES = {"eos_token": (END_OF_TEXT, "<eos>", "</s>", "<|end_of_text|>"),
               "bos_token": ("<bos>", "<s>", "<|begin_of_text|>"), "pad_token": ("<pad>",)}  # fmt: skip


def read_chat_template(path):
    """Return the chat template in a model's or adapter's directory, as transformers finds it; None without one."""
    jinja, config = Path(path, "chat_template.jinja"), Path(path, "tokenizer_config.json")
    with user_errors(f"{path}: its chat template cannot be read"):
        if jinja.exists():
            return jinja.read_text(encoding="utf-8")
        template = read_json(config).get("chat_template") if config.exists() else None
        if isinstance(template, list):  # several, by name
            template = {entry["name"]: entry["template"] for entry in template}["default"]
        if not isinstance(template, str | None):
            raise ValueError(f"chat_template is {type(template).__name__}")
        return template


class Tokenizer:
    """A tokenizer in the Hugging Face format. Special tokens are never recognized in text, only inserted by code."""

    def __init__(self, spec, config=None):
        """spec: dict of tokenizer.json. config: dict of tokenizer_config.json, if there is one."""
        # some files still contain the truncation and padding of a fine-tuning
        self.spec = spec = spec | {"truncation": None, "padding": None}
        self.config = config or {}
        special = {t["content"]: t["id"] for t in spec["added_tokens"] if t["special"]}
        plain = {t["content"]: t["id"] for t in spec["added_tokens"] if not t["special"]}
        vocab = spec["model"].get("vocab")
        if not isinstance(vocab, dict):
            raise ValueError(f"it is of the kind {spec['model'].get('type')}, which is not supported; use a BPE")
        # {"bos_token": its name, ...}, for tokenizer_config.json and chat templates
        self.names = {key: t["content"] if isinstance(t, dict) else t for key, t in self.config.items()
                      if key.endswith("_token") and isinstance(t, str | dict)}  # fmt: skip
        for key, usual in USUAL_NAMES.items():
            named = self.names.get(key, self.config.get(key))
            if named is not None and named not in special:
                raise ValueError(f"{key}={named!r} is no special token of tokenizer.json")
            found = [name for name in (named, *usual, self.names.get("eos_token")) if name in special]
            if not found:
                raise ValueError(f"no end-of-text token: none of {', '.join(usual)} is in added_tokens")
            self.names[key] = found[0]
        self.eot, self.bos, self.pad = (special[self.names[key]] for key in USUAL_NAMES)  # bos stands before a text
        # chat templates contain added tokens. White space stays text, because a message can continue it
        self.ids_of_markers = {name: i for name, i in (special | plain).items() if name.strip()}
        longest_first = sorted(self.ids_of_markers, key=len, reverse=True)
        self.markers = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self.rows = 2**31  # of the embedding; check_rows() sets it
        # the ids that a text can have. A tokenizer may name more special tokens than its models know
        self.text_ids = {*vocab.values(), *plain.values()} - {*special.values()}
        if len(set(vocab.values())) < len(vocab):
            raise ValueError("two tokens of the vocabulary have the same id")
        self.vocab_size = 1 + max(*self.text_ids, self.eot, self.bos)
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 2**16 else np.uint32)  # of the .bin files
        self.hf = tokenizers.Tokenizer.from_str(json.dumps(spec))
        self.hf.encode_special_tokens = True  # their names in a text stay text
        for name, i in plain.items():  # `tokenizers` numbers them without gaps, whatever the file says
            if (found := self.hf.token_to_id(name)) != i:
                raise ValueError(f"the added token {name!r} has the id {i}, but other programs read {found}")
        self.bpe = None if plain else byte_level_bpe(spec, special)  # faster
        for text in ("a b", " a", "the end. "):  # each token must have a text of its own
            found = "".join(self.decode([i]) for i in self.encode(text))
            if found != text:
                raise ValueError(f"{text!r} becomes {found!r} token by token, so a text cannot be continued: use "
                                 "another")  # fmt: skip

    @classmethod
    def load(cls, path):
        """Load a tokenizer.json, or the one in a directory, and the configuration and chat template beside it."""
        path = Path(path, "tokenizer.json") if Path(path).is_dir() else Path(path)
        with user_errors(f"{path}: not a tokenizer.json that can be used"):
            file = path.with_name("tokenizer_config.json")
            config = read_json(file) if file.exists() else {}
            template = read_chat_template(path.parent)
            return cls(read_json(path), config | ({"chat_template": template} if template else {}))

    def check_rows(self, rows):
        """Raise UserError if a text can have token ids beyond an embedding with this number of rows."""
        self.rows = rows
        if self.vocab_size > rows:
            raise UserError(f"the tokenizer's {self.vocab_size} entries do not fit into vocab_size={rows}: use the "
                            "tokenizer that the model was trained with")  # fmt: skip

    def save(self, path):
        """Write tokenizer.json and tokenizer_config.json, which transformers' AutoTokenizer opens."""
        if self.hf.encode("a").ids[:1] != [self.bos]:  # so that other programs begin a text with the bos token too
            bos = self.names["bos_token"]
            self.hf.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, self.bos)])
            self.spec["post_processor"] = json.loads(self.hf.to_str())["post_processor"]
        (path / "tokenizer.json").write_text(json.dumps(self.spec, ensure_ascii=False), encoding="utf-8")
        # the model's own class would rebuild the tokenizer, and might add another first token
        own = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        (path / "tokenizer_config.json").write_text(json.dumps(self.config | self.names | own, indent=2) + "\n")

    def encode(self, text):
        """Return the token ids of a str as a uint32 array."""
        if len(parts := split_long_words(text)) > 1:
            return np.concatenate(list(map(self.encode, parts)))
        if self.bpe:
            return self.bpe.encode_to_numpy(text, allowed_special=set(), disallowed_special=())
        ids = np.array(self.hf.encode(text, add_special_tokens=False).ids, dtype=np.uint32)
        if self.eot in ids:  # its name is in the vocabulary of texts, too
            raise UserError(f"a text contains {self.names['eos_token']}, which this tokenizer cannot write: remove it")
        return ids

    def encode_documents(self, texts):
        """Return the token ids of all texts as one uint32 array, with end-of-text after each."""
        eot = self.names["eos_token"]
        if self.bpe and not any(eot in text or len(split_long_words(text)) > 1 for text in texts):
            # one long call, because tiktoken releases the GIL during a call. It does not merge across special tokens
            joined = "".join(text + eot for text in texts)
            return self.bpe.encode_to_numpy(joined, allowed_special={eot}, disallowed_special=())
        ended = [np.append(self.encode(text), np.uint32(self.eot)) for text in texts]
        return np.concatenate([np.zeros(0, dtype=np.uint32), *ended])

    def decode(self, ids):
        """Return the text of token ids, without special tokens. An incomplete character at the end becomes U+FFFD."""
        # an embedding may have more rows than the tokenizer has entries; these rows have no text
        ids = [int(i) for i in ids if int(i) in self.text_ids]
        return self.bpe.decode(ids) if self.bpe else self.hf.decode(ids)


LONG_WORDS = re.compile("|".join(kind + "{4096}" for kind in (r"\s", r"[^\W\d_]", r"\d", r"[^\w\s]", "_")))


def split_long_words(text):
    """Return the parts of a text, cut after each 4,096 letters, digits, spaces or signs in a row, which ordinary text
    does not have. A BPE's time grows with the square of a word's length, and tiktoken fails on a million spaces."""
    if not re.search(r"\S{4096}|\s{4096}", text):  # LONG_WORDS is slower
        return [text]
    cuts = [0, *(match.end() for match in LONG_WORDS.finditer(text)), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(cuts) if b > a]


def byte_level_bpe(spec, special):
    """Return the tiktoken encoding that equals a tokenizer.json, or None if it is not a plain byte-level BPE."""
    model, split = {"type": "BPE"} | spec["model"], spec.get("pre_tokenizer") or {}
    if model["type"] != "BPE" or spec.get("normalizer") or (spec.get("decoder") or {}).get("type") != "ByteLevel":
        return None
    if any(model.get(key) for key in ("byte_fallback", "dropout", "end_of_word_suffix", "continuing_subword_prefix")):
        return None
    match split.get("pretokenizers", [split]):
        case [{"type": "ByteLevel", "add_prefix_space": False, **options}] if options.get("use_regex", True):
            pattern = GPT2_PATTERN
        case [{"type": "Split", "behavior": "Isolated", "pattern": {"Regex": pattern}},
              {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]:  # fmt: skip
            pass
        case _:
            return None
    byte = {char: value for value, char in BYTE_TO_CHAR.items()}
    tokens = {t: i for t, i in model["vocab"].items() if t not in special and byte.keys() >= set(t)}
    merged = ["".join(pair).replace(" ", "") for pair in model["merges"]]  # of ["a", "b"] or, in old files, "a b"
    order = [tokens.get(token) for token in merged]
    # tiktoken merges in the order of token ids, so the ids must rise with the merges
    if tokens.keys() != byte.keys() | set(merged) or order != sorted(set(order)):
        return None
    ranks = {bytes(byte[c] for c in token): i for token, i in tokens.items()}
    return tiktoken.Encoding("ours", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def spec_of_tiktoken(encoding):
    """Return the dict of a tokenizer.json that equals a tiktoken encoding. tiktoken stores merged tokens without their
    pairs. To find a token's pair, merge its bytes with the earlier tokens only."""
    vocab = {"".join(BYTE_TO_CHAR[b] for b in token): rank for token, rank in encoding._mergeable_ranks.items()}
    merges = []
    for token, rank in sorted(vocab.items(), key=lambda x: x[1]):
        parts = list(token)
        while len(parts) > 2:
            pairs = [vocab.get(a + b, rank) for a, b in itertools.pairwise(parts)]
            at = pairs.index(min(pairs))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:  # not a single byte
            merges.append(tuple(parts))
    hf = tokenizers.Tokenizer(models.BPE(vocab, merges))
    hf.pre_tokenizer, hf.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if encoding.name != "gpt2":
        # the regex dialects differ: in Oniguruma {1,3}+ repeats the repetition, and $ matches at any line's end
        pattern = encoding._pat_str.replace("{1,3}+", "{1,3}").replace("$", r"\z")
        words = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        hf.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    special = sorted(encoding._special_tokens.items(), key=lambda x: x[1])
    return json.loads(hf.to_str()) | {"added_tokens": [{"id": i, "content": name, **flags} for name, i in special]}


def train_bpe(texts, vocab_size):
    """Train a byte-level BPE of vocab_size entries, end-of-text included. Return the dict of its tokenizer.json."""
    hf = tokenizers.Tokenizer(models.BPE())
    hf.pre_tokenizer, hf.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
    hf.train_from_iterator(itertools.chain.from_iterable(map(split_long_words, texts)), trainer)
    hf.add_special_tokens([END_OF_TEXT])
    return json.loads(hf.to_str())
