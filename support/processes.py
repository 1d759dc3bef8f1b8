"""Distributed training: the processes that torchrun starts, one per device, and the signals that stop them all."""

import contextlib
import math
import os
import signal
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from support.devices import can_compile, pick_device, pick_dtype
from support.settings import Failure, UserError, first_line


def set_up(device_name, dtype_name, compile, fsdp):
    """Join the other processes if torchrun started several, and set PyTorch up. Return (device, whether to compile)."""
    if fsdp and not dist.is_torchelastic_launched():
        raise UserError("--fsdp=True needs several processes: start it with torchrun")
    device = init_distributed(device_name) if dist.is_torchelastic_launched() else pick_device(device_name)
    compile, dtype = compile and can_compile(device), str(pick_dtype(dtype_name, device)).removeprefix("torch.")
    processes = f" in {get_world_size()} processes" if get_world_size() > 1 else ""
    print(f"device: {device}{processes}, {dtype}, {'compiled' if compile else 'not compiled'}")
    torch.set_float32_matmul_precision("high")
    if device.type == "cpu":  # otherwise compiled code sums the embedding's gradient in the order its threads finish
        torch.use_deterministic_algorithms(True)
    return device, compile


def get_rank():
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def init_distributed(device_name):
    """Join the process group that torchrun started. Return this process's device."""
    local_rank = int(os.environ["LOCAL_RANK"])
    on_gpu = device_name.startswith("cuda") or (device_name == "auto" and torch.cuda.is_available())
    if on_gpu and local_rank >= torch.cuda.device_count():
        raise Failure(f"--nproc_per_node is more than the {torch.cuda.device_count()} GPUs here: lower it")
    device = pick_device(f"cuda:{local_rank}" if on_gpu else device_name)
    if on_gpu:
        torch.cuda.set_device(device)
    # after a restart torchrun's store still has the addresses of dead processes (pytorch issue 167288)
    store, rank, world_size = next(rendezvous("env://"))
    store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
    timeout = timedelta(minutes=10)  # how long to wait for a process that hangs
    backend, gpu = ("nccl", device) if on_gpu else ("gloo", None)
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout, device_id=gpu)
    except RuntimeError as e:
        raise Failure(f"the processes could not connect: {first_line(e)}") from None
    if get_rank():
        sys.stdout = open(os.devnull, "w")
    return device


def shutdown_distributed(code=0):
    """End this process together with the others. os._exit() is used because gloo's threads can crash a normal exit."""
    if dist.is_initialized():
        dist.barrier()
        sys.stdout.flush()
        os._exit(code)
    if code:
        sys.exit(code)


class StopSignals(contextlib.ExitStack):
    """SIGTERM and Ctrl-C set a flag until `with` ends, so that the run can save. A second Ctrl-C ends it at once."""

    def __init__(self, device):
        super().__init__()
        self.device = device
        self.received = 0  # the number of the first signal that this process received
        self.stop_signal = 0  # the number of the signal that stops all processes
        for number in (signal.SIGTERM, signal.SIGINT):
            self.callback(signal.signal, number, signal.signal(number, self.receive))

    def receive(self, number, _frame):
        if self.received and number == signal.SIGINT and get_world_size() == 1:  # under torchrun it arrives twice
            raise KeyboardInterrupt
        self.received = self.received or number
        if get_rank() == 0:  # not by print(), which the signal may have interrupted
            with contextlib.suppress(OSError):
                os.write(1, f"{signal.Signals(number).name}: saving, then stopping\n".encode())

    def stop_requested(self):
        """Return whether any process received a signal before this all-reduce. All processes get the same answer."""
        if not self.stop_signal and all_reduce_sum(torch.tensor(self.received), self.device).item():
            self.stop_signal = self.received or signal.SIGTERM
        return bool(self.stop_signal)


def all_reduce_sum(tensor, device):
    """Return the sum of every process's tensor."""
    if dist.is_initialized():
        tensor = tensor.to(device)
        dist.all_reduce(tensor)
    return tensor


def local_micro_batches(micro_batches):
    """Return this process's share of a step: whole micro-batches if they divide evenly, otherwise some rows of each. A
    share may have no label, so do not take its mean: sum its losses, and divide by the number of labels in the step."""
    if len(micro_batches) % get_world_size() == 0:
        return micro_batches[get_rank() :: get_world_size()]
    shares = [[t[get_rank() :: get_world_size()] for t in batch] for batch in micro_batches]
    # a process that got no row computes a row without labels, because every rank must join the all-reduce
    return [share if len(share[0]) else without_labels([t[:1] for t in batch])
            for share, batch in zip(shares, micro_batches, strict=True)]  # fmt: skip


def without_labels(batch):
    """Return the batch with every label masked: the same shape and cost, no gradient."""
    tokens, labels, *more = batch
    return [tokens, torch.full_like(labels, -100), *more]


def wrap_ddp(model, fsdp):
    """Return the model wrapped in DDP, which averages gradients over all processes. FSDP averages them by itself."""
    return DistributedDataParallel(model) if dist.is_initialized() and not fsdp else model


def share_work(function, stack):
    """Return function(stack) for matrices that every process holds. Each process computes a part of the result."""
    if get_world_size() == 1:
        return function(stack)
    count = math.ceil(len(stack) / get_world_size())
    padded = F.pad(stack, (0, 0) * (stack.ndim - 1) + (0, count * get_world_size() - len(stack)))
    part = function(padded[get_rank() * count :][:count]).contiguous()
    result = part.new_empty(len(padded), *part.shape[1:])
    dist.all_gather_into_tensor(result, part)
    return result[: len(stack)]


def loading_device(fsdp, device):
    """Return the device to create a model on. With FSDP, only rank 0 has weights before apply_fsdp()."""
    return device if not fsdp else torch.device("meta" if get_rank() else "cpu")


def apply_fsdp(model, device):
    """Shard a model by FSDP2. Rank 0 has its weights. Blocks are gathered in float32 and cast by autocast, so that the
    arithmetic is the same as in one process."""
    from torch.distributed.fsdp import fully_shard  # takes half a second to import

    weights = dict(model.state_dict())
    model.to("meta")
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    model.to_empty(device=device)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(shard_like(weights.pop(name), p, source=0))


def shard_like(tensor, like, source=None):
    """Return this process's shard of a tensor. The whole tensor is returned if `like` is not a DTensor, or has another
    shape (a step counter). source: the rank that has the tensor; None: every process has it."""
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    tensor = torch.empty_like(tensor, device=like.device) if tensor.is_meta else tensor.to(like.device)
    if tensor.shape == like.shape:
        return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=source)
    dist.broadcast(tensor, source)
    return tensor


def full_tensor(tensor):
    """Return the whole tensor, gathered if it is sharded. Every rank must call this."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def full_tensor_on_rank0(tensor):
    """Return the whole tensor. A sharded one is gathered into the main memory of rank 0; other ranks get None."""
    whole = full_tensor(tensor)
    return whole if whole is tensor else whole.cpu() if get_rank() == 0 else None
