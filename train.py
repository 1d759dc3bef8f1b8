"""
Train a Gemma 3 on a prepared dataset. fit() below is the only training loop of the project.

    python train.py config/train_fables.py                             # minutes on a laptop
    python train.py config/train_tinystories_270m.py                   # one good GPU
    python train.py config/train_fables.py --init_from=resume          # continue after an interruption
    torchrun --standalone --nproc_per_node=8 train.py config/train_tinystories_270m.py    # all GPUs of a machine
    python train.py --init_from=out/fables/best --eval_only=True --dataset=fables --block_size=224

Writes out/<run>/: last/ and best/ (model directories), log.jsonl, summary.json, loss.png, samples.txt.
"""

import functools
import gc
import importlib.util
import itertools
import math
import shlex
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from model import Gemma, GemmaConfig, complete
from support.datasets import document_ends, open_dataset
from support.devices import autocast, compile_for_training, pick_dtype, runtime_errors, to_device
from support.files import latest_intact_dir
from support.hub import hub_directory
from support.log import RunLog, compare_runs, say
from support.processes import (
    StopSignals, all_reduce_sum, apply_fsdp, full_tensor, get_rank, get_world_size, loading_device, local_micro_batches,
    set_up, shard_like, share_work, shutdown_distributed, without_labels, wrap_ddp,
)  # fmt: skip
from support.runs import (
    RunFolder, check_architecture, load_optimizers, new_state, open_model, read_state, resolve_init_from,
)  # fmt: skip
from support.settings import NO_LIMIT, UserError, check_range, run, user_errors
from support.tokenizer import Tokenizer


@dataclass
class PretrainConfig:
    """Settings of pretraining alone."""

    dataset: str = "tinystories"  # data/<dataset>, which prepare.py wrote
    eval_only: bool = False  # evaluate init_from on the dataset, and stop
    compare: str = ""  # compare these runs, such as out/a,out/b, and stop
    batch_size: int = 32  # rows per micro-batch
    block_size: int = 512  # tokens per row
    dropout: float = 0.0  # on attention weights, residual branches and the embedding
    eval_tokens: int = 0  # evaluate on this many tokens from the start of the validation split; 0: on all
    sample_prompt: str = ""  # prompt of the sample at each evaluation; empty: the sample starts a new document

    def __post_init__(self):
        check_range(self, 1, NO_LIMIT, "batch_size", "block_size")
        check_range(self, 0, 0.99, "dropout")


@dataclass
class TrainConfig:
    """Settings of every run. A step is one optimizer step. Names with "iter", as in nanoGPT, count steps."""

    out_dir: str = ""  # folder for checkpoints and logs; by default out/<dataset>
    init_from: str = "scratch"  # scratch, resume (out_dir/last), a model directory, or a Hub id of a Gemma 3
    max_iters: int = 5000  # steps
    gradient_accumulation_steps: int = 1  # micro-batches per step
    # optimizer
    optimizer: str = "muon"  # muon (Muon for matrices, AdamW for embedding and norms) or adamw (AdamW for all)
    learning_rate: float | None = None  # the peak; by default 3e-3 from scratch, 1e-4 from a trained model
    min_lr: float = 0.0  # the schedule ends at this rate
    warmup_iters: float = 100  # steps of linear warmup; below 1: that share of max_iters
    schedule: str = "wsd"  # wsd (warmup, stable, linear decay over the last cooldown_frac) or cosine
    cooldown_frac: float = 0.4  # share of max_iters over which wsd decays
    weight_decay: float = 0.0  # on block matrices only; on a norm's weight it would pull the gain to 1, not to 0
    momentum: float = 0.95  # Muon: decay of the momentum buffer; lower values are better in short runs
    beta1: float = 0.9  # AdamW: decay of the mean gradient
    beta2: float = 0.95  # AdamW: decay of the mean squared gradient
    grad_clip: float = 1.0  # largest gradient norm; 0: no clipping
    # evaluation and logs
    eval_interval: int = 500  # steps between evaluations, each with a checkpoint and a sample
    log_interval: int = 10  # steps between log lines
    sample_tokens: int = 256  # longest sample, in tokens
    wandb: bool = False  # copy the log to Weights & Biases
    # system
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"  # bfloat16 (autocast over float32 weights) or float32; auto: bfloat16 if the hardware has it
    compile: bool = True  # torch.compile the model
    activation_memory: float = 1.0  # fraction of activations kept for backward; the rest is recomputed (needs compile)
    fsdp: bool = False  # with torchrun: shard a model too large for one GPU (weights, gradients, optimizer state)
    seed: int = 1337  # determines initial weights, data order, dropout and samples

    def __post_init__(self):
        check_range(self, 1, NO_LIMIT, "gradient_accumulation_steps", "eval_interval", "log_interval")
        check_range(self, 0, 0.999999, "momentum", "beta1", "beta2")
        check_range(self, 0, 1, "cooldown_frac", "activation_memory")
        for key, choices in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
            if getattr(self, key) not in choices:
                raise ValueError(f"{key}={getattr(self, key)!r} must be {' or '.join(choices)}")
        if self.learning_rate is not None:
            check_range(self, 1e-12, 1e3, "learning_rate")
            if not 0 <= self.min_lr <= self.learning_rate:
                raise ValueError(f"min_lr={self.min_lr} must lie between 0 and learning_rate={self.learning_rate}")
        if self.wandb and not importlib.util.find_spec("wandb"):
            raise ValueError("wandb=True needs a package that is not installed: pip install wandb")


def fit(task, cfg, state, device):
    """Train task.model until cfg.max_iters. After SIGTERM or Ctrl-C, save and end the process.

    state: from new_state() or read_state(). A checkpoint saves all of it: add anything that must survive a resume.
    task: the model and its data, such as Pretraining below or InstructionTuning in lora.py. It has the attributes
    `model` and `floor` (entropy floor of the first validation set in bits per byte, or None), and the methods

        micro_batches(step)         [(tokens, labels), ...] or [(tokens, labels, doc_ids), ...], for Gemma.forward()
        validation_sets()           {name: iterable of such batches}; the first set decides which checkpoint is the best
        metrics(losses)             {name: nats per label} -> ({"val_loss": ..., ...} for the log, a line to print)
        sample()                    a text that the model generated
        save_model(path, weights)   write a model directory
    """
    model, dtype, first_step = task.model, pick_dtype(cfg.dtype, device), state.step
    state.settings |= {key: value for key, value in asdict(cfg).items() if (key, value) != ("init_from", "resume")}
    optimizers = make_optimizers(model, cfg)
    load_optimizers(optimizers, model, vars(state).pop("optimizer", {}))
    if cfg.compile:
        compile_for_training(model, cfg.activation_memory)
    forward = wrap_ddp(model, cfg.fsdp)
    folder = RunFolder(cfg.out_dir, cfg.init_from)
    log = RunLog(folder, model, state, device, dtype, cfg.max_iters, task.floor, cfg.wandb)
    with folder, log, StopSignals(device) as signals:
        model.train()
        micro_batches = task.micro_batches(state.step)
        while not signals.stop_requested():
            # every eval_interval steps: evaluate, sample and save
            is_done = state.step >= cfg.max_iters
            if (is_done or state.step % cfg.eval_interval == 0) and state.evaluated != state.step:
                model.eval()
                losses = validation_losses(task, device, dtype)
                val_loss = next(iter(losses.values()))  # of the first validation set
                is_best = val_loss < state.best_val_loss
                state.best_val_loss = val_loss if is_best else state.best_val_loss
                state.evaluated = state.step  # a run resumed at this step does not evaluate again
                log.evaluation(*task.metrics(losses), task.sample())
                if is_best:
                    folder.save("best", task.save_model, model)
                model.train()
                folder.save("last", task.save_model, model, state, optimizers)
                log.restart_clock()
            if is_done:  # add another stopping rule here, and keep its counters in `state`
                break

            # one step
            lr = set_learning_rate(optimizers, state.step, cfg)
            torch.manual_seed(hash((cfg.seed, state.step, get_rank())))  # dropout depends only on seed, step and rank
            loss = accumulate_gradients(forward, micro_batches, device, dtype)
            # here the gradients are complete: measure, rescale or add noise
            state.tokens += sum(num_tokens(labels) for _, labels, *_ in micro_batches)
            micro_batches = task.micro_batches(state.step + 1)  # loaded while the device is busy
            loss, grad_norm = optimizer_step(optimizers, loss, cfg.grad_clip)
            state.step, state.seconds = state.step + 1, log.elapsed()
            # here the weights are new: update an average of them, or save by time with folder.save("last", ...)

            metrics = {"train_loss": loss, "lr": lr, "grad_norm": grad_norm}
            log.check_finite(loss, grad_norm)
            if state.step % cfg.log_interval == 0 or state.step == cfg.max_iters:
                log.step(micro_batches[0], metrics)  # the next step's batch has the same shape
            if state.step == first_step + 1:  # this step included compilation
                log.restart_clock()
                gc.freeze()  # these objects stay until the end: the garbage collector need not scan them again
        if signals.stop_requested():  # also if the signal came during the last evaluation
            folder.save("last", task.save_model, model, state, optimizers)
    folder.raise_errors()
    if signals.stop_signal:
        say(f"stopped after step {state.step}; to continue, run the same command with --init_from=resume")
        shutdown_distributed(128 + signals.stop_signal)


# ---- one step --------------------------------------------------------------------------------------------------------


def wsd(step, cfg):
    """Stay at 1, then decay linearly to 0 over the last cooldown_frac of max_iters (warmup, stable, decay)."""
    return min(1, max(0, (cfg.max_iters - step) / max(1, cfg.cooldown_frac * cfg.max_iters)))


def cosine(step, cfg):
    """Decay from 1 to 0 along half a cosine, from the end of warmup to max_iters."""
    progress = (step - warmup_steps(cfg)) / max(1, cfg.max_iters - warmup_steps(cfg))
    return 0.5 * (1 + math.cos(math.pi * min(1, max(0, progress))))


SCHEDULES = {"wsd": wsd, "cosine": cosine}  # f(step, cfg) -> position of the rate between min_lr (0) and the peak (1)


def warmup_steps(cfg):
    return cfg.warmup_iters if cfg.warmup_iters >= 1 else cfg.warmup_iters * cfg.max_iters


def learning_rate(step, cfg):
    """Return the learning rate of a step, counted from 0: the lower of warmup and schedule."""
    scheduled = cfg.min_lr + SCHEDULES[cfg.schedule](step, cfg) * (cfg.learning_rate - cfg.min_lr)
    return min(scheduled, cfg.learning_rate * (step + 1) / max(1, warmup_steps(cfg)))


def set_learning_rate(optimizers, step, cfg):
    """Set the step's learning rate in every parameter group, times the group's "lr_scale" if it has one."""
    lr = learning_rate(step, cfg)
    for group in groups_of(optimizers):
        group["lr"] = lr * group.get("lr_scale", 1.0)
    return lr


def accumulate_gradients(forward, micro_batches, device, dtype):
    """Accumulate the gradients of a step's micro-batches; each process computes its share of them. Return the mean loss
    in nats per label, as a tensor that the device may still be computing."""
    # every label of the step has the same weight, even if micro-batches or processes differ in their number of labels
    num_labels = sum(int((labels != -100).sum()) for _, labels, *_ in micro_batches)
    own_batches = local_micro_batches(micro_batches)  # this rank's whole micro-batches, or its rows of each
    total = torch.zeros((), device=device)
    for i, batch in enumerate(own_batches):
        if hasattr(forward, "require_backward_grad_sync"):  # DDP: all-reduce in the last backward only
            forward.require_backward_grad_sync = i == len(own_batches) - 1
        with autocast(device, dtype):
            loss = forward(*to_device(batch, device), reduction="sum") / num_labels
        (loss * get_world_size()).backward()  # DDP averages over processes; this makes it a sum
        total += loss.detach()
    return all_reduce_sum(total, device)


def optimizer_step(optimizers, loss, grad_clip):
    """Clip the gradients and step. Return (loss, gradient norm). If one is not finite, the weights stay unchanged."""
    trained = [p for group in groups_of(optimizers) for p in group["params"]]
    grad_norm = torch.nn.utils.clip_grad_norm_(trained, grad_clip or math.inf)
    loss, grad_norm = torch.stack((loss, full_tensor(grad_norm))).tolist()  # waits for the device
    for optimizer in optimizers:
        if math.isfinite(loss) and math.isfinite(grad_norm):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss, grad_norm


def validation_losses(task, device, dtype):
    """Return {name: mean loss in nats per label} of the task's validation sets."""
    return {name: evaluate(task.model, batches, device, dtype) for name, batches in task.validation_sets().items()}


def evaluate(model, batches, device, dtype):
    """Return the mean loss in nats per label of a model in eval mode. The processes share the batches. A metric that
    needs logits can be summed here too: model(tokens) returns logits, model(tokens, labels) only the loss."""
    batches, sums = iter(batches), torch.zeros(2, dtype=torch.float64)  # sum of losses, number of labels
    with torch.no_grad(), autocast(device, dtype):
        while group := list(itertools.islice(batches, get_world_size())):
            batch = group[min(get_rank(), len(group) - 1)]
            if get_rank() >= len(group):  # no batch is left for this rank, but it must join the collectives
                batch = without_labels(batch)
            loss = model(*to_device(batch, device), reduction="sum")
            sums += torch.tensor([loss.item(), (batch[1] != -100).sum()], dtype=torch.float64)
    total, count = all_reduce_sum(sums, device).tolist()
    return total / max(1, count)


def num_tokens(labels):
    """Return the number of tokens in rows of labels (B, T), without the padding after each row's last label."""
    return labels.numel() - int((labels != -100).flip(1).int().argmax(1).sum())


# ---- optimizers ------------------------------------------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): the update of a matrix is its momentum, orthogonalized. Updates are scaled to the size
    of AdamW's (0.2 rms, Liu et al. 2025), so that both optimizers can use one learning rate. Matrices of one shape form
    a group and are orthogonalized as one stack, which keeps the device busier; processes share the work."""

    def __init__(self, params, momentum=0.95, weight_decay=0.0):
        by_shape = {}
        for p in params:
            by_shape.setdefault(p.shape, []).append(p)
        defaults = {"lr": 0.0, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__([{"params": group} for group in by_shape.values()], defaults)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params, momentum = group["params"], group["momentum"]
            gradients = []
            for p in params:
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                momentum_buffer = self.state[p]["momentum_buffer"]
                momentum_buffer.lerp_(p.grad, 1 - momentum)
                gradients.append(full_tensor(p.grad.lerp(momentum_buffer, momentum)))  # Nesterov momentum
            updates = share_work(orthogonalize, torch.stack(gradients))
            scale = 0.2 * max(updates.shape[1:]) ** 0.5
            for p, update in zip(params, updates, strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(shard_like(update.to(p.dtype), p), alpha=-group["lr"] * scale)


def orthogonalize(stack):
    """Return the matrices of `stack` (N, rows, columns) in bfloat16, with the same singular vectors but singular values
    of about 1, by five Newton-Schulz steps with Jordan's coefficients."""
    wide = stack.mT if stack.shape[1] > stack.shape[2] else stack
    x = wide.bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return x if wide is stack else x.mT


def muon(matrices, others, cfg):
    return [*([Muon(matrices, cfg.momentum, cfg.weight_decay)] if matrices else []), *adamw([], others, cfg)]


def adamw(matrices, others, cfg):
    groups = [{"params": others, "weight_decay": 0.0}, {"params": matrices, "weight_decay": cfg.weight_decay}]
    groups = [group for group in groups if group["params"]]
    return [torch.optim.AdamW(groups, betas=(cfg.beta1, cfg.beta2), fused=True)] if groups else []


OPTIMIZERS = {"muon": muon, "adamw": adamw}  # f(matrices inside blocks, other parameters, cfg) -> [optimizer, ...]


def make_optimizers(model, cfg):
    """Return optimizers that hold each trainable parameter once. Raises ValueError for a parameter without a rule."""
    trained, matrices, others = {name: p for name, p in model.named_parameters() if p.requires_grad}, [], []
    for name, p in trained.items():
        if p.ndim == 2 and name.startswith("model.layers."):
            matrices.append(p)
        elif p.ndim < 2 or name == "model.embed_tokens.weight":
            others.append(p)
        else:
            raise ValueError(f"make_optimizers() has no rule for {name} {list(p.shape)}: add one")
    optimizers = OPTIMIZERS[cfg.optimizer](matrices, others, cfg)
    grouped = [id(p) for group in groups_of(optimizers) for p in group["params"]]
    assert sorted(grouped) == sorted(map(id, trained.values())), "a parameter is in no group, or in two"
    return optimizers


def groups_of(optimizers):
    return [group for optimizer in optimizers for group in optimizer.param_groups]


# ---- pretraining: rows of tokens -------------------------------------------------------------------------------------


class PackedDataset:
    """One split of a prepared dataset as rows of block_size tokens. A row begins with a document where possible.
    A row's first token is the end-of-text before its first document, or the tokenizer's <bos> if it has one. If the end
    of a row cuts a document off, the next row starts that document again. So every token has the whole beginning of its
    document in context at least once. Only a document longer than a row continues in the next row. For other rows, see
    docs/hacking.md."""

    def __init__(self, dataset, split, block_size):
        path, meta, tokenizer = dataset
        self.tokens = np.memmap(path / f"{split}.bin", dtype=meta["dtype"], mode="r")
        self.block_size, self.eot = block_size, tokenizer.eot
        self.bos = tokenizer.bos if tokenizer.bos != tokenizer.eot else None
        # the first document has no end-of-text before it: position -1 stands for one
        ends = np.append(-1, document_ends(self.tokens, path / f"{split}.bin", tokenizer))
        last, starts, start = len(self.tokens) - 1, [], -1
        while start < last:
            starts.append(start)
            row_end = start + block_size
            document_end = int(ends[np.searchsorted(ends, row_end, "right") - 1])  # the last one in this row or before
            start = document_end if document_end > start else row_end
        self.starts = np.array(starts)
        self.num_new_labels = np.diff(self.starts, append=last)  # labels of each row that the next row does not repeat

    def __len__(self):
        return len(self.starts)

    def batch(self, rows, new_only=False):
        """Return tokens and labels, both (B, T) in int64, of the rows with these numbers. Labels past the end of the
        data are -100. With new_only, labels that the next row repeats are -100 too, so that each token is a label
        exactly once in all rows together."""
        x = np.full((len(rows), self.block_size + 1), self.eot, dtype=np.int64)
        y = np.full((len(rows), self.block_size), -100, dtype=np.int64)
        for i, row in enumerate(rows):
            start = self.starts[row]
            text = self.tokens[max(start, 0) : start + self.block_size + 1]
            skip = int(start < 0)
            x[i, skip : skip + len(text)] = text
            n = self.num_new_labels[row] if new_only else skip + len(text) - 1
            y[i, :n] = x[i, 1 : n + 1]
        if self.bos is not None:  # Gemma's own weights write nonsense without it
            x[:, 0] = self.bos
        return torch.from_numpy(x[:, :-1].copy()), torch.from_numpy(y)


def epoch_shuffled_indices(count, size, seed, step):
    """Return `size` of `count` row numbers for a step, from (seed, step) alone. An epoch visits each row once."""
    numbers = range(step * size, (step + 1) * size)
    return np.array([epoch_permutation(count, seed, i // count)[i % count] for i in numbers])


@functools.lru_cache(maxsize=2)
def epoch_permutation(count, seed, epoch):
    return np.random.default_rng((seed, epoch)).permutation(count)


class ValidationSet:
    """The validation split of a dataset, or its first eval_tokens, as batches. The rows are always the same, and each
    token is a label once. The last batch is padded, so that all batches have one shape."""

    def __init__(self, dataset, block_size, batch_size, eval_tokens=0):
        self.rows, self.batch_size = PackedDataset(dataset, "val", block_size), batch_size
        counts, self.floor = dataset.meta["val"], dataset.meta["floor_bits_per_byte"]
        ends = self.rows.num_new_labels.cumsum()
        self.num_rows = min(len(self.rows), 1 + int(np.searchsorted(ends, eval_tokens or counts["tokens"])))
        self.bytes_per_token = counts["bytes"] / counts["tokens"]
        if self.num_rows < len(self.rows):  # the floor is only known for the whole split
            labels = self.rows.tokens[: ends[self.num_rows - 1]]
            self.bytes_per_token, self.floor = len(dataset.tokenizer.decode(labels).encode()) / len(labels), None

    def __iter__(self):
        for i in range(0, self.num_rows, self.batch_size):
            x, y = self.rows.batch(range(i, min(i + self.batch_size, self.num_rows)), new_only=True)
            padding = (0, 0, 0, self.batch_size - len(x))
            yield F.pad(x, padding), F.pad(y, padding, value=-100)


class Pretraining:
    """Next-token prediction on a prepared dataset, as a task for fit()."""

    def __init__(self, data_cfg, cfg, model, dataset):
        self.data_cfg, self.cfg, self.model, self.dataset = data_cfg, cfg, model, dataset
        sizes = data_cfg.block_size, data_cfg.batch_size, data_cfg.eval_tokens
        val_datasets = {"val": dataset}  # by their names in the log; the first decides which checkpoint is the best
        if any(other.tokenizer.spec["model"] != dataset.tokenizer.spec["model"] for other in val_datasets.values()):
            raise UserError("validation and training sets have different tokenizers: prepare both with one tokenizer")
        self.val_sets = {name: ValidationSet(other, *sizes) for name, other in val_datasets.items()}
        self.floor = self.val_sets["val"].floor

    @functools.cached_property
    def train_rows(self):  # to mix datasets: compare their tokenizers, and give start_model() their fingerprints
        path, meta, _ = self.dataset
        if (tokens := meta["train"]["tokens"]) < (block_size := self.data_cfg.block_size):
            raise UserError(f"{path}/train.bin has {tokens} tokens, fewer than block_size={block_size}: lower it")
        return PackedDataset(self.dataset, "train", block_size)

    def micro_batches(self, step):
        size = self.data_cfg.batch_size * self.cfg.gradient_accumulation_steps
        rows = epoch_shuffled_indices(len(self.train_rows), size, self.cfg.seed, step)
        return [self.train_rows.batch(part) for part in rows.reshape(-1, self.data_cfg.batch_size)]

    def validation_sets(self):
        return self.val_sets

    def metrics(self, losses):
        metrics, parts = {}, []
        for name, loss in losses.items():
            val_set = self.val_sets[name]
            bpb, floor = loss / math.log(2) / val_set.bytes_per_token, val_set.floor  # bpb: bits per byte
            metrics |= {f"{name}_loss": loss, f"{name}_bpb": bpb}
            above_floor = f" ({bpb / floor:.3f} x the entropy floor of {floor:.4f})" if floor else ""
            perplexity = math.exp(min(loss, 99))
            parts.append(f"{name} loss {loss:.4f}, perplexity {perplexity:.2f}, {bpb:.4f} bits per byte{above_floor}")
        return metrics, "; ".join(parts)

    def sample(self):
        """Return a short generated text, sampled with the same seed at every evaluation."""
        tokenizer, text = self.dataset.tokenizer, self.data_cfg.sample_prompt
        prompt = [tokenizer.bos, *tokenizer.encode(text).tolist()]
        sampling = {"temperature": 0.8, "seed": self.cfg.seed, "stop_ids": [tokenizer.eot]}
        return text + complete(self.model, tokenizer, [prompt], self.cfg.sample_tokens, **sampling)[0]

    def save_model(self, path, weights):
        self.model.save_pretrained(path, weights)
        self.dataset.tokenizer.save(path)

    def print_plan(self, state):
        total, embedding = self.model.num_params() / 1e6, self.model.model.embed_tokens.weight.numel() / 1e6
        per_step = self.data_cfg.batch_size * self.cfg.gradient_accumulation_steps
        rows, block_size = self.train_rows, self.data_cfg.block_size
        epochs, repeated = self.cfg.max_iters * per_step / len(rows), ""
        if hasattr(rows, "num_new_labels"):
            repeated = f", {1 - rows.num_new_labels.sum() / (len(rows) * block_size):.0%} of their tokens repeated"
        print(f"model: {total:.1f}M parameters, {embedding:.1f}M of them in the embedding")
        print(f"training: {self.cfg.max_iters - state.step:,} steps of {per_step * block_size:,} tokens; {epochs:.2f} "
              f"epochs of the text in {len(rows):,} rows{repeated}")  # fmt: skip
        if warmup_steps(self.cfg) >= self.cfg.max_iters:
            print(f"warning: warmup_iters={self.cfg.warmup_iters:g} is not below max_iters={self.cfg.max_iters}")
        if epochs > 30 and not self.data_cfg.dropout:
            print(f"warning: {epochs:.0f} epochs over the same text without dropout will memorize it")


def main(data_cfg, cfg, arch):
    if data_cfg.compare:
        return compare_runs([Path(name.strip()) for name in data_cfg.compare.split(",")])
    device, compile = set_up(cfg.device, cfg.dtype, cfg.compile, cfg.fsdp)
    dataset = open_dataset(data_cfg.dataset)
    cfg = replace(cfg, compile=compile, out_dir=cfg.out_dir or f"out/{dataset.path.name}")
    if not data_cfg.eval_only:
        cfg = replace(cfg, init_from=resolve_init_from(cfg.out_dir, cfg.init_from))
    with runtime_errors("the model alone is too large"):
        model, state = start_model(data_cfg, cfg, arch, dataset, device)
    if cfg.learning_rate is None:
        default = 3e-3 if cfg.init_from == "scratch" else 1e-4
        with user_errors("at the default rate"):
            cfg = replace(cfg, learning_rate=state.settings.get("learning_rate") or default)
    task = Pretraining(data_cfg, cfg, model, dataset)
    B, count = data_cfg.batch_size, cfg.gradient_accumulation_steps
    flags = f": --batch_size={B // 2} --gradient_accumulation_steps={2 * count}" if B % 2 == 0 else ""
    with runtime_errors(f"lower batch_size and raise gradient_accumulation_steps by the same factor{flags}"):
        if data_cfg.eval_only:
            model.eval()
            if cfg.compile:
                compile_for_training(model, cfg.activation_memory)
            print(task.metrics(validation_losses(task, device, pick_dtype(cfg.dtype, device)))[1])
        else:
            task.print_plan(state)
            fit(task, cfg, state, device)
            out_dir = shlex.quote(f"--out_dir={cfg.out_dir}")
            print(f'done. To sample from the model: python sample.py {out_dir} --start="Once"')
    shutdown_distributed()


def start_model(data_cfg, cfg, arch, dataset, device):
    """Return the model that init_from names, and the state from which its training starts."""
    _, meta, tokenizer = dataset
    fingerprint, settings = meta.get("fingerprint"), asdict(data_cfg) | asdict(cfg)
    state, home = new_state(fingerprint, settings), loading_device(cfg.fsdp, device)
    if cfg.init_from == "scratch":
        if arch.vocab_size == GemmaConfig.vocab_size:  # not set: the tokenizer's size, rounded up for faster products
            arch = replace(arch, vocab_size=math.ceil(meta["vocab_size"] / 64) * 64)
        special = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eot, "pad_token_id": tokenizer.pad}
        with torch.device(home):
            model = Gemma(replace(arch, **special), data_cfg.dropout)
        if home.type != "meta":
            model.init_weights(cfg.seed, device)
    else:
        last = latest_intact_dir(Path(cfg.out_dir) / "last")
        checkpoint = last if cfg.init_from == "resume" else hub_directory(cfg.init_from)
        if not checkpoint.is_dir():
            raise UserError(f"--init_from={cfg.init_from}: no checkpoint in {checkpoint}")
        model = open_model(checkpoint, home, dropout=data_cfg.dropout)
        if Tokenizer.load(checkpoint).spec["model"] != tokenizer.spec["model"]:
            raise UserError(f"dataset and model have different tokenizers: prepare it with --tokenizer={checkpoint}")
        check_architecture(arch, model.config, checkpoint)
        if cfg.init_from == "resume":
            state = read_state(checkpoint, fingerprint, settings, fixed=("optimizer",), fsdp=cfg.fsdp)
    tokenizer.check_rows(model.config.vocab_size)
    if data_cfg.block_size > (limit := model.config.max_position_embeddings):
        raise UserError(f"block_size={data_cfg.block_size} exceeds max_position_embeddings={limit}: lower it")
    if (length := 1 + len(tokenizer.encode(data_cfg.sample_prompt))) >= limit:
        raise UserError(f"sample_prompt has {length} tokens, more than max_position_embeddings={limit}: shorten it")
    if cfg.fsdp:
        apply_fsdp(model, device)
    return model, state


if __name__ == "__main__":
    run(main, PretrainConfig, TrainConfig, GemmaConfig)
