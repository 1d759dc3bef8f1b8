"""Tokenizers in the Hugging Face format. tiktoken runs byte-level BPE tokenizers, `tokenizers` runs the others."""

import itertools
import json
import re
from pathlib import Path

import numpy as np
import tiktoken
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from support.settings import UserError, user_errors

END_OF_TEXT = "<|endoftext|>"
# GPT-2 splits text into these words before merging
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# GPT-2 writes bytes as printable characters: printable bytes as themselves, the others as characters from 256 up
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTE_TO_CHAR = {b: chr(b) for b in PRINTABLE}
BYTE_TO_CHAR |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in BYTE_TO_CHAR)}


def read_chat_template(path):
    """Return the chat template in a model's or adapter's directory, as transformers finds it; None without one."""
    jinja, config = Path(path, "chat_template.jinja"), Path(path, "tokenizer_config.json")
    with user_errors(f"{path}: its chat template cannot be read"):
        if jinja.exists():
            return jinja.read_text(encoding="utf-8")
        template = json.loads(config.read_text(encoding="utf-8")).get("chat_template") if config.exists() else None
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
        if not isinstance(spec["model"].get("vocab"), dict):
            raise ValueError(f"it is of the kind {spec['model'].get('type')}, which is not supported; use a BPE")

        def choose(key, usual):
            """Return the token that tokenizer_config.json names, or the first of `usual` that is a special token."""
            named = self.config.get(key)
            named = named["content"] if isinstance(named, dict) else named
            if named is not None and named not in special:
                raise ValueError(f"{key}={named!r} is no special token of tokenizer.json")
            return next((name for name in [named, *usual] if name in special), None)

        usual = [END_OF_TEXT, "<eos>", "</s>", "<|end_of_text|>"]
        self.eot_token = choose("eos_token", usual)
        if self.eot_token is None:
            raise ValueError(f"no end-of-text token: none of {', '.join(usual)} is in added_tokens")
        self.bos_token = choose("bos_token", ["<bos>", "<s>", "<|begin_of_text|>"]) or self.eot_token
        self.pad_token = choose("pad_token", ["<pad>"]) or self.eot_token
        self.eot = special[self.eot_token]
        self.bos = special[self.bos_token]  # stands before a text
        self.pad = special[self.pad_token]
        # chat templates contain special tokens, and may end a response with an added token that is not special
        self.ids_of_markers = {t["content"]: t["id"] for t in spec["added_tokens"]}
        plain = [name for name in self.ids_of_markers if name not in special and name.strip()]
        self.markers, self.plain_markers = (
            re.compile("(" + "|".join(map(re.escape, sorted(names, key=len, reverse=True))) + ")")
            for names in (special, plain or [self.eot_token])
        )
        self.rows = 2**31  # of the embedding; check_rows() sets it
        # the ids that a text can have. A tokenizer may name more special tokens than its models know
        ids, plain = spec["model"]["vocab"].values(), [t["id"] for t in spec["added_tokens"] if not t["special"]]
        if len(set(ids)) < len(ids):
            raise ValueError("two tokens of the vocabulary have the same id")
        self.text_ids = {*ids, *plain} - {*special.values()}
        self.vocab_size = 1 + max(*self.text_ids, self.eot, self.bos)
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 2**16 else np.uint32)  # of the .bin files
        self.hf = tokenizers.Tokenizer.from_str(json.dumps(spec))
        self.hf.encode_special_tokens = True  # their names in a text stay text
        for token in spec["added_tokens"]:  # `tokenizers` numbers them without gaps, whatever the file says
            name, i = token["content"], token["id"]
            if i in self.text_ids and (found := self.hf.token_to_id(name)) != i:
                raise ValueError(f"the added token {name!r} has the id {i}, but other programs read {found}")
        self.bpe = None if plain else byte_level_bpe(spec, special)  # faster
        check_pieces(self)

    @classmethod
    def load(cls, path):
        """Load a tokenizer.json, or the one in a directory, and the configuration and chat template beside it."""
        path = Path(path, "tokenizer.json") if Path(path).is_dir() else Path(path)
        with user_errors(f"{path}: not a tokenizer.json that can be used"):
            spec, beside = json.loads(path.read_text(encoding="utf-8")), path.with_name("tokenizer_config.json")
            config = json.loads(beside.read_text(encoding="utf-8")) if beside.exists() else {}
            template = read_chat_template(path.parent)
            return cls(spec, {**config, "chat_template": template} if template else config)

    def check_rows(self, rows):
        """Raise UserError if a text can have token ids beyond an embedding with this number of rows."""
        self.rows = rows
        if self.vocab_size > rows:
            raise UserError(f"the tokenizer's {self.vocab_size} entries do not fit into vocab_size={rows}: use the "
                            "tokenizer that the model was trained with")  # fmt: skip

    def save(self, path):
        """Write tokenizer.json and tokenizer_config.json, which transformers' AutoTokenizer opens."""
        if self.hf.encode("a").ids[:1] != [self.bos]:  # so that other programs begin a text with the bos token too
            first = [(self.bos_token, self.bos)]
            self.hf.post_processor = processors.TemplateProcessing(f"{self.bos_token} $A", special_tokens=first)
            self.spec["post_processor"] = json.loads(self.hf.to_str())["post_processor"]
        (path / "tokenizer.json").write_text(json.dumps(self.spec, ensure_ascii=False), encoding="utf-8")
        # the model's own class would rebuild the tokenizer, and might add another first token
        own = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        config = self.config | self.named_tokens() | own
        (path / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")

    def named_tokens(self):
        """Return {"bos_token": its name, ...}, for tokenizer_config.json and chat templates."""
        others = {key: t["content"] if isinstance(t, dict) else t for key, t in self.config.items()
                  if key.endswith("_token") and isinstance(t, str | dict)}  # fmt: skip
        return others | {"bos_token": self.bos_token, "eos_token": self.eot_token, "pad_token": self.pad_token}

    def encode(self, text):
        """Return the token ids of a str as a uint32 array."""
        if len(parts := split_long_words(text)) > 1:
            return np.concatenate(list(map(self.encode, parts)))
        if self.bpe:
            return self.bpe.encode_to_numpy(text, allowed_special=set(), disallowed_special=())
        ids = np.array(self.hf.encode(text, add_special_tokens=False).ids, dtype=np.uint32)
        if self.eot in ids:  # its name is in the vocabulary of texts, too
            raise UserError(f"a text contains {self.eot_token}, which this tokenizer cannot write: remove it")
        return ids

    def encode_documents(self, texts):
        """Return the token ids of all texts as one uint32 array, with end-of-text after each."""
        if self.bpe and not any(self.eot_token in text or len(split_long_words(text)) > 1 for text in texts):
            # one long call, because tiktoken releases the GIL during a call. It does not merge across special tokens
            joined = "".join(text + self.eot_token for text in texts)
            return self.bpe.encode_to_numpy(joined, allowed_special={self.eot_token}, disallowed_special=())
        ended = [np.append(self.encode(text), np.uint32(self.eot)) for text in texts]
        return np.concatenate([np.zeros(0, dtype=np.uint32), *ended])

    def decode(self, ids):
        """Return the text of token ids, without special tokens. An incomplete character at the end becomes U+FFFD."""
        # an embedding may have more rows than the tokenizer has entries; these rows have no text
        ids = [int(i) for i in ids if int(i) in self.text_ids]
        return self.bpe.decode(ids) if self.bpe else self.hf.decode(ids)


LONG_WORD = 4096  # longer than any run of one kind of characters in an ordinary text
KINDS = (r"\s", r"[^\W\d_]", r"\d", r"[^\w\s]", "_")  # white space, letters, digits, punctuation
LONG_WORDS = re.compile("|".join(f"{kind}{{{LONG_WORD}}}" for kind in KINDS))


def split_long_words(text):
    """Return the parts of a text, cut inside runs of LONG_WORD letters, spaces and so on. A BPE's time grows with the
    square of a word's length, and tiktoken fails on a million spaces."""
    # cheap checks first: LONG_WORDS is slow
    if len(text) < LONG_WORD or not re.search(rf"\S{{{LONG_WORD}}}|\s{{{LONG_WORD}}}", text):
        return [text]
    cuts = [0, *(match.end() for match in LONG_WORDS.finditer(text)), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(cuts) if b > a]


def check_pieces(tokenizer):
    """Raise ValueError unless token ids that are decoded one by one give the text that was encoded."""
    for text in ("a b", " a", "the end. "):
        ids = tokenizer.encode(text)
        found = "".join(tokenizer.decode(ids[i : i + 1]) for i in range(len(ids)))
        if found != text:
            raise ValueError(f"{text!r} becomes {found!r} token by token, so a text cannot be continued: use another")


def byte_level_bpe(spec, special):
    """Return the tiktoken encoding that equals a tokenizer.json, or None if it is not a plain byte-level BPE."""
    model, split = {"type": "BPE"} | spec["model"], spec.get("pre_tokenizer") or {}
    steps = split.get("pretokenizers", [split])
    *before, last = steps
    if model["type"] != "BPE" or spec.get("normalizer") or (spec.get("decoder") or {}).get("type") != "ByteLevel":
        return None
    if last.get("type") != "ByteLevel" or last["add_prefix_space"] or len(before) + last.get("use_regex", True) != 1:
        return None
    if any(model.get(key) for key in ("byte_fallback", "dropout", "end_of_word_suffix", "continuing_subword_prefix")):
        return None
    pattern = GPT2_PATTERN
    if before:
        if before[0]["type"] != "Split" or before[0]["behavior"] != "Isolated" or "Regex" not in before[0]["pattern"]:
            return None
        pattern = before[0]["pattern"]["Regex"]
    byte = {char: value for value, char in BYTE_TO_CHAR.items()}
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    order = [model["vocab"].get(a + b) for a, b in merges]
    # tiktoken merges in the order of token ids, so the ids must rise with the merges
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


def spec_of_tiktoken(encoding):
    """Return the dict of a tokenizer.json that equals a tiktoken encoding. tiktoken stores merged tokens without their
    pairs. To find a token's pair, merge its bytes with the earlier tokens only."""
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
        # the regex dialects differ: in Oniguruma {1,3}+ repeats the repetition, and $ matches at any line's end
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
    """Train a byte-level BPE of vocab_size entries, end-of-text included. Return the dict of its tokenizer.json."""
    hf = tokenizers.Tokenizer(models.BPE())
    hf.pre_tokenizer, hf.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
    hf.train_from_iterator(itertools.chain.from_iterable(map(split_long_words, texts)), trainer)
    hf.add_special_tokens([END_OF_TEXT])
    return json.loads(hf.to_str())
