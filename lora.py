"""
Instruction-tune a Gemma 3 with LoRA, or all of its weights with --rank=0. The training loop is train.py's fit().

    python lora.py config/lora_fables.py                                  # after the quick start
    python lora.py --init_from=out/fables/best --data=records.json --out_dir=out/mine
    python sample.py --adapter=out/lora-fables/best --instruct="Tell a fable about a cat named Pim who eats too much."

LoRA (Hu et al. 2021) replaces a linear layer W by W + scale * B A and trains only A (rank, in) and B (out, rank). B
starts at zero, so training starts from the unchanged model. Adapters are saved in PEFT's format. In your own loop:

    model = add_lora(Gemma.from_pretrained("out/fables/best"), rank=8)    # train the parameters with requires_grad
    save_adapter(model, "out/mine")
    model = merge_lora(load_adapter(Gemma.from_pretrained("out/fables/best"), "out/mine"))
"""

import hashlib
import heapq
import importlib
import itertools
import json
import math
import shlex
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from safetensors.torch import save_file

from model import complete, weights_fingerprint
from prepare import CORPORA, is_held_out
from support.adapters import check_base, read_adapter_config, read_adapter_weights, read_instruct, read_tensors
from support.conversations import encode_conversation, end_of_response, read_messages
from support.devices import pick_dtype, runtime_errors
from support.documents import ROWS, open_splits, read_rows
from support.files import latest_intact_dir
from support.hub import RECORDS_ON_THE_HUB, hub_directory, load_dataset_from_hub
from support.log import append, finite, read_log
from support.processes import apply_fsdp, get_rank, get_world_size, loading_device, set_up, shutdown_distributed
from support.runs import new_state, open_model, read_state, resolve_init_from, write_checkpoint
from support.settings import NO_LIMIT, UserError, check_range, run, user_errors
from support.tokenizer import Tokenizer, read_chat_template
from train import TrainConfig, epoch_shuffled_indices, fit, warmup_steps


@dataclass
class LoraConfig:
    """Settings of instruction tuning alone."""

    data: str = "fables"  # fables, alpaca, dolly, a Hub id, or a file or folder of records (docs/records.md)
    template: str = ""  # instruction format: alpaca, short or gemma; empty: the model's own chat template, or alpaca
    rank: int = 8  # rank of the adapters; 0: train all weights instead
    alpha: float = 16.0  # adapter output is scaled by alpha / rank
    target_modules: str = "all-linear"  # linear layers that get an adapter, such as q_proj,v_proj
    lora_dropout: float = 0.0  # dropout on the adapters' input
    epochs: float = 0.0  # passes over the records; 0: 2, or more to reach 50 steps
    max_records: int = 0  # use this many records; 0: all (fables: 12,000)
    max_length: int = 512  # tokens of a conversation; a longer one loses its oldest turns, then the end of its input
    max_tokens_per_batch: int = 4096  # limit of a batch; several records share a row
    batch_size: int = 0  # records per batch, about; 0: 1% of all, at least 4; max_tokens_per_batch may lower it
    val_fraction: float = 0.05  # share of the records to hold out; more if that would be fewer than about 8
    num_checked: int = 1200  # answer and check at most this many held-out records; before tuning at most 240
    num_samples: int = 4  # how many of these answers are shown before and after tuning
    merge: bool = False  # at the end, also save the model with the best adapter merged in, to out_dir/merged

    def __post_init__(self):
        check_template(self.template)
        check_range(self, 2, NO_LIMIT, "max_length")
        check_range(self, self.max_length, NO_LIMIT, "max_tokens_per_batch")
        check_range(self, 1e-6, 1e6, "alpha")
        check_range(self, 0, 1e6, "epochs")
        check_range(self, 1e-6, 0.999, "val_fraction")
        check_range(self, 0, 0.99, "lora_dropout")


@dataclass
class TuneConfig(TrainConfig):
    """Settings of every run, with defaults for tuning."""

    out_dir: str = ""  # folder for checkpoints and logs; by default out/lora-<data>
    init_from: str = ""  # the model to tune, a directory or a Hub id of a Gemma 3; or resume (out_dir/last)
    max_iters: int | None = None  # steps; by default epochs decides
    optimizer: str = "adamw"  # adamw or muon
    learning_rate: float | None = None  # the peak; by default 2e-4, more for narrow models; a tenth of that with rank=0
    warmup_iters: float = 0.05  # steps of linear warmup; below 1: that share of max_iters
    cooldown_frac: float = 0.5  # share of max_iters over which schedule=wsd decays
    eval_interval: int | None = None  # steps between evaluations, each with a checkpoint; by default an epoch


class LoRALinear(nn.Module):
    """A frozen linear layer with a low-rank addition: base(x) + scale * B(A(dropout(x))). To add another kind of
    adapter, change forward() and merged() together, and the settings in save_adapter() and support/adapters.py."""

    def __init__(self, base, rank, alpha, dropout=0.0):
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, device=base.weight.device)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, device=base.weight.device)
        self.dropout = nn.Dropout(dropout)
        self.rank, self.alpha, self.scale = rank, alpha, alpha / rank
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))  # as PEFT does
        nn.init.zeros_(self.lora_B.weight)  # the model starts unchanged

    def forward(self, x):
        base = self.base_layer(x.to(self.base_layer.weight.dtype))
        update = self.lora_B(self.lora_A(self.dropout(x.to(self.lora_A.weight.dtype)))) * self.scale
        return base + update.to(base.dtype)

    def merged(self):
        """Return the float32 weight of a plain layer that computes the same."""
        return self.base_layer.weight.float() + self.lora_B.weight.float() @ self.lora_A.weight.float() * self.scale


def add_lora(model, rank=8, alpha=16, dropout=0.0, target_modules="all-linear"):
    """Wrap linear layers of the model in LoRALinear, in place, and freeze all other parameters.
    target_modules: "all-linear", or the ends of layer names, such as "q_proj,mlp.up_proj" or a list of them. Raises
    ValueError for a name that matches no layer."""
    if lora_layers(model):
        raise ValueError("the model has an adapter already: merge_lora(model) first")
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    kinds = sorted({name.rpartition(".")[2] for name in linears})
    targets = target_modules.split(",") if isinstance(target_modules, str) else target_modules
    targets = kinds if target_modules == "all-linear" else [name.strip() for name in targets]
    if missing := [t for t in targets if not any(f".{name}".endswith(f".{t}") for name in linears)]:
        raise ValueError(f"{', '.join(missing)}: no such linear layers; the model has {', '.join(kinds)}")
    model.requires_grad_(False)
    for name, linear in linears.items():
        if f".{name}".endswith(tuple(f".{t}" for t in targets)):
            model.set_submodule(name, LoRALinear(linear, rank, alpha, dropout).train(linear.training))
    return model


@torch.no_grad()
def merge_lora(model):
    """Add the adapters to their base layers, in place. Return the plain model, which computes the same."""
    for name, layer in lora_layers(model):
        layer.base_layer.weight.copy_(layer.merged())
        model.set_submodule(name, layer.base_layer)
    return model.requires_grad_(True)


def lora_layers(model):
    """Return (name, layer) of every LoRALinear in the model."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoRALinear)]


# ---- instruction formats and records ---------------------------------------------------------------------------------

# a user's message. The text of a system message right before it comes first
ASKED = "{% if not loop.first and loop.previtem.role == 'system' %}{{ loop.previtem.content | trim + '\\n\\n' }}"
ASKED += "{% endif %}{{ m.content | trim }}"
# instruction formats: chat templates in Jinja, which transformers, vLLM and llama.cpp read too. A response ends with
# the special token right after it, or with end-of-text if there is none
TEMPLATES = {
    "alpaca": "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'assistant' %}{{ m.content }}{{ eos_token }}"
    "{% elif m.role == 'user' %}Below is an instruction that describes a task"
    "{% if m.input %}, paired with an input that provides further context{% endif %}"
    ". Write a response that appropriately completes the request.\n\n### Instruction:\n" + ASKED +
    "{% if m.input %}{{ '\\n\\n' }}### Input:\n{{ m.input | trim }}{% endif %}{{ '\\n\\n' }}### Response:\n"
    "{% endif %}{% endfor %}",
    "short": "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% elif m.role == 'user' %}{% if m.input %}Input: {{ m.input | trim }}\n{% endif %}"
    "Instruction: " + ASKED + "{{ '\\n' }}Response:"
    "{% endif %}{% endfor %}",
    "gemma": "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'assistant' %}<start_of_turn>model\n{{ m.content }}<end_of_turn>\n"
    "{% elif m.role == 'user' %}<start_of_turn>user\n" + ASKED +
    "{% if m.input %}{{ '\\n\\n' + m.input | trim }}{% endif %}<end_of_turn>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
}  # fmt: skip


def open_records(cfg, seed):
    """Return the instruction data: (training conversations, held-out conversations)."""
    if cfg.data in CORPORA:
        corpus = importlib.import_module(CORPORA[cfg.data])
        held_out = corpus.records(seed, cfg.num_checked, held_out=True)
        return list(corpus.records(seed, cfg.max_records or 12_000)), list(held_out)
    if (path := Path(cfg.data)).exists():
        splits = {name: ((f"{file.name}, {place}", row) for file in files for place, row in read_rows(file))
                  for name, files in open_splits(path, ROWS).items()}  # fmt: skip
    else:
        splits = load_dataset_from_hub(RECORDS_ON_THE_HUB.get(cfg.data, cfg.data), "data")
        splits = {name: ((f"row {i}", row) for i, row in enumerate(rows, 1)) for name, rows in splits.items()}
    conversations, refused, notes = {name: [] for name in splits}, [], Counter()
    for name, rows in splits.items():
        for place, row in itertools.islice(rows, cfg.max_records or None):
            try:
                if isinstance(row, Exception):
                    raise row
                conversations[name].append(read_messages(row, notes))
            except (UserError, ValueError) as e:
                refused.append(f"{place}: {e}")
    count = sum(map(len, conversations.values()))
    if refused or count < 2:  # one of them is held out
        counts = f"{len(refused):,} of {len(refused) + count:,} records cannot be read"
        reason = f"{counts}, the first: {refused[0]}" if refused else "needs at least two records, to hold one out"
        raise UserError(f"--data={cfg.data}: {reason}")
    counts = ", ".join(f"{what} ({count:,} times)" for what, count in (+notes).most_common())
    print(f"{cfg.data}: not read: {counts or 'nothing'}")
    if "val" in splits:
        print(f"{cfg.data}: held out: its validation split, whatever val_fraction is")
        return conversations["train"], conversations["val"]
    split, fraction = ([], []), max(cfg.val_fraction, min(0.5, 8 / count))
    for messages in conversations["train"]:
        split[is_held_out(json.dumps(messages), fraction)].append(messages)
    if not all(split):  # chance can put two or three records into one split
        min(split, key=len).append(max(split, key=len).pop())
    return split


# ---- instruction tuning ----------------------------------------------------------------------------------------------

ROW_TOKENS = 2048  # longest row, unless a record is longer; the cost of full attention grows with its square


def pack(lengths, row_length):
    """Pack records with these lengths into rows. Return a list of record numbers for each row. The longest records are
    placed first, each in the row with the most room. No record may be longer than a row."""
    num_rows = math.ceil(sum(lengths) / row_length)
    while True:
        rows = [(0, row, []) for row in range(num_rows)]  # (tokens, row, records): a heap
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            tokens, row, records = rows[0]
            heapq.heapreplace(rows, (tokens + lengths[i], row, [*records, i]))
        if max(tokens for tokens, *_ in rows) <= row_length:
            return [records for _, _, records in rows]
        num_rows += math.ceil(num_rows / 100)


class InstructionTuning:
    """Instruction tuning, as a task for fit()."""

    floor = None  # the entropy of the responses is not known

    def __init__(self, lora_cfg, cfg, model, tokenizer, template, records, base_model="", base_fingerprint=None):
        """template: text of a chat template. records: (training conversations, held-out conversations). base_model:
        name of the model to tune. base_fingerprint: fingerprint of its weights, if an adapter is trained."""
        self.lora_cfg, self.cfg, self.model, self.tokenizer = lora_cfg, cfg, model, tokenizer
        self.template, self.base_model, self.base_fingerprint = template, base_model, base_fingerprint
        self.end = end_of_response(tokenizer, template)
        self.cut, self.dropped, self.changed = 0, 0, Counter()  # changed: texts that encoding and decoding change
        self.train_set, _ = self.encode_all(records[0])
        self.val_set, self.val_records = self.encode_all(records[1])
        if not (self.train_set and self.val_set):
            which, limit = "held-out" if self.train_set else "train", lora_cfg.max_length
            raise UserError(f"--data={lora_cfg.data}: no {which} record has a response within {limit} tokens")
        lengths, val_lengths = ([len(tokens) for tokens, _ in encoded] for encoded in (self.train_set, self.val_set))
        # all batches have one shape (rows_per_batch, row_length), so that they share one compiled graph
        count = lora_cfg.batch_size or max(4, round(len(lengths) / 100))
        size = min(lora_cfg.max_tokens_per_batch, round(count * sum(lengths) / len(lengths)))
        self.rows_per_batch = max(1, size // ROW_TOKENS)
        self.train_rows = pack(lengths, max(size // self.rows_per_batch, *lengths, *val_lengths))
        self.row_length = max(*(sum(lengths[i] for i in row) for row in self.train_rows), *val_lengths)
        self.val_rows = pack(val_lengths, self.row_length)

    def encode_all(self, conversations):
        """Return [(tokens, labels), ...] for the usable conversations, and these conversations, cut to size. A label
        is the next token if it belongs to a response, and -100 elsewhere."""
        encoded, used = [], []
        for messages in conversations:
            if (shortened := self.shorten(messages)) is None:
                self.dropped += 1
                continue
            kept, ids, is_response = shortened
            self.cut += kept is not messages
            if not self.tokenizer.bpe:
                texts = [m[key] for m in kept for key in ("content", "input") if m.get(key)]
                self.changed.update(t[:60] for t in texts if self.tokenizer.decode(self.tokenizer.encode(t)) != t)
            ids = torch.tensor(ids)
            encoded.append((ids[:-1], ids.where(torch.tensor(is_response), -100)[1:]))
            used.append(kept)
        return encoded, used

    def shorten(self, messages):
        """Return (conversation cut to max_length tokens, its ids, whether each is a label). It loses its oldest turns,
        then the end of its last input. Return None if the rest is too long, or if it has no response to learn."""
        while True:
            ids, is_response = encode_conversation(self.tokenizer, messages, self.template)
            excess, (user, assistant) = len(ids) - self.lora_cfg.max_length, messages[-2:]
            if not (any(is_response) and assistant["content"].strip()):
                return None
            if excess <= 0:
                return messages, ids, is_response
            if len(messages) > 2:  # if there are many turns, drop several at once
                first = 2 * max(1, int(len(messages) / 2 * excess / len(ids) / 2))
                systems = [m["system"] for m in messages[: first + 1] if m.get("system")]
                system = {"system": "\n\n".join(systems)} if systems else {}
                messages = [messages[first] | system, *messages[first + 1 :]]
                continue
            text = user.get("input", "")
            length = len(text) - max(1, round(excess * len(text) / max(1, len(self.tokenizer.encode(text)))))
            if length < 1:
                return None
            messages = [user | {"input": text[:length]}, assistant]

    def collate(self, encoded, rows):
        """Return tokens, labels and doc_ids (B, T) of the given rows, padded to a whole batch."""
        shape = self.rows_per_batch, self.row_length
        x, y, doc_ids = (torch.full(shape, padding) for padding in (self.tokenizer.eot, -100, 0))
        for row, records in enumerate(rows):
            start = 0
            for number, i in enumerate(records, 1):
                tokens, labels = encoded[i]
                end = start + len(tokens)
                x[row, start:end], y[row, start:end], doc_ids[row, start:end] = tokens, labels, number
                start = end
        return x, y, doc_ids

    def micro_batches(self, step):
        size = self.rows_per_batch * self.cfg.gradient_accumulation_steps
        rows = epoch_shuffled_indices(len(self.train_rows), size, self.cfg.seed, step).reshape(-1, self.rows_per_batch)
        return [self.collate(self.train_set, [self.train_rows[i] for i in part]) for part in rows]

    def validation_sets(self):
        starts = range(0, len(self.val_rows), self.rows_per_batch)
        return {"val": (self.collate(self.val_set, self.val_rows[i : i + self.rows_per_batch]) for i in starts)}

    def metrics(self, losses):
        loss, perplexity = losses["val"], math.exp(min(losses["val"], 99))
        line = f"response loss {loss:.4f}, perplexity {perplexity:.3f} on held-out records"
        return {"val_loss": loss, "val_perplexity": perplexity}, line

    def answers(self, conversations, max_new_tokens):
        """Return the greedy answer to the last instruction of each conversation. max_new_tokens: a limit for each."""
        limit, stops = self.model.config.max_position_embeddings, [self.end, self.tokenizer.eot]
        prompts = [encode_conversation(self.tokenizer, messages[:-1], self.template)[0] for messages in conversations]
        limits = [min(n, limit - len(ids)) for n, ids in zip(max_new_tokens, prompts, strict=True)]
        # a batch has either short or long answers, and prompts of similar length
        order, answers = np.lexsort(([len(ids) for ids in prompts], [n > 100 for n in limits])), {}
        for batch in (order[i : i + 128] for i in range(0, len(order), 128)):
            batch_prompts, batch_limits = [prompts[i] for i in batch], [limits[i] for i in batch]
            texts = complete(self.model, self.tokenizer, batch_prompts, batch_limits, stop_ids=stops, temperature=0)
            answers.update(zip(batch, texts, strict=True))
        return [answers[i].strip() for i in range(len(prompts))]

    def sample(self):
        """Return the first held-out instruction with the model's answer."""
        messages = self.val_records[0]
        (answer,) = self.answers([messages], [self.cfg.sample_tokens])
        return f"{messages[-2]['content']} {messages[-2]['input']}\n  -> {answer}"

    def save_model(self, path, weights):
        """Write the adapter, or the whole model if it has none."""
        if lora_layers(self.model):
            save_adapter(self.model, path, self.base_model, weights)
        else:
            stops = sorted({self.tokenizer.eot, self.end})
            self.model.config.eos_token_id = stops if len(stops) > 1 else self.end
            self.model.save_pretrained(path, weights)
        self.tokenizer.save(path)
        instruct = {"template": self.template, "base_fingerprint": self.base_fingerprint}
        (path / "instruct.json").write_text(json.dumps(instruct) + "\n")


@runtime_errors("lower max_tokens_per_batch and raise gradient_accumulation_steps by the same factor")
def main(lora_cfg, cfg):
    device, compile = set_up(cfg.device, cfg.dtype, cfg.compile, cfg.fsdp)
    out_dir = cfg.out_dir or f"out/lora-{Path(lora_cfg.data).stem}"
    cfg = replace(cfg, compile=compile, out_dir=out_dir, init_from=resolve_init_from(out_dir, cfg.init_from))
    records = open_records(lora_cfg, cfg.seed)
    model, base, state = start_model(lora_cfg, cfg, records[0], device)
    tokenizer = Tokenizer.load(base)
    tokenizer.check_rows(model.config.vocab_size)
    template, source = choose_template(lora_cfg.template, [base])
    print(f"instruction format: {source or 'alpaca, because there is no chat template'}")
    tokenizer.config["chat_template"] = template
    base_fingerprint = weights_fingerprint(base) if lora_cfg.rank else None
    task = InstructionTuning(lora_cfg, cfg, model, tokenizer, template, records, state.base_model, base_fingerprint)
    task.cfg = cfg = fill_in(task, state.settings)
    print_plan(task)
    if cfg.init_from != "resume":  # saved with the state, so that a resumed run can report it too
        state.before = measure(task, min(240, lora_cfg.num_checked))
    fit(task, cfg, state, device)
    best = latest_intact_dir(Path(cfg.out_dir) / "best")
    load_checkpoint(model, best)
    after = measure(task, lora_cfg.num_checked)
    if get_rank() == 0:
        report(task, state, after)
        if lora_cfg.merge:
            save_merged(task, base, best)
        model_or_adapter = shlex.quote(f"--{'adapter' if lora_cfg.rank else 'model'}={best}")
        asked = shlex.quote(f"--instruct={task.val_records[0][-2]['content'][:200].partition(chr(10))[0]}")
        print(f"next: python sample.py {model_or_adapter} {asked}")
    shutdown_distributed()


def start_model(lora_cfg, cfg, conversations, device):
    """Return (the model to tune, with its adapters; the directory of its base model; the state to start from)."""
    last, settings = latest_intact_dir(Path(cfg.out_dir) / "last"), asdict(lora_cfg) | asdict(cfg)
    fingerprint = hashlib.blake2b(json.dumps(conversations).encode()).hexdigest()
    if cfg.init_from in ("", "scratch"):
        raise UserError("LoRA tunes a trained model: name its directory, such as --init_from=out/fables/best")
    if cfg.init_from == "resume":
        if not last.is_dir():
            raise UserError(f"--init_from=resume: no checkpoint in {last}")
        fixed = ("optimizer", "rank", "alpha", "target_modules", "template")
        state = read_state(last, fingerprint, settings, fixed, cfg.fsdp)
        if not hasattr(state, "base_model"):
            raise UserError(f"--init_from=resume: the run in {last} was not written by lora.py")
    else:
        state = new_state(fingerprint, settings)
        state.base_model = cfg.init_from
    base = last if cfg.init_from == "resume" and not lora_cfg.rank else hub_directory(state.base_model)
    model = open_model(base, loading_device(cfg.fsdp, device))
    if lora_cfg.max_length > (limit := model.config.max_position_embeddings):
        raise UserError(f"max_length={lora_cfg.max_length} exceeds max_position_embeddings={limit}: lower it")
    torch.manual_seed(cfg.seed)  # makes the random initial A repeatable
    if cfg.init_from == "resume" and lora_cfg.rank:
        check_base(last, base)
        with user_errors(last):
            load_adapter(model, last, lora_cfg.lora_dropout)
    elif lora_cfg.rank:
        with user_errors(f"--target_modules={lora_cfg.target_modules}"):
            add_lora(model, lora_cfg.rank, lora_cfg.alpha, lora_cfg.lora_dropout, lora_cfg.target_modules)
    if cfg.fsdp:
        apply_fsdp(model, device)
    else:  # FSDP needs one dtype in a block
        cast_base_weights(model, pick_dtype(cfg.dtype, device))
    return model, base, state


def fill_in(task, before):
    """Return the settings with max_iters, learning_rate and eval_interval filled in where they are None. The values
    come from `before`, the settings of the resumed run, or from the number of records and the model's width."""
    lora_cfg, cfg = task.lora_cfg, task.cfg
    per_epoch = len(task.train_rows) / task.rows_per_batch / cfg.gradient_accumulation_steps
    max_iters = max(1, round(per_epoch * (lora_cfg.epochs or max(2, 50 / per_epoch))))
    # narrow models allow higher rates: 2e-4 for Google's (2.4e-4 for 270M), 2.7e-3 for the quick start's
    width = task.model.config.hidden_size
    rate = max(2e-4, min(100 / width, 1) / width) * (1.0 if lora_cfg.rank else 0.1)
    defaults = {"max_iters": max_iters, "learning_rate": rate, "eval_interval": math.ceil(per_epoch)}
    missing = {key: before.get(key) or value for key, value in defaults.items() if getattr(cfg, key) is None}
    with user_errors("at the default rate"):
        return replace(cfg, **missing)


def print_plan(task):
    """Print what will be trained, and for how long."""
    cfg, trainable = task.cfg, sum(p.numel() for p in task.model.parameters() if p.requires_grad)
    rows, count = task.rows_per_batch * cfg.gradient_accumulation_steps, len(task.train_rows)  # of a step, of an epoch
    tokens = sum(len(tokens) for tokens, _ in task.train_set) / count  # of a row, without padding
    print(f"data: {len(task.train_set):,} records to train on, {len(task.val_set):,} held out; {task.cut:,} cut to "
          f"max_length={task.lora_cfg.max_length}, {task.dropped:,} dropped (too long, or no response); in "
          f"{count:,} rows of {task.row_length}, {1 - tokens / task.row_length:.1%} padding")  # fmt: skip
    if task.changed:
        print(f"{task.changed.total():,} texts change when they are encoded and decoded, such as {min(task.changed)!r}")
    print(f"training {trainable:,} of {task.model.num_params():,} parameters: {cfg.max_iters:,} steps of "
          f"{tokens * rows:,.0f} tokens, {cfg.max_iters * rows / count:.1f} epochs; learning rate "
          f"{cfg.learning_rate:.2g}, {warmup_steps(cfg):,.0f} steps of warmup")  # fmt: skip
    if rows < get_world_size():
        print(f"warning: a step has {rows} rows, fewer than there are processes: some stay idle")


def measure(task, num_checked=None):
    """Return (shares by name, answers to show) for the report. num_checked: how many answers to check; None: all."""
    checked, outcomes, data = task.val_records[:num_checked], {}, task.lora_cfg.data
    limits = [2 * len(task.tokenizer.encode(messages[-1]["content"])) + 20 for messages in checked]
    task.model.eval()
    answers = task.answers(checked, limits)
    task.model.train()
    for messages, answer in zip(checked, answers, strict=True):
        words, wanted_words = (text.casefold().split() for text in (answer, messages[-1]["content"]))
        outcomes.setdefault("exact match", []).append(words == wanted_words)
        if data in CORPORA:
            turn = messages[-2]["turn"]
            follows = importlib.import_module(CORPORA[data]).follows(turn, answer)
            for name in ("followed: all", f"followed: {turn['task']}"):
                outcomes.setdefault(name, []).append(follows)
    shares = {name: sum(values) / len(values) for name, values in sorted(outcomes.items())}
    return shares, answers[: task.lora_cfg.num_samples]


def report(task, state, after):
    """Print the comparison of before and after, and append it to samples.txt and log.jsonl."""
    (shares_before, answers_before), (shares_after, answers_after) = state.before, after
    out_dir, lines = Path(task.cfg.out_dir), []
    losses = [(e["val_loss"], e["step"]) for e in read_log(out_dir / "log.jsonl", "eval")] or [(math.nan, state.step)]
    (first, _), (best, best_step), (last, last_step) = losses[0], min(losses), losses[-1]
    for shares, loss in ((shares_before, first), (shares_after, state.best_val_loss)):
        shares |= {"response loss": loss, "response perplexity": math.exp(min(loss, 99))}
    for messages, was, now in zip(task.val_records, answers_before, answers_after, strict=False):
        user, assistant = messages[-2:]
        lines += [f"instruction: {user['content']}", *([f"input: {user['input']}"] if user["input"] else [])]
        lines += [f"wanted: {assistant['content']}", f"before: {was}", f"after: {now}", ""]
    for name in (name for name in shares_before if name in shares_after):  # a resumed run may measure others
        lines.append(f"{name}: {shares_before[name]:.4f} before, {shares_after[name]:.4f} after")
    if last > 1.01 * best:
        lines.append(f"overfitting: the response loss rose from {best:.4f} at step {best_step} (reported above) to "
                     f"{last:.4f} at step {last_step}: use fewer epochs or a lower learning rate")  # fmt: skip
    print(text := "\n".join(["", *lines]))
    append(out_dir / "samples.txt", f"--- before and after, of the best checkpoint{text}\n")
    entry = {"event": "report", "step": state.step, "before": shares_before, "after": shares_after}
    append(out_dir / "log.jsonl", json.dumps(finite(entry)) + "\n")


def save_merged(task, base, best):
    """Save the best checkpoint as a plain model, in float32, to out_dir/merged."""
    if lora_layers(task.model):
        check_base(best, base)
        task.model = merge_lora(load_adapter(open_model(base, "cpu"), best))
    else:
        task.model = open_model(best, "cpu")
    task.base_fingerprint = None
    write_checkpoint(Path(task.cfg.out_dir) / "merged", task.save_model, task.model.state_dict())


# ---- adapters on disk, in PEFT's format ------------------------------------------------------------------------------


def save_adapter(model, path, base_model="", weights=None):
    """Write adapter_config.json and adapter_model.safetensors as PEFT does. base_model: directory or Hub id of the
    base, for programs that open the adapter. weights: a state dict to write instead of the model's own."""
    layers, path, weights = lora_layers(model), Path(path), weights or model.state_dict()
    if not layers:
        raise ValueError("the model has no adapter: call add_lora(model) first")
    layer, names = layers[0][1], [name for name, _ in layers]
    kinds = {name.rpartition(".")[2] for name in names}
    left = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base_model), "r": layer.rank,
        "lora_alpha": layer.alpha, "lora_dropout": layer.dropout.p, "bias": "none", "fan_in_fan_out": False,
        "target_modules": names if kinds & left else sorted(kinds), "inference_mode": True,
    }  # fmt: skip
    path.mkdir(parents=True, exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {key: weights[name].detach().contiguous() for key, name in adapter_names(model).items()}
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})


def adapter_names(model):
    """Return {PEFT's name: our name} of the adapters' weights: every parameter of a LoRALinear outside its base."""
    parts = [(f"{name}.{part}", part) for name, layer in lora_layers(model) for part, _ in layer.named_parameters()]
    return {f"base_model.model.{name}": name for name, part in parts if not part.startswith("base_layer.")}


def load_adapter(model, path, dropout=None):
    """Add a PEFT adapter to a plain model, in place, at the layers that the adapter's weights name. Raises ValueError
    if the adapter does not fit the model or is not plain LoRA."""
    config, weights = read_adapter_config(Path(path)), read_adapter_weights(Path(path))
    rank, alpha = config["r"], config["lora_alpha"]
    if {tuple(w.shape[:1]) for name, w in weights.items() if "lora_A" in name} != {(rank,)}:
        raise ValueError(f"adapter_model.safetensors: lora_A is not of rank {rank} in every layer")
    dropout = config["lora_dropout"] if dropout is None else dropout
    targets = sorted({name.rpartition(".lora_")[0] for name in weights})
    add_lora(model, rank, alpha * rank**0.5 if config["use_rslora"] else alpha, dropout, targets)
    ours = {name: model.get_parameter(name).data for name in adapter_names(model).values()}
    shapes = [{(name, tuple(w.shape)) for name, w in tensors.items()} for tensors in (weights, ours)]
    if mismatched := sorted(shapes[0] ^ shapes[1]):
        name, shape = mismatched[0]
        raise ValueError(f"the adapter does not fit the model: only one of them has {name} {list(shape)}")
    for name, weight in weights.items():
        ours[name].copy_(weight)
    return model


def load_checkpoint(model, path):
    """Load a checkpoint of this run into the model: an adapter, or all weights. Every rank must call this function."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict  # slow to import

    weights, names = {}, adapter_names(model)
    if get_rank() == 0:
        weights = read_tensors(Path(path) / ("adapter_model.safetensors" if names else "model.safetensors"))
        weights = {names.get(key, key): weight for key, weight in weights.items()}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=dist.is_initialized(), strict=not names)
    set_model_state_dict(model, weights, options=options)


def cast_base_weights(model, dtype):
    """Store the frozen layers' weights in the dtype to which autocast casts them. The products stay the same, bfloat16
    takes half the memory, and no step needs a cast. Merging rereads the original weights from disk. Cast only if every
    linear layer has an adapter, because answers are generated without autocast, where dtypes cannot mix."""
    layers, embedding = [layer for _, layer in lora_layers(model)], model.model.embed_tokens
    if 3 * len(layers) == sum(isinstance(module, nn.Linear) for module in model.modules()):  # base, A and B
        for layer in layers:
            layer.base_layer.to(dtype)
        if torch.equal(embedding.weight.to(dtype).float(), embedding.weight):  # published weights are bfloat16
            embedding.to(dtype)


def choose_template(name, paths):
    """Return a chat template, and its name and source as a text. `name` decides. Without it, take the template of the
    first directory in `paths` that has one. The last resort is alpaca, with "" for its source."""
    if name:
        return TEMPLATES[name], f"{name} (--template)"
    for path in paths:
        if template := read_instruct(path).get("template") or read_chat_template(path):
            template = TEMPLATES.get(str(template), str(template))  # older runs saved its name
            known = [name for name, text in TEMPLATES.items() if text == template]
            return template, f"{known[0] if known else 'the chat template'} of {path}"
    return TEMPLATES["alpaca"], ""


def check_template(name):
    if name and name not in TEMPLATES:
        raise ValueError(f"template={name!r} must be one of {', '.join(TEMPLATES)}")


if __name__ == "__main__":
    run(main, LoraConfig, TuneConfig)
