"""
Train a Gemma 3 on a prepared dataset. The one training loop of the project.

    python train.py config/train_fables.py                             # minutes on a laptop
    python train.py config/train_tinystories_270m.py                   # one good GPU
    python train.py config/train_fables.py --init_from=resume          # go on after an interruption
    torchrun --standalone --nproc_per_node=8 train.py config/train_tinystories_270m.py    # on every GPU of a machine
    python train.py --init_from=out/fables/best --eval_only=True --dataset=fables

Writes out/<run>/: last/ and best/ (model directories that transformers opens), log.jsonl, loss.png, samples.txt.
"""

import contextlib
import functools
import itertools
import json
import math
import os
import shutil
import signal
import sys
import time
import warnings
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves, tree_map

from config import NO_LIMIT, Failure, UserError, check_range, run
from model import Gemma, GemmaConfig, tensor_shapes
from prepare import DATA, Tokenizer, hub_directory, swap_in


@dataclass
class PretrainConfig:
    """What pretraining alone needs."""

    dataset: str = "tinystories"  # data/<dataset>, or else the newest prepared set whose name begins so
    eval_only: bool = False  # evaluate init_from on the dataset, and stop
    batch_size: int = 32  # rows per micro-batch
    block_size: int = 512  # tokens per row
    dropout: float = 0.0  # on attention weights, residual branches and the embedding
    eval_tokens: int = 0  # evaluate on the first so many tokens of the validation split; 0: all of it
    sample_prompt: str = ""  # what the sample at each evaluation continues; empty: a whole new document

    def __post_init__(self):
        check_range(self, 1, NO_LIMIT, "batch_size", "block_size")
        check_range(self, 0, NO_LIMIT, "eval_tokens")
        check_range(self, 0, 0.99, "dropout")


@dataclass
class TrainConfig:
    """What every run of the loop needs."""

    out_dir: str = ""  # where checkpoints and logs go; by default out/<dataset>
    init_from: str = "scratch"  # scratch, resume (out_dir/last), a model directory, or a Hub id of a Gemma 3
    max_iters: int = 5000  # updates; an iteration is one optimizer update
    gradient_accumulation_steps: int = 1  # micro-batches per update
    # optimizer
    optimizer: str = "muon"  # muon (matrices by Muon, embedding and norms by AdamW) or adamw (all by AdamW)
    learning_rate: float = 3e-3  # the peak, of both; Muon's updates are scaled to AdamW's size
    min_lr: float = 0.0  # where the schedule ends
    warmup_iters: int = 100  # updates of linear warmup
    decay: str = "linear"  # cosine (after warmup) or linear (constant, then down over the last cooldown_frac)
    cooldown_frac: float = 0.4  # share of max_iters in which decay=linear comes down
    weight_decay: float = 0.0  # on block matrices only: decaying a norm's weight pulls its gain to 1, not to 0
    momentum: float = 0.95  # Muon: decay of the mean gradient; in short runs less is better
    beta1: float = 0.9  # AdamW: decay of the mean gradient
    beta2: float = 0.95  # AdamW: decay of the mean squared gradient
    grad_clip: float = 1.0  # largest gradient norm; 0: no clipping
    # evaluation and logs
    eval_interval: int = 500  # updates between evaluations, each with a checkpoint and a sample
    log_interval: int = 10  # updates between lines
    sample_tokens: int = 256  # longest sample
    wandb: bool = False  # mirror the log to Weights & Biases
    tensorboard: bool = False  # mirror the log to TensorBoard
    # system
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"  # bfloat16 (autocast over float32 weights), float32; auto: bfloat16 where it is fast
    compile: bool = True  # torch.compile the model
    fsdp: bool = False  # under torchrun: share out weights, gradients and optimizer state too, for what does not fit
    seed: int = 1337  # of the initial weights, the order of the data, dropout and samples

    def __post_init__(self):
        check_range(self, 1, NO_LIMIT, "gradient_accumulation_steps", "eval_interval", "log_interval")
        check_range(
            self, 0, NO_LIMIT, "max_iters", "warmup_iters", "weight_decay", "grad_clip", "sample_tokens", "seed"
        )
        check_range(self, 1e-12, 1e3, "learning_rate")
        check_range(self, 0, 0.999999, "momentum", "beta1", "beta2")
        check_range(self, 0, 1, "cooldown_frac")
        for key, choices in (("optimizer", ("muon", "adamw")), ("decay", ("cosine", "linear"))):
            if getattr(self, key) not in choices:
                raise ValueError(f"{key}={getattr(self, key)!r} must be {' or '.join(choices)}")
        if not 0 <= self.min_lr <= self.learning_rate:
            raise ValueError(f"min_lr={self.min_lr} must lie between 0 and learning_rate={self.learning_rate}")


# ----------------------------------------------------------------------------------------------------------------------
# data


class Rows:
    """One split of a prepared dataset, dealt into rows of block_size tokens that begin where a document begins.

    A row's first token is the end-of-text before its first document, or the tokenizer's <bos> where it has one. A
    document that the row's end cuts off begins the next row anew, so that every token is predicted from its whole
    document at least once; one longer than a row goes on in the next."""

    def __init__(self, path, meta, split, block_size, tokenizer):
        self.tokens = np.memmap(path / f"{split}.bin", dtype=meta["dtype"], mode="r")
        self.block_size, self.eot = block_size, tokenizer.eot
        self.first = tokenizer.bos if tokenizer.bos != tokenizer.eot else None
        last, ends = len(self.tokens) - 1, []  # ends: positions of end-of-text tokens
        for i in range(0, len(self.tokens), 2**24):  # in pieces, to save memory
            piece = self.tokens[i : i + 2**24]
            if (largest := int(piece.max())) >= tokenizer.vocab_size:
                at = i + int(piece.argmax())
                raise UserError(f"{path / split}.bin: token {at} is {largest}, beyond the vocabulary of "
                                f"{tokenizer.vocab_size}: prepare it again")  # fmt: skip
            ends.append(np.flatnonzero(piece == self.eot) + i)
        ends = np.concatenate(ends)
        starts, at = [], -1  # the first document has no end-of-text before it: position -1 stands for one
        while at < last:
            starts.append(at)
            reach = at + block_size
            ended = np.searchsorted(ends, reach, "right")  # documents that have ended by then
            end = int(ends[ended - 1]) if ended else -1
            at = end if end > at else reach
        self.starts = np.array(starts)
        self.fresh = np.diff(self.starts, append=last)  # tokens of each row that the next row does not repeat

    def __len__(self):
        return len(self.starts)

    def batch(self, rows, fresh_only=False):
        """Row numbers -> inputs and targets (B, T), int64. Targets past the data are -100; with fresh_only those that
        the next row repeats are too, so that over all rows each token is a target exactly once."""
        x = np.full((len(rows), self.block_size + 1), self.eot, dtype=np.int64)
        y = np.full((len(rows), self.block_size), -100, dtype=np.int64)
        for i, row in enumerate(rows):
            start = self.starts[row]
            text = self.tokens[max(start, 0) : start + self.block_size + 1]
            skip = int(start < 0)
            x[i, skip : skip + len(text)] = text
            n = self.fresh[row] if fresh_only else skip + len(text) - 1
            y[i, :n] = x[i, 1 : n + 1]
        if self.first is not None:  # Gemma's own weights write nonsense without it
            x[:, 0] = self.first
        return torch.from_numpy(x[:, :-1].copy()), torch.from_numpy(y)


@functools.lru_cache(maxsize=2)
def order_of_epoch(count, seed, epoch):
    return np.random.default_rng((seed, epoch)).permutation(count)


def deal(count, size, seed, step):
    """The `size` of `count` things that update `step` takes, a function of (seed, step) alone: every epoch takes each
    once, in an order of its own."""
    numbers = np.arange(step * size, (step + 1) * size)
    taken = np.empty(size, dtype=np.int64)
    for epoch in np.unique(numbers // count):
        here = numbers // count == epoch
        taken[here] = order_of_epoch(count, seed, int(epoch))[numbers[here] % count]
    return taken


def open_dataset(name):
    """data/<name>, or the newest prepared set whose name begins so -> (path, meta, tokenizer)."""
    path = DATA / name
    if not (path / "meta.json").exists():
        found = [p.parent for p in DATA.glob(f"{name}*/meta.json") if p.parent.suffix not in (".part", ".replaced")]
        if not found:
            half = ", whose preparation was cut off" if path.with_name(f"{name}.part").exists() else ""
            raise UserError(
                f"--dataset={name}: no such set in {DATA}{half}; make it with python prepare.py --dataset={name}"
            )
        path = max(found, key=lambda p: (p / "meta.json").stat().st_mtime)
        print(f"dataset: {path}")
    tokenizer = Tokenizer.load(path)
    try:
        meta = json.loads((path / "meta.json").read_text())
        if meta["vocab_size"] != tokenizer.vocab_size:
            raise ValueError(f"vocab_size {meta['vocab_size']}, tokenizer.json has {tokenizer.vocab_size}")
        if meta["dtype"] not in ("uint16", "uint32"):
            raise ValueError(f"dtype {meta['dtype']!r}")
        if not isinstance(meta["floor_bits_per_byte"], float | None):
            raise ValueError("floor_bits_per_byte")
        for split in ("train", "val"):
            size, tokens = (path / f"{split}.bin").stat().st_size, meta[split]["tokens"]
            wanted = tokens * np.dtype(meta["dtype"]).itemsize
            if not (tokens > 0 < meta[split]["bytes"]):
                raise ValueError(f"no tokens in {split}")
            if size != wanted:
                raise ValueError(f"{tokens} tokens in {split}.bin are {wanted} bytes, the file has {size}")
    except (OSError, ValueError, KeyError, TypeError) as e:
        reason = f"no {e}" if isinstance(e, KeyError) else e
        raise UserError(f"{path / 'meta.json'} does not describe what is here ({reason}): prepare it again") from None
    return path, meta, tokenizer


# ----------------------------------------------------------------------------------------------------------------------
# hardware

# dense bfloat16 FLOP/s of GPUs as their makers state them; longer names first where one contains another
PEAK_FLOPS = {
    "GB200": 2500e12, "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12,
    "L40S": 362e12, "L40": 181e12, "L4": 121e12, "A10G": 70e12, "A40": 150e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip


def pick_device(name):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device={name}: {str(e).splitlines()[0]}") from None
    return device


def pick_dtype(name, device):
    """bfloat16 where the hardware multiplies in it, float32 elsewhere. float16 overflows in Gemma 3."""
    if name == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
        cpu = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
        return torch.bfloat16 if cpu.get("avx512_bf16") or cpu.get("amx_bf16") else torch.float32
    if name not in ("bfloat16", "float32"):
        raise UserError(f"--dtype={name}: choose auto, bfloat16 or float32 (float16 overflows in Gemma 3)")
    return getattr(torch, name)


def can_compile(device):
    if device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "cl"))):
        print("no C++ compiler here: going on without torch.compile")
        return False
    return True


def to_device(tensor, device):
    """Copy a batch. From pinned memory this does not wait for the GPU, which is busy with the batch before."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def autocast(device, dtype):
    """bfloat16 matrix products over float32 weights: small updates of a bfloat16 weight would be rounded away."""
    return torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()


def peak_flops(device, dtype):
    """FLOP/s to hold the model's against: the maker's figure for a known GPU, else a matrix product's, timed here."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        for name, flops in PEAK_FLOPS.items():
            if name in torch.cuda.get_device_name(device):
                return flops
    n = 1024 if device.type == "cpu" else 4096
    a = torch.randn(n, n, device=device, dtype=dtype)
    best = math.inf
    for _ in range(10):
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # .item() waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


# ----------------------------------------------------------------------------------------------------------------------
# processes: torchrun starts several of this script, each with a device of its own


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def join_processes(name):
    """Meet the other processes that torchrun started -> the device of this one, for --device=`name`."""
    local = int(os.environ["LOCAL_RANK"])
    on_gpu = name.startswith("cuda") or (name == "auto" and torch.cuda.is_available())
    device = pick_device(f"cuda:{local}" if on_gpu else name)
    if on_gpu:
        torch.cuda.set_device(device)
    # after a restart torchrun's store still has the addresses of processes that are gone (pytorch issue 167288)
    store, number, count = next(rendezvous("env://"))
    store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
    patience = timedelta(minutes=10)  # with one that hangs
    dist.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=number, world_size=count, timeout=patience)
    if rank():
        sys.stdout = open(os.devnull, "w")
    return device


def add_up(tensor, device):
    """The sum of every process's tensor."""
    if dist.is_initialized():
        tensor = tensor.to(device)
        dist.all_reduce(tensor)
    return tensor


def share(micro_batches):
    """This process's part of an update: whole micro-batches where they share out evenly, else some rows of each."""
    if len(micro_batches) % world_size() == 0:
        return micro_batches[rank() :: world_size()]
    mine = [(x[rank() :: world_size()], y[rank() :: world_size()]) for x, y in micro_batches]
    # without a row of its own a process comes along with one that has no targets
    return [(x, y) if len(x) else (whole[:1], torch.full_like(whole[:1], -100))
            for (x, y), (whole, _) in zip(mine, micro_batches, strict=True)]  # fmt: skip


def shard(model, dtype):
    """FSDP2: each process keeps a part of every weight, and gathers a block's while it computes with them."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # half a second, for those who need it

    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.model.layers:
        fully_shard(block, mp_policy=policy)
    fully_shard(model)


def parallel(model, loop):
    """The model as update() calls it: compiled, and with gradients that are means over all processes."""
    forward = torch.compile(model) if loop.compile else model
    return DistributedDataParallel(forward) if dist.is_initialized() and not loop.fsdp else forward


def reduce_gradients(forward, wanted):
    """Whether the next backward shall make gradients the mean over all processes: only an update's last has to."""
    if isinstance(forward, DistributedDataParallel):
        forward.require_backward_grad_sync = wanted
    elif dist.is_initialized():
        forward.set_requires_gradient_sync(wanted)


def is_sharded(tensor):
    return hasattr(tensor, "full_tensor")  # a DTensor


def assembled(tree):
    """A tree of tensors for rank 0 to save: sharded ones made whole in turn, in main memory. To be called by all."""

    def whole(tensor):
        if not is_sharded(tensor):
            return tensor
        tensor = tensor.full_tensor()
        return tensor.cpu() if rank() == 0 else None

    return tree_map(whole, tree)


# ----------------------------------------------------------------------------------------------------------------------
# optimizer


def make_optimizers(model, cfg):
    """AdamW, and Muon for the matrices inside blocks (Jordan et al. 2024) unless optimizer=adamw. Every trainable
    parameter is in exactly one group."""
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in trainable if p.ndim == 2 and "embed_tokens" not in name]
    others = [p for name, p in trainable if p.ndim != 2 or "embed_tokens" in name]
    assert len({id(p) for p in matrices + others}) == len(matrices) + len(others) == len(trainable)
    groups = [{"params": others, "weight_decay": 0.0}]
    optimizers = []
    if cfg.optimizer == "adamw":
        groups.append({"params": matrices, "weight_decay": cfg.weight_decay})
    elif matrices:
        # match_rms_adamw (Liu et al. 2025) scales Muon's updates to the size of AdamW's: one learning rate serves both
        muon = torch.optim.Muon(
            matrices, cfg.learning_rate, cfg.weight_decay, cfg.momentum, adjust_lr_fn="match_rms_adamw"
        )
        optimizers.append(muon)
    groups = [g for g in groups if g["params"]]
    if groups:
        betas = (cfg.beta1, cfg.beta2)
        optimizers.append(torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=betas, fused=True))
    return optimizers


def resume_optimizers(optimizers, states):
    """Give the optimizers their states from a checkpoint, which any number of processes may have written. Settings, as
    momentum, stay what this run has."""
    for optimizer, saved in zip(optimizers, states, strict=bool(states)):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for i, values in saved["state"].items():
            p = params[i]
            for key, value in values.items():
                if is_sharded(p) and value.shape == p.shape:
                    from torch.distributed.tensor import distribute_tensor

                    values[key] = distribute_tensor(value.to(p.device), p.device_mesh, p.placements, src_data_rank=None)
        optimizer.load_state_dict({"state": saved["state"], "param_groups": optimizer.state_dict()["param_groups"]})


def learning_rate(step, cfg):
    """The rate of update `step`, the first being 0."""
    if step < cfg.warmup_iters:
        return cfg.learning_rate * (step + 1) / cfg.warmup_iters
    if cfg.decay == "cosine":
        done = (step - cfg.warmup_iters) / max(1, cfg.max_iters - cfg.warmup_iters)
        share = 0.5 * (1 + math.cos(math.pi * min(1, done)))
    else:
        cooldown = max(1, cfg.cooldown_frac * cfg.max_iters)
        share = min(1, max(0, (cfg.max_iters - step) / cooldown))
    return cfg.min_lr + share * (cfg.learning_rate - cfg.min_lr)


# ----------------------------------------------------------------------------------------------------------------------
# evaluation, log, checkpoints


def evaluate(model, batches, device, dtype):
    """Mean loss in nats over the targets of batches of (inputs, targets), which the processes share out."""
    was_training, batches = model.training, iter(batches)
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64)  # of losses, of targets
    with torch.no_grad(), autocast(device, dtype):
        while group := list(itertools.islice(batches, world_size())):
            x, y = group[min(rank(), len(group) - 1)]
            if rank() >= len(group):  # nothing left for this process, but all must come along
                y = torch.full_like(y, -100)
            loss = model(to_device(x, device), to_device(y, device), reduction="sum")
            sums += torch.tensor([loss.item(), (y != -100).sum()], dtype=torch.float64)
    model.train(was_training)
    total, count = add_up(sums, device).tolist()
    return total / count


def bits_per_byte(loss, counts):
    """Loss in nats a token -> bits a byte of text, comparable across tokenizers. counts: of a split, from meta.json."""
    return loss / math.log(2) * counts["tokens"] / counts["bytes"]


class Pretraining:
    """What the loop does not know: the data, what a loss means, what a checkpoint consists of, what to show. lora.py
    has the same for instruction tuning."""

    lower_memory = "lower batch_size, and raise gradient_accumulation_steps as much"

    def __init__(self, cfg, loop, model, tokenizer, path, meta):
        self.cfg, self.loop, self.model, self.tokenizer, self.meta = cfg, loop, model, tokenizer, meta
        self.rows, self.val_rows = (Rows(path, meta, s, cfg.block_size, tokenizer) for s in ("train", "val"))
        if len(self.rows.tokens) < cfg.block_size:
            raise UserError(
                f"{path}/train.bin has {len(self.rows.tokens)} tokens, fewer than block_size={cfg.block_size}: lower it"
            )
        self.floor = meta["floor_bits_per_byte"]
        self.floor_loss = self.floor and self.floor * math.log(2) * meta["val"]["bytes"] / meta["val"]["tokens"]

    def updates(self, step):
        """The micro-batches of an update."""
        size = self.cfg.batch_size * self.loop.gradient_accumulation_steps
        rows = deal(len(self.rows), size, self.loop.seed, step)
        return [self.rows.batch(part) for part in rows.reshape(-1, self.cfg.batch_size)]

    def validation(self):
        """The validation split, or the first eval_tokens of it: always the same rows, each token a target once."""
        rows, size = self.val_rows, self.cfg.batch_size
        enough = int(np.searchsorted(rows.fresh.cumsum(), self.cfg.eval_tokens or len(rows.tokens)))
        count = min(len(rows), 1 + enough)
        for i in range(0, count, size):
            yield rows.batch(range(i, min(i + size, count)), fresh_only=True)

    def describe(self, loss):
        """A validation loss -> (what the log keeps of it, a line to print)."""
        bpb = bits_per_byte(loss, self.meta["val"])
        against_floor = f" ({bpb / self.floor:.3f} x the entropy floor of {self.floor:.4f})" if self.floor else ""
        line = f"val loss {loss:.4f}, perplexity {math.exp(min(loss, 99)):.2f}, {bpb:.4f} bits per byte{against_floor}"
        return {"val_loss": loss, "val_bpb": bpb}, line

    def sample(self):
        """A short story for the eye, the same draw at every evaluation."""
        ids = [self.tokenizer.bos, *map(int, self.tokenizer.encode(self.cfg.sample_prompt))]
        prompt, stops = torch.tensor([ids], device=self.model.device), [self.tokenizer.eot]
        made = self.model.generate(prompt, self.loop.sample_tokens, 0.8, stop_ids=stops, seed=self.loop.seed)
        return self.cfg.sample_prompt + self.tokenizer.decode([token.item() for token in made])

    def write_model(self, path, weights):
        self.model.save_pretrained(path, weights)
        self.tokenizer.save(path)


class Log:
    """log.jsonl, one object a line, and its mirrors. Resuming drops the lines after the checkpoint's step."""

    torn = False  # whether the last line's writing failed

    def __init__(self, cfg, step):
        out_dir = Path(cfg.out_dir)
        self.path = out_dir / "log.jsonl"
        if rank():  # rank 0 alone writes
            return
        kept = [entry for entry in read_log(self.path) if entry["step"] <= step]
        write_atomically(self.path, "".join(json.dumps(entry) + "\n" for entry in kept))
        self.run = self.board = None
        if cfg.wandb:
            try:
                import wandb
            except ImportError:
                raise UserError("--wandb=True needs a package that is not here: pip install wandb") from None
            self.run = wandb.init(project="nanogemma", name=out_dir.name, config=asdict(cfg))
        if cfg.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError(
                    "--tensorboard=True needs a package that is not here: pip install tensorboard"
                ) from None
            self.board = SummaryWriter(out_dir / "tensorboard")

    def write(self, entry):
        entry = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}  # for JSON
        line = "\n" * self.torn + json.dumps(entry) + "\n"
        self.torn = True
        with open(self.path, "a") as f:
            f.write(line)
        self.torn = False
        numbers = {k: v for k, v in entry.items() if isinstance(v, int | float) and k != "step"}
        if self.run:
            self.run.log(numbers, step=entry["step"])
        if self.board:
            for key, value in numbers.items():
                self.board.add_scalar(f"{entry['event']}/{key}", value, entry["step"])


def read_log(path):
    """The entries of a log.jsonl, less the lines that a crash or a full disk has torn."""
    entries = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            entries.append(json.loads(line))
    loss = {"step": "train_loss", "eval": "val_loss", "skipped": "train_loss"}
    return [e for e in entries if isinstance(e, dict) and e.get("event") in loss and isinstance(e.get("step"), int)
            and isinstance(e.get(loss[e["event"]], ""), float | None)]  # fmt: skip


def write_atomically(path, text):
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def draw_loss(out_dir, floor_loss):
    """loss.png from log.jsonl: training and validation loss in nats a token, and the entropy floor where known."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    entries = read_log(out_dir / "log.jsonl")
    steps = [e for e in entries if e["event"] == "step" and e["train_loss"] is not None]
    evals = [e for e in entries if e["event"] == "eval" and e["val_loss"] is not None]
    if not evals:
        return
    fig, ax = plt.subplots(figsize=(8, 5), layout="constrained")
    ax.plot([e["step"] for e in steps], [e["train_loss"] for e in steps], lw=0.8, alpha=0.6, label="training")
    ax.plot([e["step"] for e in evals], [e["val_loss"] for e in evals], "o-", ms=3, label="validation")
    if floor_loss:
        ax.axhline(floor_loss, color="black", ls=":", lw=1, label="entropy floor")
    low = min(e["val_loss"] for e in evals)
    first = max((e["train_loss"] for e in steps), default=evals[0]["val_loss"])
    ax.set(xlabel="update", ylabel="loss (nats per token)", title=out_dir.name, ylim=(0.7 * low, min(first, 4 * low)))
    ax.grid(alpha=0.3)
    ax.legend()
    fig.savefig(out_dir / "loss.png.part", format="png", dpi=110)
    os.replace(out_dir / "loss.png.part", out_dir / "loss.png")
    plt.close(fig)


def write_samples(out_dir):
    """samples.txt from log.jsonl: how the model wrote at each evaluation."""
    evals = [entry for entry in read_log(out_dir / "log.jsonl") if entry["event"] == "eval"]
    texts = [f"--- update {e['step']}, val loss {e['val_loss'] or math.nan:.4f}\n{e.get('sample')}\n\n" for e in evals]
    write_atomically(out_dir / "samples.txt", "".join(texts))


def save_checkpoint(path, write_model, weights, state=None):
    """Write a model directory (and the state to resume from) beside `path`, make sure that it is whole and on the disk,
    then swap it in. Raises OSError where that fails; what was at `path` is then still there."""
    part = path.with_name(path.name + ".part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        write_model(part, weights)
        if state is not None:
            torch.save(state, part / "train_state.pt")
            torch.load(part / "train_state.pt", map_location="meta", weights_only=True)
        for file in part.glob("*.safetensors"):
            tensor_shapes(file)
        swap_in(part, path)
    except (OSError, RuntimeError, SafetensorError, ValueError) as e:  # torch and safetensors have errors of their own
        shutil.rmtree(part, ignore_errors=True)
        size = sum(t.nbytes for t in tree_leaves((weights, state)) if isinstance(t, torch.Tensor))
        free = shutil.disk_usage(path.parent).free
        reason = str(e).splitlines()[0]
        raise OSError(f"{path}: not saved: {reason} ({size / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free)") from None


def whole_checkpoint(path):
    """path, or where a crash in the middle of a swap left it."""
    aside = path.with_name(path.name + ".replaced")
    return path if path.exists() or not aside.exists() else aside


def open_model(path, device, dtype=torch.float32, dropout=0.0):
    """Gemma.from_pretrained, with what can be wrong in one line."""
    path = whole_checkpoint(Path(path))
    try:
        return Gemma.from_pretrained(path, device, dtype, dropout)
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path}: not a Gemma 3 model directory: {str(e).splitlines()[0]}") from None


# ----------------------------------------------------------------------------------------------------------------------
# the loop


MAX_SKIPPED = 5  # updates in a row without a finite loss and gradient, then the run ends


def update(forward, micro_batches, optimizers, cfg, device, dtype):
    """One optimizer update from micro-batches of (inputs, targets), which the processes share out -> (loss in nats a
    target, gradient norm). Where one of these is not finite, the weights stay as they were."""
    # every target of the update weighs the same, however unevenly micro-batches and processes share them
    num_targets = sum(int((y != -100).sum()) for _, y in micro_batches)
    total, mine = torch.zeros((), device=device), share(micro_batches)
    for i, (x, y) in enumerate(mine):
        reduce_gradients(forward, i == len(mine) - 1)
        with autocast(device, dtype):
            loss = forward(to_device(x, device), to_device(y, device), reduction="sum") / num_targets
        (loss * world_size()).backward()  # the mean over processes is then the sum
        total += loss.detach()
    total = add_up(total, device).item()  # waits for the device
    trained = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    grad_norm = torch.nn.utils.clip_grad_norm_(trained, cfg.grad_clip or math.inf)
    grad_norm = (grad_norm.full_tensor() if is_sharded(grad_norm) else grad_norm).item()
    for optimizer in optimizers:
        if math.isfinite(total) and math.isfinite(grad_norm):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return total, grad_norm


class Stop:
    """SIGTERM and Ctrl-C, between `with` and its end: noted, so that the run can save and end. A second Ctrl-C ends it
    at once."""

    signal = 0  # the first of them to come

    def __enter__(self):
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number, _):
        if self.signal and number == signal.SIGINT and not dist.is_initialized():  # torchrun passes ours on once more
            raise KeyboardInterrupt
        self.signal = self.signal or number
        print(f"{signal.Signals(number).name}: saving, then stopping", flush=True)

    def interrupt(self, batches):
        """The batches of an evaluation, until a signal comes. Several processes go on: all have to do the same."""
        for batch in batches:
            if self.signal and not dist.is_initialized():
                raise Stopped
            yield batch


class Stopped(Exception):
    """An evaluation was interrupted by a signal."""


def train(cfg, task, optimizers, state, device, dtype):
    """Train task.model until max_iters. `state` is where to begin: step, tokens, seconds, best_val_loss, and evaluated,
    the last step at which the model was evaluated. Ends the process where a signal asks for it."""
    try:
        with Stop() as stop:
            train_until(stop, cfg, task, optimizers, state, device, dtype)
    except RuntimeError as e:
        reason = str(e).splitlines()[0][:200]
        if any(sign in reason for sign in ("out of memory", "not enough memory", "can't allocate memory")):
            raise Failure(f"out of memory: {task.lower_memory} ({reason})") from None
        if dist.is_initialized() and ("gloo" in reason or "NCCL" in reason):
            raise Failure(f"another process is gone, or hangs: {reason}") from None
        raise
    if stop.signal:
        again = [arg for arg in sys.argv[1:] if not arg.startswith("--init_from=")]
        processes = os.environ.get("LOCAL_WORLD_SIZE")
        launcher = f"torchrun --nproc_per_node={processes}" if processes else "python"
        command = " ".join([launcher, sys.argv[0], *again, "--init_from=resume"])
        print(f"stopped after update {state['step']}; to go on: {command}", flush=True)
        leave(128 + stop.signal)


def train_until(stop, cfg, task, optimizers, state, device, dtype):
    out_dir, model = Path(cfg.out_dir), task.model
    log = Log(cfg, state["step"])
    forward = parallel(model, cfg)
    peak = peak_flops(device, dtype) * world_size()
    step, started = state["step"], time.perf_counter() - state["seconds"]
    window_start, window_tokens, window_steps = time.perf_counter(), 0, 0
    skipped, troubles = 0, []

    def keep(write, *args):
        """Let rank 0 write something; what a full disk does not take is said, and does not end the run."""
        try:
            if rank() == 0:
                write(*args)
        except OSError as e:
            troubles.append(str(e))
            print(f"warning: {e}; training goes on", flush=True)

    def save(path, weights, state=None):
        try:
            save_checkpoint(path, task.write_model, weights, state)
        except OSError as e:
            if not whole_checkpoint(path).exists():
                raise Failure(e) from None
            raise OSError(f"{e}; the checkpoint of before is whole") from None

    def save_all(is_best):
        weights = assembled(model.state_dict())
        resumable = {**state, "optimizers": assembled([optimizer.state_dict() for optimizer in optimizers])}
        if is_best:
            keep(save, out_dir / "best", weights)
        keep(save, out_dir / "last", weights, resumable)

    def evaluate_and_save():
        nonlocal window_start
        paused = time.perf_counter()
        loss = evaluate(model, stop.interrupt(task.validation()), device, dtype)
        is_best = loss < state["best_val_loss"]
        state.update(step=step, evaluated=step, seconds=time.perf_counter() - started)
        state["best_val_loss"] = loss if is_best else state["best_val_loss"]
        results, line = task.describe(loss)
        print(f"update {step}: {line}")
        model.eval()
        story = task.sample()  # by all processes: where weights are sharded, all are needed
        model.train()
        print(f"  {story}\n", flush=True)
        counters = {key: state[key] for key in ("step", "tokens", "seconds", "best_val_loss")}
        keep(log.write, {"event": "eval", **counters, **results, "sample": story})
        keep(draw_loss, out_dir, task.floor_loss)
        keep(write_samples, out_dir)
        save_all(is_best)
        window_start += time.perf_counter() - paused

    model.train()
    while not (stopping := add_up(torch.tensor(stop.signal), device).item()):
        if (step % cfg.eval_interval == 0 or step >= cfg.max_iters) and state["evaluated"] != step:
            try:
                evaluate_and_save()
            except Stopped:
                continue
        if step >= cfg.max_iters:
            break
        lr = learning_rate(step, cfg)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
        torch.manual_seed(hash((cfg.seed, step, rank())))  # dropout, too, is a function of (seed, step)
        micro_batches = task.updates(step)
        train_loss, grad_norm = update(forward, micro_batches, optimizers, cfg, device, dtype)
        step += 1
        tokens = sum(x.numel() for x, _ in micro_batches)
        state.update(step=step, tokens=state["tokens"] + tokens, seconds=time.perf_counter() - started)
        window_tokens, window_steps = window_tokens + tokens, window_steps + 1
        skipped = 0 if math.isfinite(train_loss) and math.isfinite(grad_norm) else skipped + 1
        if skipped:
            print(f"update {step}: skipped, its loss is {train_loss} and its gradient norm {grad_norm}", flush=True)
            keep(log.write, {"event": "skipped", "step": step, "train_loss": train_loss, "grad_norm": grad_norm})
        if skipped == MAX_SKIPPED:
            at = f"the checkpoint of update {state['evaluated']} is in {out_dir / 'last'}"
            raise Failure(f"{skipped} updates in a row without a finite loss and gradient; {at}; lower learning_rate, "
                          "or look for what is odd in the data")  # fmt: skip
        if step % cfg.log_interval == 0 or step == cfg.max_iters:
            now = time.perf_counter()
            rate = window_tokens / (now - window_start)
            mfu = rate * model.flops_per_token(micro_batches[0][0].shape[1]) / peak
            left = (cfg.max_iters - step) * (now - window_start) / window_steps
            keep(log.write, {"event": "step", "step": step, "tokens": state["tokens"], "seconds": now - started,
                             "train_loss": train_loss, "lr": lr, "grad_norm": grad_norm, "tokens_per_sec": rate,
                             "mfu": mfu})  # fmt: skip
            print(
                f"update {step:5}/{cfg.max_iters}: loss {train_loss:.4f}, lr {lr:.2e}, grad norm {grad_norm:.2f}, "
                f"{rate:,.0f} tokens/s, {mfu:.0%} MFU, {clock(left)} left",
                flush=True,
            )
            window_start, window_tokens, window_steps = now, 0, 0
    if stopping:
        save_all(is_best=False)
        stop.signal = stop.signal or signal.SIGTERM  # another process may have been told first
    if troubles:
        raise Failure(f"{len(troubles)} writes failed, the last of them: {troubles[-1]}")


def clock(seconds):
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def start_model(cfg, loop, arch, meta, tokenizer, device):
    """The model that init_from names, and the state to train it from."""
    state = {"step": 0, "tokens": 0, "seconds": 0.0, "best_val_loss": math.inf, "evaluated": -1}
    home = "cpu" if loop.fsdp else device  # shard() brings the parts to the device
    if loop.init_from == "scratch":
        vocab_size = arch.vocab_size
        if vocab_size == GemmaConfig.vocab_size:  # not set: the tokenizer's, in whole tiles of a matrix product
            vocab_size = math.ceil(meta["vocab_size"] / 64) * 64
        special = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eot, "pad_token_id": tokenizer.pad}
        config = replace(arch, vocab_size=vocab_size, **special)
        with torch.device(home):
            model = Gemma(config, cfg.dropout).init_weights(loop.seed, device)
    else:
        last = Path(loop.out_dir) / "last"
        path = whole_checkpoint(last) if loop.init_from == "resume" else hub_directory(loop.init_from)
        if not path.is_dir():
            raise UserError(f"--init_from={loop.init_from}: no checkpoint in {path}")
        model = open_model(path, home, dropout=cfg.dropout)
        if Tokenizer.load(path).spec["model"] != tokenizer.spec["model"]:
            raise UserError(f"the tokenizer of {path} is not that of the dataset: prepare it with --tokenizer={path}")
        refuse_another_architecture(arch, model.config, path)
        if loop.init_from == "resume":
            state = read_state(path, asdict(cfg) | asdict(loop), ("optimizer",))
    config = model.config
    if meta["vocab_size"] > config.vocab_size:
        raise UserError(f"the tokenizer's {meta['vocab_size']} entries do not fit into vocab_size={config.vocab_size}")
    if cfg.block_size > config.max_position_embeddings:
        raise UserError(f"block_size={cfg.block_size} exceeds max_position_embeddings={config.max_position_embeddings}")
    return model, state


def refuse_another_architecture(arch, config, path):
    """Settings can't change the architecture of a trained model. Where they name none, its own is meant."""
    if arch == GemmaConfig():
        return
    free = {"bos_token_id", "eos_token_id", "pad_token_id", "sliding_window_pattern"}  # the last is in layer_types
    if arch.vocab_size == GemmaConfig.vocab_size:
        free.add("vocab_size")
    for f in fields(arch):
        asked, there = getattr(arch, f.name), getattr(config, f.name)
        if f.name not in free and asked != there:
            raise UserError(f"{f.name}={asked}: the model in {path} has {there}, which settings can't change")


def read_state(path, settings, fixed):
    """The state that a run left in the checkpoint `path`. settings: of the run that goes on from it; those in `fixed`
    have to be the same, other changes are said."""
    wanted = {"step": int, "tokens": int, "seconds": float, "best_val_loss": float, "evaluated": int,
              "optimizers": list, "settings": dict}  # fmt: skip
    try:
        with warnings.catch_warnings(action="ignore"):  # of what is odd in it, one line is enough
            state = torch.load(path / "train_state.pt", map_location="cpu", weights_only=True)
        if odd := [key for key, kind in wanted.items() if not isinstance(state[key], kind)]:
            raise ValueError(f"{odd[0]} is {type(state[odd[0]]).__name__}")
    except Exception as e:  # a damaged file can raise anything
        raise UserError(
            f"{path / 'train_state.pt'} is not what a run leaves ({type(e).__name__}): a new run can start from its "
            f"weights, --init_from={path}"
        ) from None
    before, free = state.pop("settings"), {"init_from", "out_dir", "device", "max_records", "eval_only"}
    changed = [key for key in settings if key in before and key not in free and before[key] != settings[key]]
    for key in changed:
        if key in fixed:
            raise UserError(f"{key}={settings[key]}: the run in {path} has {before[key]}; resume with that")
    if changed:
        now = ", ".join(f"{key} {before[key]} -> {settings[key]}" for key in changed)
        print(f"resuming with other settings than before: {now}")
    return state


def start_system(loop):
    """The device and dtype to train with, and the settings as they stand on this machine."""
    if dist.is_torchelastic_launched():
        device = join_processes(loop.device)
    elif loop.fsdp:
        raise UserError("--fsdp=True needs several processes: start it with torchrun")
    else:
        device = pick_device(loop.device)
    torch.set_float32_matmul_precision("high")
    if device.type == "cpu":  # else compiled code adds up the embedding's gradient in whatever order threads finish
        torch.use_deterministic_algorithms(True)
    return device, pick_dtype(loop.dtype, device), replace(loop, compile=loop.compile and can_compile(device))


def leave(code=0):
    """End this process, one of several when all are done: gloo's threads do not always survive an orderly end."""
    if dist.is_initialized():
        dist.barrier()
        sys.stdout.flush()
        os._exit(code)
    if code:
        sys.exit(code)


def place(loop, default):
    """The settings with out_dir named. After a crash torchrun --max-restarts begins anew: we go on."""
    loop = replace(loop, out_dir=loop.out_dir or default)
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if restarted and whole_checkpoint(Path(loop.out_dir) / "last").exists():
        loop = replace(loop, init_from="resume")
    return loop


def start_out_dir(loop):
    """Make out_dir; a run that is already there is moved aside, unless we resume it."""
    out_dir = Path(loop.out_dir)
    if rank() == 0:
        if loop.init_from != "resume" and out_dir.exists():
            aside = out_dir.with_name(f"{out_dir.name}-{time.strftime('%Y%m%d-%H%M%S')}")
            os.replace(out_dir, aside)
            print(f"the run that was in {out_dir} is now in {aside}")
        out_dir.mkdir(parents=True, exist_ok=True)
    if dist.is_initialized():
        dist.barrier()


def print_plan(task, state, device, dtype):
    cfg, loop = task.cfg, task.loop
    n = task.model.num_params()
    per_update = cfg.batch_size * loop.gradient_accumulation_steps
    epochs = loop.max_iters * per_update / len(task.rows)
    print(f"model: {n.total / 1e6:.1f}M parameters, {n.embedding / 1e6:.1f}M in the tied embedding, "
          f"{n.non_embedding / 1e6:.1f}M in the rest")  # fmt: skip
    print(f"updates: {loop.max_iters - state['step']:,} of {per_update * cfg.block_size:,} tokens, "
          f"{epochs:.2f} epochs of {len(task.rows):,} rows in all")  # fmt: skip
    processes = f" in {world_size()} processes" if world_size() > 1 else ""
    compiled = "compiled" if loop.compile else "not compiled"
    print(f"device: {device}{processes}, {str(dtype).removeprefix('torch.')}, {compiled}")
    if loop.warmup_iters >= loop.max_iters:
        print(f"warning: warmup_iters={loop.warmup_iters} never ends before max_iters={loop.max_iters}")
    if epochs > 30 and not cfg.dropout:
        print(f"warning: {epochs:.0f} epochs over the same text without dropout will memorize it")


def main(cfg, loop, arch):
    device, dtype, loop = start_system(loop)
    path, meta, tokenizer = open_dataset(cfg.dataset)
    loop = place(loop, f"out/{cfg.dataset}")
    model, state = start_model(cfg, loop, arch, meta, tokenizer, device)
    if loop.fsdp:
        shard(model, dtype)
    task = Pretraining(cfg, loop, model, tokenizer, path, meta)
    if cfg.eval_only:
        print(task.describe(evaluate(model, task.validation(), device, dtype))[1])
        return leave()
    start_out_dir(loop)
    print_plan(task, state, device, dtype)
    optimizers = make_optimizers(model, loop)
    resume_optimizers(optimizers, state.pop("optimizers", []))
    state["settings"] = asdict(cfg) | asdict(loop)
    train(loop, task, optimizers, state, device, dtype)
    print(f'done. Read what it writes: python sample.py --out_dir={loop.out_dir} --start="Once"')
    leave()


if __name__ == "__main__":
    run(main, PretrainConfig, TrainConfig, GemmaConfig)
