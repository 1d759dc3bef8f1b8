"""A run's folder: out/<run>/ with the checkpoints last/ and best/, and the state from which a run resumes."""

import contextlib
import math
import os
import shutil
import time
import warnings
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.utils._pytree import tree_leaves, tree_map

from model import Gemma, GemmaConfig, tensor_shapes
from support.files import atomic_replace_dir, latest_intact_dir, lock_folder
from support.log import say
from support.processes import full_tensor_on_rank0, get_rank, shard_like
from support.settings import Failure, UserError, first_line, user_errors

# evaluated: the step of the last evaluation
NEW_STATE = {"step": 0, "tokens": 0, "seconds": 0.0, "best_val_loss": math.inf, "evaluated": -1}


def new_state(fingerprint, settings):
    """Return the state of a new run. train_state.pt saves all of it. fingerprint: a digest of all its data."""
    return SimpleNamespace(**NEW_STATE, dataset=fingerprint, settings=settings)


class RunFolder(contextlib.ExitStack):
    """The folder of one run, locked until the end of `with`. An earlier run in it is moved aside, unless it is resumed.
    Rank 0 writes. A failed write, for example on a full disk, is reported and added to `errors`; training goes on."""

    def __init__(self, out_dir, init_from):
        super().__init__()
        self.path, self.errors = Path(out_dir), []
        if get_rank() == 0:
            init_from = resolve_init_from(out_dir, init_from)  # again, for callers that skip main()
            self.enter_context(lock_folder(self.path))
            if init_from != "resume" and self.path.exists() and any(self.path.iterdir()):
                aside = self.path.with_name(f"{self.path.name}-{time.strftime('%Y%m%d-%H%M%S')}")
                os.replace(self.path, aside)
                print(f"the run that was in {self.path} is now in {aside}")
            self.path.mkdir(parents=True, exist_ok=True)
            if job := os.environ.get("TORCHELASTIC_RUN_ID"):  # torchrun's name for this job, the same after restarts
                (self.path / ".job").write_text(job)
        if dist.is_initialized():
            dist.barrier()

    def try_write(self, write, *args):
        """Call write(*args) on rank 0. Report an OSError and go on."""
        try:
            if get_rank() == 0:
                write(*args)
        except OSError as e:
            self.errors.append(str(e))
            say(f"warning: {e}; training goes on")

    def save(self, name, save_model, model, state=None, optimizers=None):
        """Save a checkpoint. Every rank must call it: sharded tensors are gathered one by one.
        save_model(path, weights): writes a model directory. state, optimizers: saved in train_state.pt, to
        resume from. Raises Failure if saving them fails and the run has no older checkpoint to resume from."""
        state = state and vars(state) | {"optimizer": optimizer_state(optimizers, model)}
        weights, state = tree_map(full_tensor_on_rank0, (model.state_dict(), state))
        self.try_write(write_checkpoint, self.path / name, save_model, weights, state)
        if get_rank() == 0 and state is not None and not latest_intact_dir(self.path / name).exists():
            raise Failure(self.errors[-1])

    def raise_errors(self):
        if self.errors:
            raise Failure(f"{len(self.errors)} writes failed, the last of them: {self.errors[-1]}")


def resolve_init_from(out_dir, init_from):
    """Return init_from, or "resume" if torchrun restarted this run. Raises UserError if out_dir holds files that are
    not a run of ours, or a run that cannot be moved aside."""
    with user_errors(f"--out_dir={out_dir!r}"):
        path = Path(out_dir)
        is_restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"  # after a crash, by --max-restarts
        job = path / ".job"
        is_same_job = job.exists() and job.read_text() == os.environ.get("TORCHELASTIC_RUN_ID")
        if is_restarted and is_same_job and latest_intact_dir(path / "last").exists():
            return "resume"
        if init_from == "resume" or not path.exists() or (path.is_dir() and not any(path.iterdir())):
            return init_from
        resolved = path.resolve()
        if not any((resolved / name).exists() for name in ("log.jsonl", "last", "best", ".job")):
            raise UserError(f"--out_dir={out_dir}: has files that are not from a nanoGemma run: name another folder")
        if path.is_symlink() or os.path.ismount(resolved) or Path.cwd().is_relative_to(resolved):
            raise UserError(f"--out_dir={out_dir}: the run in it cannot be moved aside: name another folder")
        if Path(init_from).resolve().is_relative_to(resolved):
            raise UserError(f"--out_dir={out_dir}: contains the model to start from: name another folder")
        if get_rank() == 0:
            with lock_folder(path):  # raises UserError if another run holds it
                pass
    return init_from


def write_checkpoint(path, save_model, weights, state=None):
    """Write a model directory beside `path`, with train_state.pt if `state` is given. Check that it is whole, then move
    it to `path`. Raises OSError if any of this fails; the old checkpoint is then still at `path`."""
    part = path.with_name(path.name + ".part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        save_model(part, weights)
        if state is not None:
            torch.save(state, part / "train_state.pt")
            torch.load(part / "train_state.pt", map_location="meta", weights_only=True)
        for file in part.glob("*.safetensors"):
            tensor_shapes(file)
        atomic_replace_dir(part, path)
    except (OSError, RuntimeError, SafetensorError, ValueError) as e:  # torch and safetensors have errors of their own
        shutil.rmtree(part, ignore_errors=True)
        size = sum(t.nbytes for t in tree_leaves((weights, state)) if isinstance(t, torch.Tensor))
        free = shutil.disk_usage(path.parent).free
        before = "; the previous checkpoint is intact" if latest_intact_dir(path).exists() else ""
        raise OSError(f"{path}: not saved: {first_line(e)} ({size / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free)"
                      f"{before}") from None  # fmt: skip


def open_model(path, device, dtype=torch.float32, dropout=0.0):
    """Return Gemma.from_pretrained(path). Raises UserError if the directory is not a valid Gemma 3."""
    path = latest_intact_dir(Path(path))
    with user_errors(f"{path}: not a Gemma 3 model directory"):
        return Gemma.from_pretrained(path, device, dtype, dropout)


def check_architecture(arch, config, path):
    """Raise UserError if settings other than the defaults contradict the trained model in `path`."""
    ignored = {"bos_token_id", "eos_token_id", "pad_token_id", "sliding_window_pattern"}  # the last is in layer_types
    for f in fields(arch):
        setting, trained, default = (getattr(c, f.name) for c in (arch, config, GemmaConfig()))
        if f.name not in ignored and setting not in (trained, default):
            raise UserError(f"{f.name}={setting}: the model in {path} has {trained}, which settings can't change")


def read_state(path, fingerprint, settings, fixed, fsdp=False):
    """Return the state in the checkpoint `path`, to resume the run. The data (its fingerprint) and the settings named
    in `fixed` must be those of the run; other changes are printed. fsdp: only rank 0 gets optimizer tensors."""
    unreadable = f"{path / 'train_state.pt'} cannot be read by this version; start a new run with --init_from={path}"
    with user_errors(unreadable), warnings.catch_warnings(action="ignore"):  # one line is enough
        device = "meta" if fsdp and get_rank() else "cpu"
        state = SimpleNamespace(**torch.load(path / "train_state.pt", map_location=device, weights_only=True))
        for key, value in (NEW_STATE | {"optimizer": {}, "settings": {}}).items():
            if not isinstance(getattr(state, key), type(value)):
                raise ValueError(f"{key} is {type(getattr(state, key)).__name__}")
    if None not in (saved := getattr(state, "dataset", None), fingerprint) and saved != fingerprint:
        raise UserError(f"the run in {path} was trained on another dataset: name that one, or start a new run")
    settings = {key: value for key, value in settings.items() if value is not None and key != "init_from"}
    before, ignored = state.settings, {"out_dir", "device", "eval_only"}
    changed = [key for key in settings if key in before and key not in ignored and before[key] != settings[key]]
    for key in changed:
        if key in fixed:
            raise UserError(f"{key}={settings[key]}: the run in {path} has {before[key]}; resume with that")
    if changed:
        print("resuming with changed settings:", ", ".join(f"{k} {before[k]} -> {settings[k]}" for k in changed))
    if "epochs" in changed:
        del before["max_iters"]  # max_iters follows from epochs, unless it is set too
    state.settings = before | settings
    return state


def optimizer_state(optimizers, model):
    """Return {parameter name: its state} of all optimizers, so that a checkpoint does not depend on their groups."""
    names = {p: name for name, p in model.named_parameters()}
    return {names[p]: values for optimizer in optimizers for p, values in optimizer.state.items()}


def load_optimizers(optimizers, model, saved):
    """Load optimizer state that any number of processes saved. Settings such as momentum are those of this run."""
    names = {p: name for name, p in model.named_parameters()}
    for optimizer in optimizers if saved else []:
        state = {}
        for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
            values = saved.get(names[p], {})
            state[i] = {key: shard_like(value, p, source=0) for key, value in values.items()}
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
