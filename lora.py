"""
Instruction-tune a Gemma 3 with LoRA, or all of it (--rank=0). The loop is train.py's.

    python lora.py config/lora_fables.py                                  # after the quick start
    python lora.py --init_from=out/fables/best --data=records.json --out_dir=out/mine
    python sample.py --adapter=out/lora-fables/best --instruct="Tell a fable about a cat named Pim who eats too much."

LoRA (Hu et al. 2021) replaces a linear layer W by W + scale * B A, with A (rank, in) and B (out, rank) alone trained. B
starts at zero, so training starts from the model as it was. Adapters are saved in PEFT's format and open in PEFT.
"""

import json
import math
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from config import NO_LIMIT, UserError, check_range, run
from prepare import Tokenizer, hub_directory, is_held_out, load_from_hub, read_rows
from train import (
    PretrainConfig,
    Pretraining,
    TrainConfig,
    deal,
    evaluate,
    leave,
    make_optimizers,
    open_dataset,
    open_model,
    place,
    rank,
    read_state,
    resume_optimizers,
    save_checkpoint,
    shard,
    start_out_dir,
    start_system,
    train,
    whole_checkpoint,
)

# ----------------------------------------------------------------------------------------------------------------------
# LoRA itself


class LoRALinear(nn.Module):
    """A frozen linear layer with a low-rank addition: base(x) + scale * B(A(dropout(x)))."""

    def __init__(self, base, rank, scale, dropout):
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, device=base.weight.device)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, device=base.weight.device)
        self.scale = scale
        self.dropout = nn.Dropout(dropout)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))  # as PEFT does
        nn.init.zeros_(self.lora_B.weight)  # so that at first nothing changes

    def forward(self, x):
        base = self.base_layer(x.to(self.base_layer.weight.dtype))
        return base + self.lora_B(self.lora_A(self.dropout(x))) * self.scale


def lora_layers(model):
    """(name, layer) of every LoRALinear in the model."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoRALinear)]


def set_module(model, name, module):
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def add_lora(model, rank, alpha, dropout=0.0, targets="all-linear", rslora=False):
    """Put a LoRALinear around the targeted nn.Linear modules, in place, and freeze everything else.

    targets: "all-linear" or module names, as "q_proj,v_proj". The scale is alpha / rank, or alpha / sqrt(rank) with
    rslora (Kalajdzievski 2023). Raises ValueError for a target that matches nothing."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    kinds = {name.rpartition(".")[2] for name in linears}
    wanted = kinds if targets == "all-linear" else {target.strip() for target in targets.split(",")}
    if missing := wanted - kinds:
        raise ValueError(
            f"LoRA targets {', '.join(sorted(missing))} match nothing; there are {', '.join(sorted(kinds))}"
        )
    model.requires_grad_(False)
    scale = alpha / (math.sqrt(rank) if rslora else rank)
    for name, linear in linears.items():
        if name.rpartition(".")[2] in wanted:
            set_module(model, name, LoRALinear(linear, rank, scale, dropout))
    return model


def keep_base_in(model, dtype):
    """Keep the frozen layers' weights in the dtype that autocast multiplies them in: the same products, half the memory
    in bfloat16, and no cast at every step. What a merge reads is the file's."""
    for _, layer in lora_layers(model):
        layer.base_layer.to(dtype)


@torch.no_grad()
def merge_lora(model):
    """Fold the adapters into their base layers, in place: the plain model again, with the same function."""
    for name, layer in lora_layers(model):
        base = layer.base_layer
        delta = layer.lora_B.weight.float() @ layer.lora_A.weight.float() * layer.scale
        base.weight.copy_(base.weight.float() + delta)
        set_module(model, name, base)
    return model


def save_adapter(model, path, settings, weights=None):
    """Write adapter_config.json and adapter_model.safetensors as PEFT does. settings: base_model, rank, alpha, dropout,
    rslora. weights: a state dict to write in place of the model's own."""
    layers, weights = lora_layers(model), weights or model.state_dict()
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(settings["base_model"]),
        "r": settings["rank"],
        "lora_alpha": settings["alpha"],
        "lora_dropout": settings["dropout"],
        "use_rslora": settings["rslora"],
        "target_modules": sorted({name.rpartition(".")[2] for name, _ in layers}),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    path.mkdir(parents=True, exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps(about, indent=2) + "\n")
    tensors = {
        f"base_model.model.{name}.{part}.weight": weights[f"{name}.{part}.weight"].detach().contiguous()
        for name, _ in layers
        for part in ("lora_A", "lora_B")
    }
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})


def load_adapter(model, path, dropout=None):
    """Put the adapter of a PEFT directory into a plain model, in place. Raises ValueError where it does not fit."""
    path = Path(path)
    about = json.loads((path / "adapter_config.json").read_text())
    unknown = [key for key in ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save") if about.get(key)]
    if about.get("peft_type") != "LORA" or unknown:
        raise ValueError(f"{path}: only plain LoRA adapters can be read, not {unknown or about.get('peft_type')}")
    targets = about["target_modules"]
    targets = targets if isinstance(targets, str) else ",".join(targets)
    dropout = about.get("lora_dropout", 0.0) if dropout is None else dropout
    try:
        weights = load_file(path / "adapter_model.safetensors")
    except SafetensorError as e:
        raise ValueError(f"{path / 'adapter_model.safetensors'}: {e}") from None
    if odd := [name for name, w in weights.items() if "lora_A" in name and list(w.shape[:1]) != [about["r"]]]:
        raise ValueError(f"{path}: {odd[0]} is not of rank {about['r']}")
    add_lora(model, about["r"], about["lora_alpha"], dropout, targets, about.get("use_rslora", False))
    expected = {
        f"base_model.model.{name}.{part}.weight": getattr(layer, part).weight
        for name, layer in lora_layers(model)
        for part in ("lora_A", "lora_B")
    }
    if odd := sorted(set(weights) ^ set(expected)):
        raise ValueError(f"{path}: the adapter and the model do not fit: {odd[0]} and {len(odd) - 1} more")
    with torch.no_grad():
        for name, weight in expected.items():
            if weight.shape != weights[name].shape:
                raise ValueError(
                    f"{path}: {name} is {tuple(weights[name].shape)}, the model needs {tuple(weight.shape)}"
                )
            weight.copy_(weights[name])
    return model


# ----------------------------------------------------------------------------------------------------------------------
# instruction records

# what a turn looks like, with and without an input
TEMPLATES = {
    "alpaca": {
        "with_input": "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n{response}",
        "without": "Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\n{instruction}\n\n### Response:\n{response}",
    },
    "short": {
        "with_input": "Input: {input}\nInstruction: {instruction}\nResponse: {response}",
        "without": "Instruction: {instruction}\nResponse: {response}",
    },
    "gemma": {
        "with_input": "<start_of_turn>user\n{instruction}\n\n{input}<end_of_turn>\n<start_of_turn>model\n{response}",
        "without": "<start_of_turn>user\n{instruction}<end_of_turn>\n<start_of_turn>model\n{response}",
    },
}


def split_template(template, kind):
    """[(what stands before a field, "" or the space right before it, the field's name), ...]. Such a space is encoded
    with the field's text: most tokenizers have words with the space before them."""
    return re.findall(r"([^{]*?)( ?){(\w+)}", TEMPLATES[template][kind])


def encode_conversation(tokenizer, turns, template):
    """Token ids of a conversation, and for each whether it belongs to a response, its end included.

    turns: [(instruction, input, response), ...]; a response of None is still to come. Training and sampling both go
    through here, so their prompts can't differ."""
    ids, is_response = [tokenizer.bos], [False]

    def add(text, markers=False, response=False):
        ids.extend(map(int, tokenizer.encode(text, markers)))
        is_response.extend([response] * (len(ids) - len(is_response)))

    end = end_of_response(tokenizer, template)
    for i, (instruction, context, response) in enumerate(turns):
        if i and end != tokenizer.eot:  # Gemma's turns stand on lines of their own
            add("\n")
        texts = {"instruction": instruction.strip(), "input": context.strip(), "response": response}
        for before, space, field in split_template(template, "with_input" if context else "without"):
            add(before, markers=True)
            if texts[field]:
                add(space + texts[field], response=field == "response")
        if response is not None:
            ids.append(end)
            is_response.append(True)
    return ids, is_response


def template_of(path, tokenizer):
    """The template that the model or adapter in a directory was instructed with; None for a plain model."""
    ours, published = path / "instruct.json", path / "generation_config.json"
    try:
        template = json.loads(ours.read_text())["template"] if ours.exists() else None
        stops = json.loads(published.read_text()).get("eos_token_id") if published.exists() else None
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{path}: {ours.name} or {published.name} is damaged: {type(e).__name__}: {e}") from None
    if template in TEMPLATES:
        return template
    if template is not None:
        raise UserError(f"{ours}: no such template as {template!r}, known are {', '.join(TEMPLATES)}")
    end = end_of_response(tokenizer, "gemma")
    # a published model that has learned to take turns stops at the end of one too
    return "gemma" if isinstance(stops, list) and end in stops and end != tokenizer.eot else None


def chat_template(tokenizer, template):
    """encode_conversation's rendering in Jinja, for tokenizer_config.json: transformers, vLLM and llama.cpp then put
    chat messages to a tuned model in the form it knows."""
    (before, space, _), (after, lead, _) = split_template(template, "without")
    takes_turns = end_of_response(tokenizer, template) != tokenizer.eot
    parts = {
        "BEFORE": before + space,
        "AFTER": after,
        "LEAD": lead,
        "END": "<end_of_turn>" if takes_turns else tokenizer.eot_token,
        "BETWEEN": "\n" if takes_turns else "",
    }
    jinja = (
        "{{ bos_token }}{% for m in messages %}"
        "{% if m.role == 'assistant' %}{{ LEAD + m.content + END }}{{ '' if loop.last else BETWEEN }}"
        "{% elif loop.first or loop.previtem.role == 'assistant' %}{{ BEFORE + m.content | trim }}"
        "{% else %}{{ '\\n\\n' + m.content | trim }}{% endif %}"  # a system message, then the user's
        "{% if m.role != 'assistant' and (loop.last or loop.nextitem.role == 'assistant') %}{{ AFTER }}{% endif %}"
        "{% endfor %}"
    )
    return re.sub("|".join(parts), lambda found: json.dumps(parts[found[0]], ensure_ascii=False), jinja)


def end_of_response(tokenizer, template):
    """The token that ends a response: Gemma's end of turn where template and tokenizer have it, else end-of-text."""
    marker = tokenizer.encode("<end_of_turn>", markers=True)
    is_special = len(marker) == 1 and int(marker[0]) in tokenizer.special_ids
    return int(marker[0]) if template == "gemma" and is_special else tokenizer.eot


def read_turns(record, source):
    """The conversation in a record of any usual shape: [(instruction, input, response), ...]."""
    messages = record.get("messages") or record.get("conversations")
    if messages:
        turns, asked = [], []  # asked: what has been said since the last response, a system message included
        for message in messages:
            text = message.get("content", message.get("value")) or ""
            if message.get("role", message.get("from")) in ("assistant", "gpt", "model"):
                turns.append(("\n\n".join(asked), "", text))
                asked = []
            else:
                asked.append(text)
        return turns
    for asks, context, answers in (
        ("instruction", "input", "output"),
        ("instruction", "context", "response"),
        ("prompt", "input", "completion"),
    ):
        if asks in record and answers in record:
            fields = (record.get(name) for name in (asks, context, answers))
            return [tuple("" if field is None else str(field) for field in fields)]
    raise UserError(
        f"{source}: a record has {', '.join(record)}; known are instruction/input/output, "
        "instruction/context/response, prompt/completion and messages"
    )


HUB_RECORDS = {"alpaca": "tatsu-lab/alpaca", "dolly": "databricks/databricks-dolly-15k"}


def read_records(source):
    """The instruction records of alpaca, dolly, a Hub id, or a .json, .jsonl or .parquet file: an iterable of dicts."""
    path = Path(source)
    if not path.exists():
        if path.suffix in (".json", ".jsonl", ".parquet"):
            raise UserError(f"--data={source}: no such file")
        splits = load_from_hub(HUB_RECORDS.get(source, source), "data")
        return splits.get("train") or next(iter(splits.values()))
    return read_rows(path)


# ----------------------------------------------------------------------------------------------------------------------
# instruction tuning


@dataclass
class LoraConfig:
    """What instruction tuning alone needs."""

    data: str = "fables"  # fables, alpaca, dolly, a Hub id, or a .json, .jsonl or .parquet file of records
    template: str = ""  # what stands around an instruction: alpaca, short or gemma; empty: the model's own, or alpaca
    rank: int = 8  # of the adapters; 0: train all weights instead
    alpha: float = 16.0  # adapters count alpha / rank
    targets: str = "all-linear"  # which linear layers, as q_proj,v_proj
    rslora: bool = False  # adapters count alpha / sqrt(rank) instead
    lora_dropout: float = 0.0  # on the adapters' input
    epochs: float = 1.0  # over the records; sets max_iters
    max_records: int = 0  # use so many records; 0: all (fables: 12,000)
    max_length: int = 512  # tokens of prompt and response; longer prompts lose their beginning
    max_tokens_per_batch: int = 4096  # padding included; records of like length share a batch
    batch_size: int = 0  # records per batch at most; 0: as many as the tokens allow
    val_fraction: float = 0.05  # share of the records held out
    num_checked: int = 200  # held-out fable instructions answered and checked, before and after
    forgetting: str = ""  # a prepared dataset to measure bits per byte on, before and after, as fables
    forgetting_block_size: int = 512  # in rows of so many tokens; best those that the model was trained on
    num_samples: int = 4  # answers shown before and after
    top_k: int = 5  # for those answers
    merge: bool = False  # at the end also save the merged model, to out_dir/merged

    def __post_init__(self):
        if self.template and self.template not in TEMPLATES:
            raise ValueError(f"template={self.template!r} must be one of {', '.join(TEMPLATES)}")
        check_range(self, 0, NO_LIMIT, "rank", "batch_size", "max_records", "num_checked", "num_samples", "top_k")
        check_range(self, 2, NO_LIMIT, "max_length")
        check_range(self, self.max_length, NO_LIMIT, "max_tokens_per_batch")
        check_range(self, 1, NO_LIMIT, "forgetting_block_size")
        check_range(self, 1e-6, 1e6, "epochs", "alpha")
        check_range(self, 1e-6, 0.999, "val_fraction")
        check_range(self, 0, 0.99, "lora_dropout")


class Tuning:
    """Instruction tuning, as train.py's loop wants it: what Pretraining is for pretraining."""

    floor_loss = None
    lower_memory = "lower max_tokens_per_batch, and raise gradient_accumulation_steps as much"

    def __init__(self, cfg, loop, model, base_model, tokenizer, train_records, val_records):
        self.cfg, self.loop, self.model, self.base_model, self.tokenizer = cfg, loop, model, base_model, tokenizer
        self.end = end_of_response(tokenizer, cfg.template)
        self.dropped = 0
        self.train_set, _ = self.encode_all(train_records)
        self.val_set, self.val_records = self.encode_all(val_records)
        for name, records in (("train", self.train_set), ("held-out", self.val_set)):
            if not records:
                raise UserError(f"--data={cfg.data}: no {name} record has a response within {cfg.max_length} tokens")
        self.train_batches, self.val_batches = self.group(self.train_set), self.group(self.val_set)

    def encode_all(self, conversations):
        """Conversations -> [(ids, is_response)], and those kept. Too long ones lose what was said first; where the last
        response alone is too long, or empty, the conversation is dropped."""
        encoded, kept, limit = [], [], self.cfg.max_length
        for turns in conversations:
            ids, is_response = encode_conversation(self.tokenizer, turns, self.cfg.template)
            length = is_response[::-1].index(False)  # of the last response
            if not 1 < length < limit:
                self.dropped += 1
                continue
            if len(ids) > limit:
                cut = len(ids) - limit + 1  # the first token stays
                while is_response[cut] and cut < len(ids) - length:  # half a response is nothing to learn
                    cut += 1
                ids, is_response = ids[:1] + ids[cut:], is_response[:1] + is_response[cut:]
            encoded.append((torch.tensor(ids), torch.tensor(is_response)))
            kept.append(turns)
        return encoded, kept

    def group(self, encoded):
        """Batches, as lists of record numbers: records of like length together, within max_tokens_per_batch."""
        lengths = np.array([len(ids) for ids, _ in encoded])
        batches, batch = [], []
        for i in np.argsort(lengths, kind="stable"):
            tokens = (len(batch) + 1) * lengths[i]  # the longest comes last
            if batch and (tokens > self.cfg.max_tokens_per_batch or len(batch) == self.cfg.batch_size):
                batches.append(batch)
                batch = []
            batch.append(int(i))
        return [*batches, batch]

    def collate(self, encoded, batch):
        """Inputs and targets (B, T): targets are the responses' tokens, the rest is -100."""
        T = max(len(encoded[i][0]) for i in batch) - 1
        x = torch.full((len(batch), T), self.tokenizer.eot)
        y = torch.full((len(batch), T), -100)
        for row, i in enumerate(batch):
            ids, is_response = encoded[i]
            x[row, : len(ids) - 1] = ids[:-1]
            y[row, : len(ids) - 1] = torch.where(is_response, ids, -100)[1:]
        return x, y

    def updates(self, step):
        taken = deal(len(self.train_batches), self.loop.gradient_accumulation_steps, self.loop.seed, step)
        return [self.collate(self.train_set, self.train_batches[i]) for i in taken]

    def validation(self):
        for batch in self.val_batches:
            yield self.collate(self.val_set, batch)

    def padding(self):
        """Share of the training batches that is padding."""
        lengths = [[len(self.train_set[i][0]) for i in batch] for batch in self.train_batches]
        return 1 - sum(map(sum, lengths)) / sum(len(batch) * max(batch) for batch in lengths)

    def describe(self, loss):
        perplexity = math.exp(min(loss, 99))
        results = {"val_loss": loss, "val_perplexity": perplexity}
        return results, f"response loss {loss:.4f}, perplexity {perplexity:.3f} on held-out records"

    def answer(self, turns, max_new_tokens, **how):
        """The model's own last response to a conversation."""
        (instruction, context, _), history = turns[-1], turns[:-1]
        ids, _ = encode_conversation(self.tokenizer, [*history, (instruction, context, None)], self.cfg.template)
        limit = self.model.config.max_position_embeddings
        max_new_tokens = min(max_new_tokens, limit // 2)
        room = limit - max_new_tokens
        prompt = torch.tensor([ids[:1] + ids[1:][1 - room :]], device=self.model.device)
        stops = [self.end, self.tokenizer.eot]
        made = [t.item() for t in self.model.generate(prompt, max_new_tokens, stop_ids=stops, **how)]
        return self.tokenizer.decode([t for t in made if t not in stops]).strip()

    def sample(self):
        """The first held-out instruction, and the answer to it as the model stands."""
        turns = self.val_records[0]
        answer = self.answer(turns, self.loop.sample_tokens, top_k=self.cfg.top_k, seed=self.loop.seed)
        return f"{turns[-1][0]} {turns[-1][1]}\n  -> {answer}"

    def write_model(self, path, weights):
        """The adapter; or the whole model, where all of it was trained or the adapter has been merged."""
        if lora_layers(self.model):
            cfg = self.cfg
            settings = {"rank": cfg.rank, "alpha": cfg.alpha, "dropout": cfg.lora_dropout, "rslora": cfg.rslora}
            save_adapter(self.model, path, {"base_model": self.base_model, **settings}, weights)
        else:
            ends = sorted({self.tokenizer.eot, self.end})
            self.model.config.eos_token_id = ends if len(ends) > 1 else self.end
            self.model.save_pretrained(path, weights)
        self.tokenizer.save(path)
        (path / "instruct.json").write_text(json.dumps({"template": self.cfg.template}) + "\n")  # for sample.py


def open_records(cfg, loop):
    """The instruction data: (training conversations, held-out conversations, held-out fable records to check)."""
    if cfg.data == "fables":
        from data.fable_grammar import TASKS, conversation

        def told(turns):
            return [(turn["instruction"], turn["input"], turn["output"]) for turn in turns]

        checked = [
            conversation(f"{loop.seed}/held out/{i}", TASKS[i % len(TASKS)], held_out=True)[0]
            for i in range(cfg.num_checked)
        ]
        tasks = [*TASKS, "tell", "tell", "rewrite"]  # whole fables take the most learning
        count = cfg.max_records or 12_000
        train_records = [told(conversation(f"{loop.seed}/{i}", tasks[i % len(tasks)])) for i in range(count)]
        return train_records, [told([turn]) for turn in checked], checked
    train_records, val_records = [], []
    for i, record in enumerate(read_records(cfg.data)):
        if cfg.max_records and i >= cfg.max_records:
            break
        turns = read_turns(record, cfg.data)
        held_out = is_held_out(json.dumps(turns), cfg.val_fraction)
        (val_records if held_out else train_records).append(turns)
    return train_records, val_records, []


def measure(task, checked, pretraining, device, dtype):
    """What the report compares before and after: (figures by name, the answers shown)."""
    model = task.model
    results = {"response loss": evaluate(model, task.validation(), device, dtype)}
    results["response perplexity"] = math.exp(results["response loss"])
    model.eval()
    if checked:
        from data.fable_grammar import follows

        followed = {}
        for turn, turns in zip(checked, task.val_records, strict=True):
            enough = 2 * len(task.tokenizer.encode(turn["output"])) + 20
            answer = task.answer(turns, enough, temperature=0)
            followed.setdefault(turn["task"], []).append(follows(turn, answer))
        for name, outcomes in sorted(followed.items()):
            results[f"followed: {name}"] = sum(outcomes) / len(outcomes)
        results["followed: all"] = sum(map(sum, followed.values())) / len(checked)
    if pretraining:
        loss = evaluate(model, pretraining.validation(), device, dtype)
        results["bits per byte on plain text"] = pretraining.describe(loss)[0]["val_bpb"]
    how = {"top_k": task.cfg.top_k, "seed": task.loop.seed}
    shown = task.val_records[: task.cfg.num_samples]
    answers = [(turns[-1], task.answer(turns, task.loop.sample_tokens, **how)) for turns in shown]
    model.train()
    return results, answers


def report(task, before, after, out_dir):
    """The comparison, to the terminal and samples.txt."""
    lines = []
    for (turn, was), (_, now) in zip(before[1], after[1], strict=True):
        instruction, context, wanted = turn
        lines += [f"instruction: {instruction}", *([f"input: {context}"] if context else []), f"wanted: {wanted}"]
        lines += [f"before: {was}", f"after: {now}", ""]
    trainable = sum(p.numel() for p in task.model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in task.model.parameters())
    lines.append(f"trained: {trainable:,} of {total:,} parameters ({trainable / total:.2%})")
    for name, value in before[0].items():
        lines.append(f"{name}: {value:.4f} before, {after[0][name]:.4f} after")
    text = "\n".join(lines)
    print("\n" + text)
    with open(Path(out_dir) / "samples.txt", "a", encoding="utf-8") as f:
        f.write("--- before and after\n" + text + "\n")


def main(cfg, loop):
    device, dtype, loop = start_system(loop)
    loop = place(loop, f"out/lora-{Path(cfg.data).stem}")
    settings = asdict(cfg) | asdict(loop)
    state = {"step": 0, "tokens": 0, "seconds": 0.0, "best_val_loss": math.inf, "evaluated": -1}
    last = whole_checkpoint(Path(loop.out_dir) / "last")
    if loop.init_from == "scratch":
        raise UserError("LoRA tunes a trained model: name its directory, as --init_from=out/fables/best")
    if loop.init_from == "resume":
        if not last.is_dir():
            raise UserError(f"--init_from=resume: no checkpoint in {last}")
        state = read_state(last, settings, ("optimizer", "rank", "alpha", "targets", "rslora"))
        if "base_model" not in state:
            raise UserError(f"--init_from=resume: the run in {last} is no instruction tuning")
        base_model = state["base_model"] if cfg.rank else last
    else:
        base_model = loop.init_from
    base_path = hub_directory(base_model)
    model = open_model(base_path, "cpu" if loop.fsdp else device)
    if cfg.max_length > (limit := model.config.max_position_embeddings):
        raise UserError(f"max_length={cfg.max_length} exceeds the model's max_position_embeddings={limit}: lower it")
    tokenizer = Tokenizer.load(base_path)
    cfg = replace(cfg, template=cfg.template or template_of(base_path, tokenizer) or "alpaca")
    if cfg.template != "gemma" or "chat_template" not in tokenizer.config:
        tokenizer.config["chat_template"] = chat_template(tokenizer, cfg.template)
    torch.manual_seed(loop.seed)  # draws A
    try:
        if loop.init_from == "resume" and cfg.rank:
            load_adapter(model, last, cfg.lora_dropout)
        elif cfg.rank:
            add_lora(model, cfg.rank, cfg.alpha, cfg.lora_dropout, cfg.targets, cfg.rslora)
    except ValueError as e:
        raise UserError(str(e)) from None
    if loop.fsdp:  # casts each block's weights as it gathers them
        shard(model, dtype)
    else:
        keep_base_in(model, dtype)
    train_records, val_records, checked = open_records(cfg, loop)
    task = Tuning(cfg, loop, model, base_model, tokenizer, train_records, val_records)
    if checked and task.dropped:
        raise UserError(f"max_length={cfg.max_length} is too short for the fables' instructions: raise it")
    per_epoch = len(task.train_batches) / loop.gradient_accumulation_steps
    loop = task.loop = replace(loop, max_iters=max(1, round(cfg.epochs * per_epoch)))
    print(f"data: {len(task.train_set):,} records to learn, {len(task.val_set):,} held out, {task.dropped:,} dropped; "
          f"{len(task.train_batches):,} batches, {task.padding():.1%} padding")  # fmt: skip
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    print(f"training {trainable:,} of {total:,} parameters, {loop.max_iters:,} updates")
    pretraining = None
    if cfg.forgetting:
        path, meta, its_tokenizer = open_dataset(cfg.forgetting)
        if its_tokenizer.spec["model"] != tokenizer.spec["model"]:
            raise UserError(f"--forgetting={cfg.forgetting}: prepared with another tokenizer than {base_model} has")
        text_cfg = PretrainConfig(block_size=min(cfg.forgetting_block_size, model.config.max_position_embeddings))
        pretraining = Pretraining(text_cfg, loop, model, tokenizer, path, meta)
    if loop.init_from != "resume":  # what the report compares with must survive an interruption
        state |= {"base_model": str(base_model), "before": measure(task, checked, pretraining, device, dtype)}
        start_out_dir(loop)
    optimizers = make_optimizers(model, loop)
    resume_optimizers(optimizers, state.pop("optimizers", []))
    state["settings"] = settings
    train(loop, task, optimizers, state, device, dtype)
    after = measure(task, checked, pretraining, device, dtype)
    if rank() == 0:
        report(task, state["before"], after, loop.out_dir)
        if cfg.merge:
            last = Path(loop.out_dir) / "last"
            task.model = open_model(base_path if cfg.rank else last, "cpu")
            if cfg.rank:
                task.model = merge_lora(load_adapter(task.model, last))
            save_checkpoint(Path(loop.out_dir) / "merged", task.write_model, task.model.state_dict())
    leave()


if __name__ == "__main__":
    run(main, LoraConfig, TrainConfig)
