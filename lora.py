"""
Instruction-tune a Gemma 3 with LoRA, or all of it (--rank=0). The loop is train.py's.

    python lora.py config/lora_fables.py                                  # after the quick start
    python lora.py --init_from=out/fables/best --data=records.json --out_dir=out/mine
    python sample.py --adapter=out/lora-fables/best --instruct="Tell a fable about a cat named Pim who eats too much."

LoRA (Hu et al. 2021) replaces a linear layer W by W + scale * B A, with A (rank, in) and B (out, rank) alone trained. B
starts at zero, so training starts from the model as it was. Adapters are saved in PEFT's format and open in PEFT. In a
loop of one's own:

    model = add_lora(Gemma.from_pretrained("out/fables/best"), rank=8)    # train what requires a gradient, then
    save_adapter(model, "out/mine")                                       # and later
    model = merge_lora(load_adapter(Gemma.from_pretrained("out/fables/best"), "out/mine"))
"""

import functools
import hashlib
import heapq
import importlib
import itertools
import json
import math
import re
import shlex
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors.torch import save_file

import train
from config import NO_LIMIT, UserError, check_range, run, user_errors
from model import complete, read_json, read_tensor, tensor_shapes, weights_fingerprint
from prepare import CORPORA, Tokenizer, hub_directory, intact_dir, is_held_out, load_from_hub, read_rows


@dataclass
class LoraConfig:
    """What instruction tuning alone needs."""

    data: str = "fables"  # fables, alpaca, dolly, a Hub id, or a .json, .jsonl or .parquet file of records
    template: str = ""  # what stands around an instruction: alpaca, short or gemma; empty: the model's own, or alpaca
    rank: int = 8  # of the adapters; 0: train all weights instead
    alpha: float = 16.0  # adapters count alpha / rank
    targets: str = "all-linear"  # which linear layers, as q_proj,v_proj
    lora_dropout: float = 0.0  # on the adapters' input
    epochs: float = 0.0  # over the records; 0: 3, or as many as make 100 updates
    max_records: int = 0  # use so many records; 0: all (fables: 12,000)
    max_length: int = 512  # tokens of prompt and response; longer prompts lose their beginning
    max_tokens_per_batch: int = 4096  # in rows that several records share
    batch_size: int = 0  # records per batch, about; 0: a hundredth of them, at least 4, if the tokens allow
    val_fraction: float = 0.05  # share of the records held out; of few records more, to have about 8
    num_checked: int = 1200  # held-out fable instructions answered and checked, the first 240 of them before too
    forgetting: str = ""  # a prepared dataset to measure bits per byte on, before and after, as fables
    forgetting_block_size: int = 512  # in rows of so many tokens; best those that the model was trained on
    num_samples: int = 4  # answers shown before and after
    top_k: int = 5  # for those answers
    merge: bool = False  # at the end also save the best adapter merged into its model, to out_dir/merged

    def __post_init__(self):
        if self.template and self.template not in TEMPLATES:
            raise ValueError(f"template={self.template!r} must be one of {', '.join(TEMPLATES)}")
        check_range(self, 2, NO_LIMIT, "max_length")
        check_range(self, self.max_length, NO_LIMIT, "max_tokens_per_batch")
        check_range(self, 1, NO_LIMIT, "forgetting_block_size")
        check_range(self, 1e-6, 1e6, "alpha")
        check_range(self, 0, 1e6, "epochs")
        check_range(self, 1e-6, 0.999, "val_fraction")
        check_range(self, 0, 0.99, "lora_dropout")


@dataclass
class TuneConfig(train.TrainConfig):
    """What every run of the loop needs, with defaults for tuning."""

    out_dir: str = ""  # where checkpoints and logs go; by default out/lora-<data>
    init_from: str = ""  # the model to tune, a directory or a Hub id of a Gemma 3; or resume (out_dir/last)
    max_iters: int | None = None  # updates; by default as many as epochs makes
    optimizer: str = "adamw"  # adamw or muon
    learning_rate: float | None = None  # the peak; by default 1 / hidden_size, a tenth of it for all weights
    warmup_iters: float = 0.05  # updates of linear warmup; below 1: that share of max_iters
    cooldown_frac: float = 0.5  # share of max_iters in which schedule=wsd comes down
    eval_interval: int | None = None  # updates between evaluations, each with a checkpoint; by default an epoch


# ---- LoRA itself -----------------------------------------------------------------------------------------------------


class LoRALinear(nn.Module):
    """A frozen linear layer with a low-rank addition: base(x) + scale * B(A(dropout(x)))."""

    def __init__(self, base, rank, alpha, dropout=0.0):
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, device=base.weight.device)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, device=base.weight.device)
        self.dropout = nn.Dropout(dropout)
        self.rank, self.alpha, self.scale = rank, alpha, alpha / rank
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))  # as PEFT does
        nn.init.zeros_(self.lora_B.weight)  # so that at first nothing changes

    def forward(self, x):
        base = self.base_layer(x.to(self.base_layer.weight.dtype))
        change = self.lora_B(self.lora_A(self.dropout(x.to(self.lora_A.weight.dtype)))) * self.scale
        return base + change.to(base.dtype)


def add_lora(model, rank=8, alpha=16, dropout=0.0, targets="all-linear"):
    """Put a LoRALinear around the targeted nn.Linear modules, in place, and freeze everything else.

    targets: "all-linear" or module names, as "q_proj,v_proj". Raises ValueError for a target that matches nothing."""
    if lora_layers(model):
        raise ValueError("the model has an adapter already: merge_lora(model) first")
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    kinds = {name.rpartition(".")[2] for name in linears}
    wanted = kinds if targets == "all-linear" else {target.strip() for target in targets.split(",")}
    if missing := sorted(wanted - kinds):
        raise ValueError(f"LoRA targets {', '.join(missing)} match nothing; there are {', '.join(sorted(kinds))}")
    model.requires_grad_(False)
    for name, linear in linears.items():
        if name.rpartition(".")[2] in wanted:
            model.set_submodule(name, LoRALinear(linear, rank, alpha, dropout).train(linear.training))
    return model


@torch.no_grad()
def merge_lora(model):
    """Fold the adapters into their base layers, in place: the plain model again, with the same function."""
    for name, layer in lora_layers(model):
        base = layer.base_layer
        delta = layer.lora_B.weight.float() @ layer.lora_A.weight.float() * layer.scale
        base.weight.copy_(base.weight.float() + delta)
        model.set_submodule(name, base)
    return model.requires_grad_(True)


def lora_layers(model):
    """(name, layer) of every LoRALinear in the model."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoRALinear)]


# ----------------------------------------------------------------------------------------------------------------------
# instruction data: conversations are lists of messages, dicts of role ("user" or "assistant") and content; a user's
# message may have an input, the text that its content is about

# what a user asks, after what a system message before it says
ASKED = (
    "{% if not loop.first and loop.previtem.role == 'system' %}{{ loop.previtem.content | trim + '\\n\\n' }}{% endif %}"
    "{{ m.content | trim }}"
)
# instruction formats: chat templates in Jinja, which transformers, vLLM and llama.cpp read too. A response ends with
# the special token right after it; where there is none, with end-of-text
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


def encode_conversation(tokenizer, messages, template):
    """Token ids of a conversation, and for each whether it belongs to a response, its end included. In "short", marked:

        <|endoftext|>Instruction: Who is it?\\nResponse: Emil.<|endoftext|>
                                                        ^^^^^^^^^^^^^^^^^^^

    template: one of TEMPLATES, or any chat template. Where the last message is a user's, the ids are a prompt for the
    response. Training and sampling both go through here, so their prompts can't differ. Contents are encoded by
    themselves: the name of a special token in one is text."""
    template = TEMPLATES.get(template, template)
    texts, marked = [], []  # the contents, and the messages with a mark in place of each
    for message in messages:
        is_response, marks = message["role"] == "assistant", {}
        for key in ("content", "input"):
            text = message.get(key) or ""
            if text or key == "content":
                marks[key] = f"\0{len(texts)}\0"
                texts.append((text if is_response else text.strip(), is_response))
        if template not in TEMPLATES.values():  # others know no input
            marks = {"content": "\n\n".join(marks.values())}
        marked.append({"role": message["role"], **marks})
    # the format's own text, a space or none, a content's number, own text, ...
    pieces = re.split(r"( ?)\0(\d+)\0", render(template, marked, tokenizer))
    if sorted(map(int, pieces[2::3])) != list(range(len(texts))):
        raise UserError("this chat template leaves out or repeats what was said: choose another format by --template")
    parts, is_response = [([tokenizer.bos], False)], False
    for own, space, number in zip(pieces[::3], [*pieces[1::3], ""], [*pieces[2::3], ""], strict=True):
        ids = tokenizer.encode(own, markers=True).tolist()
        if is_response:  # its end is learned too
            parts.append(([ids.pop(0) if ids and ids[0] in tokenizer.special_ids else tokenizer.eot], True))
        if number or not is_response:  # nothing follows the last response
            parts.append((ids, False))
        if number:
            text, is_response = texts[int(number)]
            # most tokenizers have words with the space before them
            parts.append((tokenizer.encode(space + text).tolist() if text else [], is_response))
    return [t for ids, _ in parts for t in ids], [flag for ids, flag in parts for _ in ids]


def render(template, messages, tokenizer):
    """The text of messages in a chat template, without the token that a text begins after."""
    with user_errors("the chat template can't be rendered"):
        text = compile_template(template).render(
            messages=messages,
            bos_token=tokenizer.bos_token,
            eos_token=tokenizer.eot_token,
            add_generation_prompt=messages[-1]["role"] != "assistant",
        )
    return text.removeprefix(tokenizer.bos_token)


@functools.cache
def compile_template(template):
    """A Jinja template, as transformers compiles it, in a sandbox: published models bring templates of their own."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template)


def end_of_response(tokenizer, template):
    """The token that ends a response in this format."""
    ids, _ = encode_conversation(tokenizer, exchange("a", "", "b"), template)
    return ids[-1]


def exchange(instruction, context, response):
    """An instruction and its response, as messages."""
    asked = {"role": "user", "content": instruction, "input": context}
    return [asked, {"role": "assistant", "content": response}]


def read_messages(record):
    """The conversation in a record of any usual shape, as messages; a system message joins the user's after it. Raises
    UserError for a record of another shape."""
    messages, asked = [], []  # asked: what has been said since the last response
    for message in record.get("messages") or record.get("conversations") or []:
        text = message.get("content", message.get("value")) or ""
        if not isinstance(text, str):
            raise UserError(f"the content of a message is {type(text).__name__}, not text")
        if message.get("role", message.get("from")) in ("assistant", "gpt", "model"):
            messages += exchange("\n\n".join(asked), "", text)
            asked = []
        else:
            asked.append(text.strip())
    if messages or asked:
        return messages or exchange("\n\n".join(asked), "", "")  # without a response: with an empty one
    for keys in RECORD_SHAPES:
        if keys[0] in record and keys[2] in record:
            return exchange(*("" if record.get(key) is None else str(record[key]) for key in keys))
    known = ", ".join(map("/".join, RECORD_SHAPES))
    raise UserError(f"it has {', '.join(record)}; known are {known} and messages")


# what a record's instruction, input and response may be called
RECORD_SHAPES = [
    ("instruction", "input", "output"),
    ("instruction", "context", "response"),
    ("prompt", "input", "completion"),
]
HUB_RECORDS = {"alpaca": "tatsu-lab/alpaca", "dolly": "databricks/databricks-dolly-15k"}


def open_records(cfg, seed):
    """The instruction data: (training conversations, held-out conversations)."""
    if cfg.data in CORPORA:
        corpus = importlib.import_module(CORPORA[cfg.data])
        held_out = corpus.records(seed, cfg.num_checked, held_out=True)
        return list(corpus.records(seed, cfg.max_records or 12_000)), list(held_out)
    if Path(cfg.data).exists():
        records = read_rows(Path(cfg.data))
    elif Path(cfg.data).suffix.lower() in (".json", ".jsonl", ".parquet"):
        raise UserError(f"--data={cfg.data}: no such file")
    else:
        splits = load_from_hub(HUB_RECORDS.get(cfg.data, cfg.data), "data")
        records = splits.get("train") or next(iter(splits.values()))
    conversations, split = [], ([], [])
    for i, record in enumerate(itertools.islice(records, cfg.max_records or None)):
        with user_errors(f"--data={cfg.data}, record {i + 1}"):
            conversations.append(read_messages(record))
    fraction = max(cfg.val_fraction, min(0.5, 8 / max(1, len(conversations))))
    for messages in conversations:
        split[is_held_out(json.dumps(messages), fraction)].append(messages)
    most, others = sorted(split, key=len, reverse=True)
    if len(most) > 1 and not others:  # of two or three, chance can put all on one side
        others.append(most.pop())
    return split


# ---- instruction tuning ----------------------------------------------------------------------------------------------


ROW_TOKENS = 2048  # in a row at most, unless a record is longer: attention to all of a row costs its square


def pack(lengths, row_length):
    """Put records of these lengths, none of them longer than a row, into rows -> lists of record numbers. The longest
    goes first, each into the row that has the most room."""
    num_rows = math.ceil(sum(lengths) / row_length)
    while True:
        rows = [(0, row, []) for row in range(num_rows)]  # (tokens, row, records): a heap
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            tokens, row, records = rows[0]
            heapq.heapreplace(rows, (tokens + lengths[i], row, [*records, i]))
        if max(tokens for tokens, *_ in rows) <= row_length:
            return [records for _, _, records in rows]
        num_rows += math.ceil(num_rows / 100)


def lengths_of(encoded):
    """How many positions each record (ids, targets) takes in a row: its last token is a target alone."""
    return [len(ids) - 1 for ids, _ in encoded]


class InstructionTuning:
    """Instruction tuning, as a task for Trainer."""

    floor = None  # of its loss, not known
    memory_hint = "lower max_tokens_per_batch, and raise gradient_accumulation_steps as much"

    def __init__(self, lora_cfg, cfg, model, tokenizer, template, records, base_model="", about=None):
        """template: the format, a chat template. records: conversations to train on, and held-out ones. base_model:
        the name of the model that is tuned. about: what a checkpoint says of itself, for sample.py."""
        self.lora_cfg, self.cfg, self.model, self.tokenizer = lora_cfg, cfg, model, tokenizer
        self.template, self.base_model, self.about = template, base_model, about or {}
        self.end = end_of_response(tokenizer, template)
        self.dropped = 0
        self.train_set, _ = self.encode_all(records[0])
        self.val_set, self.val_records = self.encode_all(records[1])
        if not (self.train_set and self.val_set):
            which, limit = "held-out" if self.train_set else "train", lora_cfg.max_length
            raise UserError(f"--data={lora_cfg.data}: no {which} record has a response within {limit} tokens")
        self.rows_per_batch, self.row_length = self.batch_shape()
        lengths, val_lengths = lengths_of(self.train_set), lengths_of(self.val_set)
        self.train_rows = pack(lengths, self.row_length)
        self.row_length = max(*(sum(lengths[i] for i in row) for row in self.train_rows), *val_lengths)
        self.val_rows = pack(val_lengths, self.row_length)

    def encode_all(self, conversations):
        """Conversations -> [(ids, targets)], those kept. Targets: the responses' ids, elsewhere -100. Too long ones
        lose what was said first; where the last response alone is too long, or empty, the conversation is dropped."""
        encoded, kept, limit = [], [], self.lora_cfg.max_length
        for messages in conversations:
            ids, is_response = encode_conversation(self.tokenizer, messages, self.template)
            length = is_response[::-1].index(False)  # of the last response
            if not 1 < length < limit:
                self.dropped += 1
                continue
            cut = max(1, len(ids) - limit + 1)  # the first token stays
            while cut > 1 and is_response[cut] and cut < len(ids) - length:  # half a response is nothing to learn
                cut += 1
            targets = [t if learned else -100 for t, learned in zip(ids, is_response, strict=True)]
            encoded.append((torch.tensor(ids[:1] + ids[cut:]), torch.tensor(targets[:1] + targets[cut:])))
            kept.append(messages)
        return encoded, kept

    def batch_shape(self):
        """Rows in a batch and tokens in a row, always the same, so that one compiled graph serves all batches."""
        lengths, cfg = lengths_of(self.train_set), self.lora_cfg
        records = cfg.batch_size or max(4, round(len(lengths) / 100))
        tokens = min(cfg.max_tokens_per_batch, round(records * sum(lengths) / len(lengths)))
        rows = max(1, tokens // ROW_TOKENS)
        return rows, max(tokens // rows, *lengths, *lengths_of(self.val_set))

    def collate(self, encoded, rows):
        """Inputs, targets and documents (B, T) of some rows, filled up to a batch."""
        x, y, documents = (
            torch.full((self.rows_per_batch, self.row_length), filler) for filler in (self.tokenizer.eot, -100, 0)
        )
        for row, records in enumerate(rows):
            start = 0
            for number, i in enumerate(records, 1):
                ids, targets = encoded[i]
                end = start + len(ids) - 1
                x[row, start:end], y[row, start:end], documents[row, start:end] = ids[:-1], targets[1:], number
                start = end
        return x, y, documents

    def micro_batches(self, step):
        accumulated, seed = self.cfg.gradient_accumulation_steps, self.cfg.seed
        taken = train.epoch_shuffled_indices(len(self.train_rows), accumulated * self.rows_per_batch, seed, step)
        batches = taken.reshape(accumulated, -1)
        return [self.collate(self.train_set, [self.train_rows[i] for i in batch]) for batch in batches]

    def validation_batches(self):
        for i in range(0, len(self.val_rows), self.rows_per_batch):
            yield self.collate(self.val_set, self.val_rows[i : i + self.rows_per_batch])

    def metrics(self, loss):
        results = {"val_loss": loss, "val_perplexity": math.exp(min(loss, 99))}
        line = f"response loss {loss:.4f}, perplexity {results['val_perplexity']:.3f} on held-out records"
        return results, line

    def answers(self, conversations, max_new_tokens, **sampling):
        """The model's own last response to each conversation, of max_new_tokens (a list) at most."""
        limit, stops = self.model.config.max_position_embeddings, [self.end, self.tokenizer.eot]
        max_new_tokens = [min(n, limit // 2) for n in max_new_tokens]
        prompts = [encode_conversation(self.tokenizer, messages[:-1], self.template)[0] for messages in conversations]
        answers = [""] * len(prompts)
        # short answers apart from long ones, then prompts of like length together
        order = np.lexsort(([len(ids) for ids in prompts], [n > 100 for n in max_new_tokens]))
        for batch in (order[i : i + 128] for i in range(0, len(order), 128)):
            limits = [max_new_tokens[i] for i in batch]
            # too long ones lose what was said first
            kept = [limit - 1 - max(1, n) for n in limits]
            fitting = [prompts[i][:1] + prompts[i][1:][-n:] for i, n in zip(batch, kept, strict=True)]
            texts = complete(self.model, self.tokenizer, fitting, limits, stop_ids=stops, **sampling)
            for i, text in zip(batch, texts, strict=True):
                answers[i] = text.strip()
        return answers

    def sample(self):
        """The first held-out instruction, and the answer to it as the model stands."""
        messages = self.val_records[0]
        (answer,) = self.answers([messages], [self.cfg.sample_tokens], top_k=self.lora_cfg.top_k, seed=self.cfg.seed)
        return f"{messages[-2]['content']} {messages[-2]['input']}\n  -> {answer}"

    def save_model(self, path, weights):
        """The adapter; or the whole model, where all of it was trained or the adapter has been merged."""
        if lora_layers(self.model):
            save_adapter(self.model, path, self.base_model, weights)
        else:
            ends = sorted({self.tokenizer.eot, self.end})
            self.model.config.eos_token_id = ends if len(ends) > 1 else self.end
            self.model.save_pretrained(path, weights)
        self.tokenizer.save(path)
        (path / "instruct.json").write_text(json.dumps({"template": self.template, **self.about}) + "\n")


@train.runtime_errors(InstructionTuning.memory_hint)
def main(lora_cfg, cfg):
    cfg, device = train.set_up(cfg)
    cfg = train.resolve_out_dir(replace(cfg, out_dir=cfg.out_dir or f"out/lora-{Path(lora_cfg.data).stem}"))
    records = open_records(lora_cfg, cfg.seed)
    model, base, state = start_model(lora_cfg, cfg, records[0], device)
    tokenizer = Tokenizer.load(base)
    template = TEMPLATES.get(lora_cfg.template) or template_of(base, tokenizer) or TEMPLATES["alpaca"]
    tokenizer.config["chat_template"] = template
    about = {"base_fingerprint": weights_fingerprint(base)} if lora_cfg.rank else {}
    task = InstructionTuning(lora_cfg, cfg, model, tokenizer, template, records, state["base_model"], about)
    task.cfg = cfg = fill_in(task, state["settings"])
    plain_text = open_plain_text(lora_cfg, cfg, model, tokenizer)
    trainer = train.Trainer(task, state, device)
    print_plan(task)
    if cfg.init_from != "resume":  # what the report compares with must survive an interruption
        trainer.state.before = measure(trainer, plain_text, num_checked=240)
    trainer.fit()
    best = intact_dir(Path(cfg.out_dir) / "best")
    load_checkpoint(model, best)
    after = measure(trainer, plain_text)
    if train.get_rank() == 0:
        report(task, trainer.state, after)
        if lora_cfg.merge:
            save_merged(task, base, best)
        model_or_adapter = shlex.quote(f"--{'adapter' if lora_cfg.rank else 'model'}={best}")
        asked = shlex.quote(f"--instruct={task.val_records[0][-2]['content'][:200].partition(chr(10))[0]}")
        print(f"next: python sample.py {model_or_adapter} {asked}")
    train.shutdown_distributed()


def start_model(lora_cfg, cfg, conversations, device):
    """The model to tune, adapters put in; the directory of the model under them; and the state to train it from."""
    last, digest = intact_dir(Path(cfg.out_dir) / "last"), hashlib.blake2b(json.dumps(conversations).encode())
    state = {"dataset": digest.hexdigest(), "settings": asdict(lora_cfg) | asdict(cfg)}
    if cfg.init_from in ("", "scratch"):
        raise UserError("LoRA tunes a trained model: name its directory, as --init_from=out/fables/best")
    if cfg.init_from == "resume":
        if not last.is_dir():
            raise UserError(f"--init_from=resume: no checkpoint in {last}")
        state = train.read_state(last, state, ("optimizer", "rank", "alpha", "targets", "template"), cfg.fsdp)
        if "base_model" not in state:
            raise UserError(f"--init_from=resume: the run in {last} is not an instruction tuning")
    else:
        state["base_model"] = cfg.init_from
    base = last if cfg.init_from == "resume" and not lora_cfg.rank else hub_directory(state["base_model"])
    model = train.open_model(base, train.loading_device(cfg, device))
    if lora_cfg.max_length > (limit := model.config.max_position_embeddings):
        raise UserError(f"max_length={lora_cfg.max_length} exceeds max_position_embeddings={limit}: lower it")
    torch.manual_seed(cfg.seed)  # draws A
    if cfg.init_from == "resume" and lora_cfg.rank:
        check_base(last, base)
        with user_errors(last):
            load_adapter(model, last, lora_cfg.lora_dropout)
    elif lora_cfg.rank:
        with user_errors(f"--targets={lora_cfg.targets}"):
            add_lora(model, lora_cfg.rank, lora_cfg.alpha, lora_cfg.lora_dropout, lora_cfg.targets)
    if not cfg.fsdp:  # which wants one dtype in a block
        cast_base_weights(model, train.pick_dtype(cfg.dtype, device))
    return model, base, state


def fill_in(task, before):
    """The settings that the number of records and the size of the model decide, where they were left open now and
    `before`, in the run that is resumed."""
    lora_cfg, cfg = task.lora_cfg, task.cfg
    per_epoch = len(task.train_rows) / task.rows_per_batch / cfg.gradient_accumulation_steps
    max_iters = max(1, round(per_epoch * (lora_cfg.epochs or max(3, 100 / per_epoch))))
    defaults = {
        "max_iters": max_iters,
        "learning_rate": (1.0 if lora_cfg.rank else 0.1) / task.model.config.hidden_size,
        "eval_interval": math.ceil(per_epoch),
    }
    filled_in = {key: before.get(key) or value for key, value in defaults.items() if getattr(cfg, key) is None}
    with user_errors("at the default rate"):
        return replace(cfg, **filled_in)


def open_plain_text(lora_cfg, cfg, model, tokenizer):
    """The text that --forgetting names, as the task whose validation shows what tuning costs; or None."""
    if not lora_cfg.forgetting:
        return None
    dataset = train.open_dataset(lora_cfg.forgetting)
    if dataset.tokenizer.spec["model"] != tokenizer.spec["model"]:
        raise UserError(f"--forgetting={lora_cfg.forgetting}: prepared with another tokenizer than the model has")
    block_size = min(lora_cfg.forgetting_block_size, model.config.max_position_embeddings)
    return train.Pretraining(train.PretrainConfig(block_size=block_size), cfg, model, dataset)


def print_plan(task):
    """What will be trained, for how long and how fast."""
    cfg, (trainable, total) = task.cfg, count_parameters(task.model)
    per_update = cfg.gradient_accumulation_steps * task.rows_per_batch / len(task.train_rows)  # share of an epoch
    tokens = sum(lengths_of(task.train_set)) * per_update
    padding = 1 - tokens / cfg.gradient_accumulation_steps / task.rows_per_batch / task.row_length
    print(f"data: {len(task.train_set):,} records to learn, {len(task.val_set):,} held out, {task.dropped:,} dropped; "
          f"in {len(task.train_rows):,} rows of {task.row_length}, {padding:.1%} of them padding")  # fmt: skip
    print(f"training {trainable:,} of {total:,} parameters: {cfg.max_iters:,} updates of {tokens:,.0f} tokens, "
          f"{cfg.max_iters * per_update:.1f} epochs; learning rate {cfg.learning_rate:.2g}, "
          f"{train.warmup_updates(cfg):,.0f} updates of warmup")  # fmt: skip
    if (rows := task.rows_per_batch * cfg.gradient_accumulation_steps) < train.get_world_size():
        print(f"warning: an update has {rows} rows, fewer than processes: the others have nothing to do")


def measure(trainer, plain_text, num_checked=None):
    """What the report compares before and after: (figures by name, the answers shown). num_checked: answers to check,
    by default all."""
    task, model, lora_cfg = trainer.task, trainer.model, trainer.task.lora_cfg
    records, results = task.val_records, {}
    model.eval()
    if lora_cfg.data in CORPORA:
        follows = importlib.import_module(CORPORA[lora_cfg.data]).follows
        checked, followed = records[:num_checked], {"all": []}
        enough = [2 * len(task.tokenizer.encode(messages[-1]["content"])) + 20 for messages in checked]
        for messages, answer in zip(checked, task.answers(checked, enough, temperature=0), strict=True):
            turn = messages[-2]["turn"]
            followed["all"].append(follows(turn, answer))
            followed.setdefault(turn["task"], []).append(followed["all"][-1])
        results |= {f"followed: {name}": sum(outcomes) / len(outcomes) for name, outcomes in sorted(followed.items())}
    if plain_text:
        loss = train.evaluate(model, plain_text.validation_batches(), trainer.device, trainer.dtype)
        results["bits per byte on plain text"] = plain_text.metrics(loss)[0]["val_bpb"]
    shown = records[: lora_cfg.num_samples]
    limits = [task.cfg.sample_tokens] * len(shown)
    answers = task.answers(shown, limits, top_k=lora_cfg.top_k, seed=task.cfg.seed)
    model.train()
    return results, answers


def report(task, state, after):
    """The comparison of before and after, to the terminal and samples.txt."""
    (results_before, answers_before), (results_after, answers_after) = state.before, after
    log = train.read_log(Path(task.cfg.out_dir) / "log.jsonl")
    first = next((entry["val_loss"] for entry in log if entry["event"] == "eval"), None) or math.nan
    for results, loss in ((results_before, first), (results_after, state.best_val_loss)):
        results |= {"response loss": loss, "response perplexity": math.exp(min(loss, 99))}
    lines = []
    for messages, was, now in zip(task.val_records, answers_before, answers_after, strict=False):
        asked, wanted = messages[-2:]
        lines += [f"instruction: {asked['content']}", *([f"input: {asked['input']}"] if asked["input"] else [])]
        lines += [f"wanted: {wanted['content']}", f"before: {was}", f"after: {now}", ""]
    trainable, total = count_parameters(task.model)
    lines.append(f"trained: {trainable:,} of {total:,} parameters ({trainable / total:.2%})")
    for name, value in results_before.items():
        if name in results_after:  # a resumed run may measure other things
            lines.append(f"{name}: {value:.4f} before, {results_after[name]:.4f} after")
    text = "\n".join(lines)
    print("\n" + text)
    with open(Path(task.cfg.out_dir) / "samples.txt", "a", encoding="utf-8") as f:
        f.write("--- before and after, of the best checkpoint\n" + text + "\n")


def save_merged(task, base, best):
    """Save the plain model that the best checkpoint makes, in float32, to out_dir/merged."""
    if lora_layers(task.model):
        check_base(best, base)
        task.model = merge_lora(load_adapter(train.open_model(base, "cpu"), best))
    else:
        task.model = train.open_model(best, "cpu")
    task.about = {}
    train.write_checkpoint(Path(task.cfg.out_dir) / "merged", task.save_model, task.model.state_dict())


def count_parameters(model):
    """(trained, all)"""
    return sum(p.numel() for p in model.parameters() if p.requires_grad), model.num_params()


# ---- adapters on disk, in PEFT's format, and what a checkpoint says of itself ----------------------------------------


def save_adapter(model, path, base_model="", weights=None):
    """Write adapter_config.json and adapter_model.safetensors as PEFT does. base_model: a directory or Hub id, for
    those who open it. weights: a state dict to write in place of the model's own."""
    layers, path, weights = lora_layers(model), Path(path), weights or model.state_dict()
    if not layers:
        raise ValueError("the model has no adapter: add_lora(model) makes one")
    layer = layers[0][1]
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base_model),
        "r": layer.rank,
        "lora_alpha": layer.alpha,
        "lora_dropout": layer.dropout.p,
        "target_modules": sorted({name.rpartition(".")[2] for name, _ in layers}),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    path.mkdir(parents=True, exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps(about, indent=2) + "\n")
    tensors = {key: weights[name].detach().contiguous() for key, name in adapter_names(model).items()}
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})


def adapter_names(model):
    """PEFT's names of the adapters' weights, and ours."""
    return {
        f"base_model.model.{name}.{part}.weight": f"{name}.{part}.weight"
        for name, _ in lora_layers(model)
        for part in ("lora_A", "lora_B")
    }


def load_adapter(model, path, dropout=None):
    """Put the adapter of a PEFT directory into a plain model, in place. Raises ValueError where it does not fit, or is
    more than LoRA."""
    about, weights = read_adapter_config(Path(path)), read_tensors(Path(path) / "adapter_model.safetensors")
    rank, alpha, targets = about["r"], about["lora_alpha"], about["target_modules"]
    if {tuple(w.shape[:1]) for name, w in weights.items() if "lora_A" in name} != {(rank,)}:
        raise ValueError(f"adapter_model.safetensors: lora_A is not of rank {rank} throughout")
    targets = targets if isinstance(targets, str) else ",".join(targets)
    dropout = about["lora_dropout"] if dropout is None else dropout
    add_lora(model, rank, alpha * rank**0.5 if about["use_rslora"] else alpha, dropout, targets)
    ours = {key: model.get_parameter(name).data for key, name in adapter_names(model).items()}
    shapes = [{(name, tuple(w.shape)) for name, w in tensors.items()} for tensors in (weights, ours)]
    if odd := sorted(shapes[0] ^ shapes[1]):
        name, shape = odd[0]
        raise ValueError(f"the adapter and the model do not fit: {name} {list(shape)} is in one of them only")
    for name, weight in weights.items():
        ours[name].copy_(weight)
    return model


def read_tensors(file):
    return {name: read_tensor(file, name, "cpu") for name in tensor_shapes(file)}


def load_checkpoint(model, path):
    """Give a model the weights of a checkpoint of its own run, its adapter's or all. To be called by all processes."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict  # half a second

    weights, names = {}, adapter_names(model)
    if train.get_rank() == 0:
        weights = read_tensors(Path(path) / ("adapter_model.safetensors" if names else "model.safetensors"))
        weights = {names.get(key, key): weight for key, weight in weights.items()}
    how = {"broadcast_from_rank0": dist.is_initialized(), "strict": not names}  # an adapter is not all of the model
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, **how))


# of PEFT's LoraConfig: what load_adapter understands, by type
ADAPTER_FIELDS = {"r": (int,), "lora_alpha": (int, float), "lora_dropout": (int, float), "use_rslora": (bool,),
                  "target_modules": (str, list)}  # fmt: skip
# what changes no function
OTHER_FIELDS = {"peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision",
                "inference_mode", "megatron_core", "qalora_group_size", "corda_config", "lora_ga_config"}  # fmt: skip
# and values that change none: other initializations, as PiSSA's, change the base under the adapter too
PLAIN = {"bias": ["none"], "init_lora_weights": [True, "gaussian", "orthogonal", "mica"]}


def read_adapter_config(path):
    """adapter_config.json as a dict. Raises ValueError, with the field's name, where it is damaged or no plain LoRA."""
    about = {"lora_dropout": 0.0, "use_rslora": False} | read_json(path / "adapter_config.json")
    if about.get("peft_type") != "LORA":
        raise ValueError(f"adapter_config.json: peft_type={about.get('peft_type')!r}, only LORA can be read")
    for key, kinds in ADAPTER_FIELDS.items():
        if type(about.get(key)) not in kinds:
            raise ValueError(f"adapter_config.json: {key}={about.get(key)!r} is not of type {kinds[-1].__name__}")
    if not all(isinstance(target, str) for target in about["target_modules"]):
        raise ValueError("adapter_config.json: target_modules are not names")
    for key in about.keys() - ADAPTER_FIELDS.keys() - OTHER_FIELDS:
        if about[key] and about[key] not in PLAIN.get(key, []):
            raise ValueError(f"adapter_config.json: {key}={about[key]!r} is more than plain LoRA, all that can be read")
    return about


def cast_base_weights(model, dtype):
    """Keep the frozen layers' weights in the dtype that autocast multiplies them in: the same products, half the memory
    in bfloat16, and no cast at every step. What a merge reads is the file's. Where some linear layers have no LoRA all
    stay as they are: answers are made without autocast, and layers of two dtypes do not go together."""
    layers = [layer for _, layer in lora_layers(model)]
    if 3 * len(layers) == sum(isinstance(module, nn.Linear) for module in model.modules()):  # base, A and B
        for layer in layers:
            layer.base_layer.to(dtype)


def read_instruct(path):
    """What instruct.json says of the tuned model or adapter in a directory: its format, and the fingerprint of the
    weights under an adapter. {} where there is none."""
    file = Path(path) / "instruct.json"
    with user_errors(f"{file} is damaged"):
        return read_json(file) if file.exists() else {}


def template_of(path, tokenizer):
    """The format, a chat template, that the model or adapter in a directory was instructed in; None for a plain one."""
    if template := read_instruct(path).get("template"):
        return TEMPLATES.get(str(template), str(template))
    file = Path(path) / "generation_config.json"
    with user_errors(f"{file} is damaged"):
        stops = read_json(file).get("eos_token_id") if file.exists() else None
    template = tokenizer.config.get("chat_template")
    template = template if isinstance(template, str) else TEMPLATES["gemma"]
    end = end_of_response(tokenizer, template)
    # a published model that has learned to take turns stops at the end of one, too or alone
    takes_turns = end != tokenizer.eot or tokenizer.eot_token == "<end_of_turn>"
    return template if takes_turns and end in (stops if isinstance(stops, list) else [stops]) else None


def check_base(adapter, base):
    """Raises UserError where the weights in the directory `base` are not those that the adapter was tuned on."""
    wanted = read_instruct(adapter).get("base_fingerprint")  # PEFT's own have none
    if wanted and wanted != weights_fingerprint(base):
        raise UserError(
            f"{adapter} was tuned on other weights than {base} has now: name those by --model, or tune again"
        )


if __name__ == "__main__":
    run(main, LoraConfig, TuneConfig)
