"""train.py: rows, optimizers and schedules, one step against torch, and whole runs."""

import importlib.util
import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, copy_project, fails, losses, prepare_fables, run_script
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from model import Gemma, GemmaConfig
from support.datasets import Dataset
from support.log import read_log
from support.runs import new_state
from support.settings import UserError
from support.tokenizer import Tokenizer
from train import (
    PackedDataset,
    PretrainConfig,
    Pretraining,
    TrainConfig,
    ValidationSet,
    epoch_shuffled_indices,
    fit,
    learning_rate,
    make_optimizers,
)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project with 400 fables prepared in it. Tests write to runs of their own."""
    return prepare_fables(copy_project(tmp_path_factory.mktemp("project")), count=400)


SMALL = GemmaConfig(vocab_size=448, hidden_size=32, num_hidden_layers=2, head_dim=16, intermediate_size=64)


CPU = torch.device("cpu")


def pretrain(project, out, *args):
    """Train a tiny run in out/<out>. Return its folder and what was printed."""
    result = run_script(project, "train.py", "--dataset=fables", f"--out_dir=out/{out}", *TINY, *args)
    return project / "out" / out, result.stdout


# ---- rows ------------------------------------------------------------------------------------------------------------


def make_rows(tmp_path, lengths, block_size, eot=0):
    """Return the rows and the tokens of a dataset. Its documents have these lengths, end-of-text included, and their
    tokens are all different."""
    tokens, next_id = [], 1
    for n in lengths:
        tokens += [*range(next_id, next_id + n - 1), eot]
        next_id += n - 1
    np.array(tokens, dtype=np.uint16).tofile(tmp_path / "train.bin")
    tokenizer = SimpleNamespace(eot=eot, bos=eot, vocab_size=2**16)
    return PackedDataset(Dataset(tmp_path, {"dtype": "uint16"}, tokenizer), "train", block_size), tokens


@pytest.mark.parametrize("block_size", [4, 10, 33, 500])
def test_each_token_is_a_label_once_with_its_document_before_it(tmp_path, block_size):
    lengths = np.random.default_rng(0).integers(1, 25, 60).tolist()
    rows, tokens = make_rows(tmp_path, lengths, block_size)
    x, y = rows.batch(range(len(rows)), new_only=True)
    assert y[y != -100].tolist() == tokens
    x, y = rows.batch(range(len(rows)))
    assert (x[:, 1:][y[:, :-1] != -100] == y[:, :-1][y[:, :-1] != -100]).all()
    starts = {0, *(np.flatnonzero(np.array(tokens) == 0) + 1).tolist()}
    position = {token: i for i, token in enumerate(tokens) if token}
    for inputs, labels in zip(x.tolist(), y.tolist(), strict=True):
        first = position.get(labels[0])
        if first is not None and first in starts:
            assert inputs[0] == 0  # the end-of-text before the document
        elif first is not None:
            assert inputs[0] == tokens[first - 1]  # a document longer than a row continues in the next
            assert max(lengths) > block_size


def test_every_document_that_fits_is_whole_in_some_row(tmp_path):
    rows, tokens = make_rows(tmp_path, [7, 9, 3, 20, 5, 5, 5, 11], 20)
    _, y = rows.batch(range(len(rows)))
    shown = [",".join(map(str, row)) for row in y.tolist()]
    at = 0
    for n in [7, 9, 3, 20, 5, 5, 5, 11]:
        assert any(",".join(map(str, tokens[at : at + n])) in row for row in shown)
        at += n


def test_batches_are_a_permutation_every_epoch_and_a_function_of_seed_and_step():
    """nanoGPT samples with replacement (its issue 294) and repeats its data after a resume (467)."""
    seen = [i for step in range(30) for i in epoch_shuffled_indices(35, 14, 3, step).tolist()]
    epochs = [seen[i : i + 35] for i in range(0, len(seen), 35)]
    assert len(epochs) == 12 and all(sorted(epoch) == list(range(35)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert epoch_shuffled_indices(35, 14, 3, 7).tolist() == seen[7 * 14 : 8 * 14]
    assert epoch_shuffled_indices(35, 14, 4, 7).tolist() != seen[7 * 14 : 8 * 14]
    assert epoch_shuffled_indices(5, 14, 3, 0).tolist()[:10] != [0, 1, 2, 3, 4] * 2  # a step of several epochs
    assert sorted(epoch_shuffled_indices(5, 10, 3, 0)) == sorted([0, 1, 2, 3, 4] * 2)


def pretraining(project, **settings):
    """Return the task of pretraining a small model on the project's fables."""
    path = project / "data" / "fables"
    dataset = Dataset(path, json.loads((path / "meta.json").read_text()), Tokenizer.load(path))
    cfg = TrainConfig(gradient_accumulation_steps=settings.pop("gradient_accumulation_steps", 1), seed=3)
    return Pretraining(PretrainConfig(block_size=256, **settings), cfg, Gemma(SMALL).init_weights(0), dataset)


def test_a_step_has_the_same_rows_in_any_number_of_micro_batches(project):
    one = pretraining(project, batch_size=6).micro_batches(4)
    three = pretraining(project, batch_size=2, gradient_accumulation_steps=3).micro_batches(4)
    assert len(one) == 1 and len(three) == 3
    for i in (0, 1):
        assert torch.equal(one[0][i], torch.cat([batch[i] for batch in three]))


def test_the_validation_loss_is_the_mean_over_all_tokens(project):
    task = pretraining(project, batch_size=5)
    val = task.validation_sets()["val"]
    loss = train.evaluate(task.model, val, CPU, torch.float32)
    assert task.model.training
    tokens = np.fromfile(project / "data" / "fables" / "val.bin", dtype=np.uint16)
    counts = task.dataset.meta["val"]
    assert sum(int((y != -100).sum()) for _, y in val) == len(tokens) == counts["tokens"]
    task.model.eval()
    total = 0.0  # computed again, row by row
    for i in range(len(val.rows)):
        x, y = val.rows.batch([i], new_only=True)
        with torch.no_grad():
            logp = task.model(x)[0].double().log_softmax(-1)
        total -= sum(logp[t, y[0, t]].item() for t in range(y.shape[1]) if y[0, t] != -100)
    assert loss == pytest.approx(total / len(tokens), rel=1e-5)
    assert task.metrics({"val": loss})[0]["val_bpb"] == pytest.approx(total / math.log(2) / counts["bytes"], rel=1e-5)


def test_bits_per_byte_of_a_part_count_the_bytes_of_that_part(project):
    """eval_tokens once used the whole split's tokens per byte for a part's loss, and compared it with the whole split's
    floor."""
    task = pretraining(project, batch_size=5, eval_tokens=300)
    labels = [y[y != -100] for _, y in task.validation_sets()["val"]]
    assert 300 <= sum(map(len, labels)) < 300 + 256
    text = task.dataset.tokenizer.decode(torch.cat(labels).tolist())
    per_token = len(text.encode()) / sum(map(len, labels))
    whole = task.dataset.meta["val"]
    assert abs(per_token / (whole["bytes"] / whole["tokens"]) - 1) > 1e-3, "the part should differ from the whole"
    metrics, line = task.metrics({"val": 2.0})
    assert metrics["val_bpb"] == pytest.approx(2 / math.log(2) / per_token, rel=1e-6)
    assert task.floor is None and "floor" not in line


def test_evaluation_alone_needs_no_train_split(project):
    """--eval_only once read all of train.bin, and refused a small one."""
    task = pretraining(project)
    meta = task.dataset.meta | {"train": task.dataset.meta["train"] | {"tokens": 3}}
    task = Pretraining(task.data_cfg, task.cfg, task.model, task.dataset._replace(meta=meta))
    assert math.isfinite(train.evaluate(task.model, task.validation_sets()["val"], CPU, torch.float32))
    with pytest.raises(UserError, match="3 tokens, fewer than block_size=256"):
        task.micro_batches(0)


def test_padding_is_not_counted_as_tokens():
    y = torch.tensor([[-100, 5, 6, -100, -100], [1, -100, 2, 3, 4]])
    assert train.num_tokens(y) == 3 + 5


# ---- optimizers and schedules ----------------------------------------------------------------------------------------


def rates(steps, **settings):
    return [learning_rate(step, TrainConfig(learning_rate=1.0, **settings)) for step in steps]


def test_schedules_warm_up_and_decay():
    cosine = dict(schedule="cosine", min_lr=0.1, warmup_iters=10, max_iters=110)
    assert rates((0, 9, 10, 60, 110), **cosine) == pytest.approx([0.1, 1, 1, 0.55, 0.1])
    wsd = dict(schedule="wsd", max_iters=100, cooldown_frac=0.5)
    assert rates((4, 9, 50, 75, 100), warmup_iters=10, **wsd) == pytest.approx([0.5, 1, 1, 0.5, 0])
    assert rates((4, 9, 50, 75, 100), warmup_iters=0.1, **wsd) == pytest.approx([0.5, 1, 1, 0.5, 0])  # a share


@pytest.mark.parametrize("warmup", [0.05, 30, 500])
@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
def test_the_rate_never_jumps_where_warmup_meets_decay(schedule, warmup):
    """With cooldown_frac=1 the rate once jumped at the end of warmup."""
    steps = rates(range(101), schedule=schedule, warmup_iters=warmup, max_iters=100, cooldown_frac=1)
    jumps = np.abs(np.diff(steps))
    assert jumps.max() <= max(0.21 if warmup < 1 else 1 / warmup, 0.02) + 1e-9 and max(steps) <= 1 and min(steps) >= 0


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_parameter_is_in_one_group_and_norms_never_decay(optimizer):
    model = Gemma(SMALL)
    names = {id(p): name for name, p in model.named_parameters()}
    optimizers = make_optimizers(model, TrainConfig(optimizer=optimizer, weight_decay=0.1))
    groups = [group for o in optimizers for group in o.param_groups]
    assert sorted(names[id(p)] for g in groups for p in g["params"]) == sorted(names.values())
    for group in groups:
        for p in group["params"]:
            decays = "norm" not in names[id(p)] and "embed" not in names[id(p)]
            assert group["weight_decay"] == (0.1 if decays else 0)


def groups_by_optimizer(model):
    """Return the names of the parameters that make_optimizers() gives to Muon, and of those that it gives to AdamW."""
    names = {p: name for name, p in model.named_parameters()}
    optimizers = make_optimizers(model, TrainConfig(optimizer="muon"))
    return [{names[p] for group in o.param_groups for p in group["params"]} for o in optimizers]


def test_muon_gets_the_matrices_inside_blocks_and_never_an_embedding():
    model = Gemma(SMALL)
    model.model.layers[1].gate = torch.nn.Linear(32, 4, bias=False)  # a new matrix
    model.model.layers[1].mix = torch.nn.Parameter(torch.zeros(2))  # a new vector
    matrices, others = groups_by_optimizer(model)
    inside = {name for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2}
    assert matrices == inside and "model.layers.1.gate.weight" in matrices
    assert {"model.embed_tokens.weight", "model.norm.weight", "model.layers.1.mix"} <= others


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("where", ["head", "model.positions", "model.layers.0.mlp.experts"])
def test_a_parameter_that_no_rule_names_is_refused(optimizer, where):
    """A new head once went to Muon, because it is a matrix and is not called embed_tokens."""
    parameter = {
        "head": torch.nn.Linear(32, 448, bias=False),
        "model.positions": torch.nn.Embedding(16, 32),
        "model.layers.0.mlp.experts": torch.nn.ParameterList([torch.zeros(2, 3, 4)]),
    }[where]
    model = Gemma(SMALL)
    parent, _, name = where.rpartition(".")
    model.get_submodule(parent).add_module(name, parameter)
    with pytest.raises(ValueError, match=rf"no rule for {where}\.\w+ \["):
        make_optimizers(model, TrainConfig(optimizer=optimizer))
    parameter.requires_grad_(False)  # a frozen parameter needs no rule
    make_optimizers(model, TrainConfig(optimizer=optimizer))


def one_step(model, optimizers, grad_clip=1.0, x=None):
    """Train the model for one step. Return its loss and gradient norm."""
    x = torch.arange(16)[None] if x is None else x
    loss = train.accumulate_gradients(model, [(x, x)], CPU, torch.float32)
    return train.optimizer_step(optimizers, loss, grad_clip)


def test_muon_and_adamw_equal_those_of_torch(monkeypatch):
    """The rate changes from step to step, and there are wide and tall matrices. Both Muons orthogonalize in bfloat16.
    Its rounding depends on the CPU, and on whether matrices are multiplied one by one or as a stack: updates differed
    by less than 1% on an Intel CPU and by 1.3% on an AMD CPU. So both compute in float64 here, where they agree
    closely."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.double)
    ours, theirs, start = (Gemma(SMALL).init_weights(0).double() for _ in range(3))
    optimizers = make_optimizers(ours, TrainConfig(weight_decay=0.1, momentum=0.9))
    matrices = [p for name, p in theirs.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in theirs.named_parameters() if p.ndim != 2 or "embed" in name]
    oracles = [
        torch.optim.Muon(matrices, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    x = torch.arange(16)[None]
    for step in range(4):
        for optimizer in optimizers + oracles:
            for group in optimizer.param_groups:
                group["lr"] = 0.01 / (1 + step)
        ours.zero_grad()
        train.accumulate_gradients(ours, [(x, x)], CPU, torch.float32)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            q.grad = p.grad.clone()
        for optimizer in optimizers + oracles:
            optimizer.step()
    for p, q, before in zip(ours.parameters(), theirs.parameters(), start.parameters(), strict=True):
        assert (p - q).norm() < 1e-9 * (p - before).norm()


def test_gradients_are_clipped():
    """With plain gradient descent at rate 1 the weights move by the gradient, whose norm is clipped or unchanged."""
    for clip, factor in ((0.0, 1.0), (1e-3, None), (1e9, 1.0)):
        model = Gemma(SMALL).init_weights(0)
        before = torch.cat([p.detach().flatten() for p in model.parameters()])
        _, norm = one_step(model, [torch.optim.SGD(model.parameters(), lr=1.0)], clip)
        moved = (torch.cat([p.detach().flatten() for p in model.parameters()]) - before).norm().item()
        assert norm > 0.1 and moved == pytest.approx(norm * factor if factor else clip, rel=1e-2)


def test_a_group_can_scale_its_learning_rate():
    cfg = TrainConfig(learning_rate=1e-2)
    optimizers = make_optimizers(Gemma(SMALL), cfg)
    optimizers[1].param_groups[0]["lr_scale"] = 0.3
    lr = train.set_learning_rate(optimizers, 0, cfg)
    assert [o.param_groups[0]["lr"] for o in optimizers] == [lr, 0.3 * lr] and lr > 0


def test_accumulation_weighs_labels_not_micro_batches():
    """A mean of means is the classic mistake (transformers 34191). It is another loss if micro-batches have unequal
    numbers of labels. Accumulated micro-batches must give the gradients of one batch."""
    x = torch.randint(0, 400, (4, 24), generator=torch.Generator().manual_seed(0))
    y = torch.where(torch.arange(24) < torch.tensor([[24], [3], [1], [0]]), x.roll(-1, 1), -100)
    gradients = []
    for size in (4, 2, 1):
        model = Gemma(SMALL).init_weights(0)
        micro_batches = [(x[i : i + size], y[i : i + size]) for i in range(0, 4, size)]
        loss = train.accumulate_gradients(model, micro_batches, CPU, torch.float32)
        gradients.append([loss, *(p.grad for p in model.parameters())])
    for other in gradients[1:]:
        for one, two in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_dropout_is_a_function_of_seed_and_step(project, monkeypatch):
    seeds, plain = [], train.accumulate_gradients
    monkeypatch.setattr(
        train, "accumulate_gradients", lambda *args: (seeds.append(torch.initial_seed()), plain(*args))[1]
    )
    for _ in range(2):
        pretrain(project, "dropout", "--max_iters=3", "--dropout=0.1")
    assert len(set(seeds)) == 3 and seeds[:3] == seeds[3:]


def test_the_first_of_several_validation_sets_decides_which_checkpoint_is_best(project, tmp_path, monkeypatch):
    """Each set has its own name in the log and its own bytes per token."""
    task = pretraining(project, batch_size=5)
    task.val_sets["other"] = ValidationSet(task.dataset, 256, 5, eval_tokens=300)
    bytes_per_token = [batches.bytes_per_token for batches in task.val_sets.values()]
    assert bytes_per_token[0] != bytes_per_token[1]
    scripted = {"val": [3.0, 2.0, 2.5], "other": [1.0, 5.0, 0.5]}
    remaining = {id(batches): iter(scripted[name]) for name, batches in task.val_sets.items()}
    monkeypatch.setattr(train, "evaluate", lambda model, batches, *_: next(remaining[id(batches)]))
    cfg = TrainConfig(out_dir=str(tmp_path / "run"), learning_rate=0.01, max_iters=2, eval_interval=1, sample_tokens=2,
                      dtype="float32", device="cpu", compile=False, warmup_iters=0)  # fmt: skip
    saved = []
    save_model, task.cfg = task.save_model, cfg
    task.save_model = lambda path, state: (saved.append(path.name), save_model(path, state))
    fit(task, cfg, new_state(None, {}), CPU)
    evals = [e for e in read_log(tmp_path / "run" / "log.jsonl") if e["event"] == "eval"]
    for name, per_token in zip(scripted, bytes_per_token, strict=True):
        assert [e[f"{name}_loss"] for e in evals] == scripted[name]
        bits = [loss / math.log(2) / per_token for loss in scripted[name]]
        assert [e[f"{name}_bpb"] for e in evals] == pytest.approx(bits, rel=1e-9)
    assert [e["best_val_loss"] for e in evals] == [3.0, 2.0, 2.0]
    assert saved == ["best.part", "last.part", "best.part", "last.part", "last.part"]


# ---- whole runs ------------------------------------------------------------------------------------------------------


def killed_at(monkeypatch, step):
    """Make a run end abruptly at this step."""
    rate = train.learning_rate
    monkeypatch.setattr(train, "learning_rate", lambda at, cfg: sys.exit(9) if at == step else rate(at, cfg))


@pytest.mark.parametrize("args", [["--compile=True"], [], ["--optimizer=adamw", "--dtype=float32", "--dropout=0.1"]])
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(project, monkeypatch, args):
    """Compiled code once summed the embedding's gradient in the order in which threads finished, which varied."""
    name = f"resume{len(args)}"
    whole, _ = pretrain(project, f"{name}-whole", "--max_iters=12", *args)
    flags = ["--dataset=fables", f"--out_dir=out/{name}-killed", *TINY, "--max_iters=12", *args]
    with monkeypatch.context() as patch:  # the checkpoint is of step 5, the log continues to step 8
        killed_at(patch, 8)
        assert run_script(project, "train.py", *flags, ok=False).returncode == 9
    killed = project / "out" / f"{name}-killed"
    assert losses(killed)[-1][0] == 8
    pretrain(project, f"{name}-killed", "--init_from=resume", "--max_iters=12", *args)
    assert losses(killed) == losses(whole)
    assert [step for step, _ in losses(killed)] == list(range(1, 13))
    a, b = ((run / "last" / "model.safetensors").read_bytes() for run in (killed, whole))
    assert a == b
    evals = [[e["val_loss"] for e in read_log(run / "log.jsonl") if e["event"] == "eval"] for run in (killed, whole)]
    assert evals[0] == evals[1] and len(evals[0]) == 4
    if args == ["--compile=True"]:
        plain, _ = pretrain(project, "plain-whole", "--max_iters=12")
        assert [loss for _, loss in losses(whole)] == pytest.approx([loss for _, loss in losses(plain)], rel=3e-3)


def test_a_run_writes_its_files(project):
    run, printed = pretrain(project, "all files", "--max_iters=11", "--learning_rate=0.01")
    assert "python sample.py '--out_dir=out/all files' --start" in printed  # the line can be pasted into a shell
    assert {p.name for p in run.iterdir()} == {
        "best", "last", "log.jsonl", "loss.png", "samples.txt", "summary.json"
    }  # fmt: skip
    entries = read_log(run / "log.jsonl")
    steps = [e for e in entries if e["event"] == "step"]
    evals = [e for e in entries if e["event"] == "eval"]
    assert [e["step"] for e in steps] == list(range(1, 12)) and [e["step"] for e in evals] == [0, 5, 10, 11]
    assert {"tokens", "seconds", "train_loss", "lr", "grad_norm", "tokens_per_sec", "mfu"} <= set(steps[0])
    assert {"tokens", "seconds", "val_loss", "val_bpb", "best_val_loss", "sample"} <= set(evals[0])
    assert evals[-1]["val_loss"] < evals[0]["val_loss"] - 0.3
    assert 0 <= 11 * 4 * 2 * 64 - evals[-1]["tokens"] < 64  # less if the last row of the data is short
    assert (run / "samples.txt").read_text().count("--- step") == 4
    assert "x the entropy floor of" in printed and "tokens/s" in printed and "embedding" in printed
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 11 and summary["metrics"]["val_loss"] == evals[-1]["val_loss"]
    assert summary["settings"]["dataset"] == "fables" and summary["floor_bits_per_byte"] > 0
    # a checkpoint has no prefix of a compiled model (nanoGPT 325)
    from safetensors import safe_open

    names = list(safe_open(run / "best" / "model.safetensors", "pt").keys())
    assert names and all(name.startswith("model.") for name in names)


def test_transformers_opens_a_checkpoint_and_generates_the_same(project):
    run, _ = pretrain(project, "peer", "--max_iters=20", "--learning_rate=0.01")
    peer = AutoModelForCausalLM.from_pretrained(run / "best")
    their_tokenizer = AutoTokenizer.from_pretrained(run / "best")
    tokenizer = Tokenizer.load(run / "best")
    text = "Once upon a time, a fox"
    ids = [tokenizer.eot, *map(int, tokenizer.encode(text))]
    assert their_tokenizer(text).input_ids == ids and their_tokenizer.eos_token_id == tokenizer.eot
    assert peer.generation_config.eos_token_id == tokenizer.eot
    prompt = torch.tensor([ids])
    theirs = peer.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=60, do_sample=False)
    ours = Gemma.from_pretrained(run / "best").eval().generate(prompt, 60, temperature=0, stop_ids=[tokenizer.eot])
    assert theirs[0, len(ids) :].tolist() == [t.item() for t in ours]


def test_a_model_directory_can_be_evaluated_and_trained_further(project):
    run, _ = pretrain(project, "first", "--max_iters=6", "--dtype=float32")
    best = min(e["val_loss"] for e in read_log(run / "log.jsonl") if e["event"] == "eval")
    flags = ["--dataset=fables", f"--init_from={run}/best", *TINY, "--dtype=float32"]
    printed = run_script(project, "train.py", *flags, "--eval_only=True", f"--out_dir={run}").stdout
    assert f"val loss {best:.4f}" in printed and (run / "log.jsonl").exists() and "training:" not in printed
    second, _ = pretrain(project, "second", f"--init_from={run}/best", "--max_iters=1", "--dtype=float32")
    first_eval = next(e for e in read_log(second / "log.jsonl") if e["event"] == "eval")
    assert first_eval["val_loss"] == pytest.approx(best, abs=1e-6)


def test_a_resumed_run_keeps_its_learning_rate(project):
    """By default that is 3e-3 from scratch and 1e-4 from a trained model, whose weights would not survive 3e-3."""
    base, _ = pretrain(project, "rate", "--max_iters=5")
    tuned, _ = pretrain(project, "rate2", f"--init_from={base}/best", "--max_iters=5")
    for run, rate in ((base, 3e-3), (tuned, 1e-4)):
        pretrain(project, run.name, "--init_from=resume", "--max_iters=8", "--cooldown_frac=0")
        assert read_log(run / "log.jsonl")[-2]["lr"] == rate


def test_best_is_the_best_not_the_last(project):
    """nanoGPT overwrites its best loss by a worse one when it keeps every checkpoint."""
    run, _ = pretrain(
        project, "diverging", "--max_iters=10", "--optimizer=adamw", "--learning_rate=3", "--warmup_iters=0"
    )
    evals = [e for e in read_log(run / "log.jsonl") if e["event"] == "eval"]
    losses = [e["val_loss"] for e in evals]
    assert min(losses[1:]) > losses[0], "this run should get worse"
    assert [e["best_val_loss"] for e in evals] == np.minimum.accumulate(losses).tolist()
    printed = run_script(
        project, "train.py", "--dataset=fables", f"--init_from={run}/best", *TINY, "--eval_only=True"
    ).stdout
    assert f"val loss {min(losses):.4f}" in printed


@pytest.mark.slow
def test_compiled_and_plain_training_agree(project):
    plain, _ = pretrain(project, "plain", "--max_iters=3", "--dtype=float32")
    compiled, _ = pretrain(project, "compiled", "--max_iters=3", "--dtype=float32", "--compile=True")
    assert [loss for _, loss in losses(plain)] == pytest.approx([loss for _, loss in losses(compiled)], rel=1e-4)


@pytest.mark.parametrize(
    "args, message",
    [
        (["--dataset=nothing"], "python prepare.py --dataset=nothing"),
        (["--dataset=/no/such/path"], "no such dataset"),
        (["--dataset=a**"], "no such dataset"),
        (["--dataset=a\0b"], "wants str"),
        (["--dataset="], "no such dataset"),
        (["--min_lr=1"], "between 0 and learning_rate"),
        (["--init_from=nowhere"], "no checkpoint in nowhere"),
        (["--init_from=resume", "--out_dir=out/none"], "no checkpoint in out/none/last"),
        (["--init_from=data"], "not a Gemma 3 model directory"),
        (["--vocab_size=128"], "do not fit into vocab_size=128"),
        (["--block_size=1024"], "exceeds max_position_embeddings=512"),
        (["--device=cuda:9"], "--device=cuda:9"),
        (["--device=abc"], "--device=abc"),
        (["--dtype=float16"], "float16 overflows"),
        (["--optimizer=sgd"], "muon or adamw"),
        (["--batch_size=0"], "at least 1"),
        (["--sliding_window=9999"], "larger than"),
        (["--compile=True", "--activation_memory=0.5", "--dropout=0.1"], "needs dropout=0"),
    ],
)
def test_mistakes_end_in_one_line(project, args, message):
    assert message in fails(project, "train.py", "--dataset=fables", *TINY, *args)


def test_wandb_that_is_not_installed_is_named(project):
    if importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed here")
    flags = ["--dataset=fables", "--out_dir=out/wandb", *TINY, "--wandb=True"]
    assert "pip install wandb" in fails(project, "train.py", *flags)
