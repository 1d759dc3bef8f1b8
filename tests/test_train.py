import contextlib
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, copy_project, fails, losses, run_script
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from config import UserError
from model import Gemma, GemmaConfig
from train import (
    Dataset,
    PackedDataset,
    PretrainConfig,
    Pretraining,
    TrainConfig,
    epoch_shuffled_indices,
    learning_rate,
    make_optimizers,
    read_log,
    write_checkpoint,
)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project with 400 fables prepared in it. Tests write to runs of their own."""
    path = copy_project(tmp_path_factory.mktemp("project"))
    run_script(
        path, "prepare.py", "--dataset=fables", "--max_documents=400", "--val_fraction=0.05", "--tokenizer=bpe:400"
    )
    return path


SMALL = GemmaConfig(vocab_size=448, hidden_size=32, num_hidden_layers=2, head_dim=16, intermediate_size=64)
CPU = torch.device("cpu")


def pretrain(project, out, *args):
    """A tiny run into out/<out> -> its folder and what it printed."""
    result = run_script(project, "train.py", "--dataset=fables", f"--out_dir=out/{out}", *TINY, *args)
    return project / "out" / out, result.stdout


# ----------------------------------------------------------------------------------------------------------------------
# data


def make_rows(tmp_path, lengths, block_size, eot=0):
    """A dataset of documents of these lengths (end-of-text included), whose tokens are all different."""
    tokens, next_id = [], 1
    for n in lengths:
        tokens += [*range(next_id, next_id + n - 1), eot]
        next_id += n - 1
    np.array(tokens, dtype=np.uint16).tofile(tmp_path / "train.bin")
    return PackedDataset(
        tmp_path, {"dtype": "uint16"}, "train", block_size, SimpleNamespace(eot=eot, bos=eot, vocab_size=2**16)
    ), tokens


@pytest.mark.parametrize("block_size", [4, 10, 33, 500])
def test_each_token_is_a_target_once_with_its_document_before_it(tmp_path, block_size):
    lengths = np.random.default_rng(0).integers(1, 25, 60).tolist()
    rows, tokens = make_rows(tmp_path, lengths, block_size)
    x, y = rows.batch(range(len(rows)), new_only=True)
    assert y[y != -100].tolist() == tokens
    x, y = rows.batch(range(len(rows)))
    assert (x[:, 1:][y[:, :-1] != -100] == y[:, :-1][y[:, :-1] != -100]).all()
    starts = {0, *(np.flatnonzero(np.array(tokens) == 0) + 1).tolist()}
    position = {token: i for i, token in enumerate(tokens) if token}
    for inputs, targets in zip(x.tolist(), y.tolist(), strict=True):
        first = position.get(targets[0])
        if first is not None and first in starts:
            assert inputs[0] == 0  # the end-of-text before the document
        elif first is not None:
            assert inputs[0] == tokens[first - 1]  # a document longer than a row goes on
            assert max(lengths) > block_size


def test_every_whole_document_that_fits_stands_in_one_row(tmp_path):
    rows, tokens = make_rows(tmp_path, [7, 9, 3, 20, 5, 5, 5, 11], 20)
    _, y = rows.batch(range(len(rows)))
    shown = [",".join(map(str, row)) for row in y.tolist()]
    at = 0
    for n in [7, 9, 3, 20, 5, 5, 5, 11]:
        assert any(",".join(map(str, tokens[at : at + n])) in row for row in shown)
        at += n


def test_batches_are_a_permutation_every_epoch_and_a_function_of_seed_and_step():
    """nanoGPT samples with replacement (294) and replays its data on resume (467)."""
    seen = [i for step in range(30) for i in epoch_shuffled_indices(35, 14, 3, step).tolist()]
    epochs = [seen[i : i + 35] for i in range(0, len(seen), 35)]
    assert len(epochs) == 12 and all(sorted(epoch) == list(range(35)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert epoch_shuffled_indices(35, 14, 3, 7).tolist() == seen[7 * 14 : 8 * 14]
    assert epoch_shuffled_indices(35, 14, 4, 7).tolist() != seen[7 * 14 : 8 * 14]
    assert epoch_shuffled_indices(5, 14, 3, 0).tolist()[:10] != [0, 1, 2, 3, 4] * 2  # an update of several epochs
    assert sorted(epoch_shuffled_indices(5, 10, 3, 0)) == sorted([0, 1, 2, 3, 4] * 2)


def pretraining(project, **settings):
    path = project / "data" / "fables"
    dataset = Dataset(path, json.loads((path / "meta.json").read_text()), train.Tokenizer.load(path))
    cfg = TrainConfig(gradient_accumulation_steps=settings.pop("gradient_accumulation_steps", 1), seed=3)
    return Pretraining(PretrainConfig(block_size=256, **settings), cfg, Gemma(SMALL).init_weights(0), dataset)


def test_how_an_update_is_cut_into_micro_batches_does_not_change_it(project):
    one = pretraining(project, batch_size=6).micro_batches(4)
    three = pretraining(project, batch_size=2, gradient_accumulation_steps=3).micro_batches(4)
    assert len(one) == 1 and len(three) == 3
    for i in (0, 1):
        assert torch.equal(one[0][i], torch.cat([batch[i] for batch in three]))


def test_evaluation_is_the_mean_over_all_tokens(project):
    task = pretraining(project, batch_size=5)
    loss = train.evaluate(task.model, task.validation_batches(), CPU, torch.float32)
    assert task.model.training
    tokens = np.fromfile(project / "data" / "fables" / "val.bin", dtype=np.uint16)
    counts = task.dataset.meta["val"]
    assert sum(int((y != -100).sum()) for _, y in task.validation_batches()) == len(tokens) == counts["tokens"]
    task.model.eval()
    total = 0.0  # the same by hand, a row at a time
    for i in range(len(task.val_rows)):
        x, y = task.val_rows.batch([i], new_only=True)
        with torch.no_grad():
            logp = task.model(x)[0].double().log_softmax(-1)
        total -= sum(logp[t, y[0, t]].item() for t in range(y.shape[1]) if y[0, t] != -100)
    assert loss == pytest.approx(total / len(tokens), rel=1e-5)
    assert task.metrics(loss)[0]["val_bpb"] == pytest.approx(total / math.log(2) / counts["bytes"], rel=1e-5)


def test_bits_per_byte_of_a_part_count_the_bytes_of_that_part(project):
    """eval_tokens once multiplied a part's loss by the whole split's tokens per byte, and held it against its floor."""
    task = pretraining(project, batch_size=5, eval_tokens=300)
    targets = [y[y != -100] for _, y in task.validation_batches()]
    assert 300 <= sum(map(len, targets)) < 300 + 256
    text = task.dataset.tokenizer.decode(torch.cat(targets).tolist())
    per_token = len(text.encode()) / sum(map(len, targets))
    whole = task.dataset.meta["val"]
    assert abs(per_token / (whole["bytes"] / whole["tokens"]) - 1) > 1e-3, "the part should differ from the whole"
    metrics, line = task.metrics(2.0)
    assert metrics["val_bpb"] == pytest.approx(2 / math.log(2) / per_token, rel=1e-6)
    assert task.floor is None and "floor" not in line


def test_judging_alone_needs_no_train_split(project, tmp_path):
    """--eval_only and lora.py's --forgetting once read all of train.bin, and refused a small one."""
    task = pretraining(project)
    meta = task.dataset.meta | {"train": task.dataset.meta["train"] | {"tokens": 3}}
    task = Pretraining(task.data_cfg, task.cfg, task.model, task.dataset._replace(meta=meta))
    assert math.isfinite(train.evaluate(task.model, task.validation_batches(), CPU, torch.float32))
    with pytest.raises(train.UserError, match="3 tokens, fewer than block_size=256"):
        task.micro_batches(0)


def test_padding_is_no_token():
    y = torch.tensor([[-100, 5, 6, -100, -100], [1, -100, 2, 3, 4]])
    assert train.num_tokens(y) == 3 + 5


# ----------------------------------------------------------------------------------------------------------------------
# optimizer and schedule


def rates(steps, **settings):
    return [learning_rate(step, TrainConfig(learning_rate=1.0, **settings)) for step in steps]


def test_schedules():
    cosine = dict(schedule="cosine", min_lr=0.1, warmup_iters=10, max_iters=110)
    assert rates((0, 9, 10, 60, 110), **cosine) == pytest.approx([0.1, 1, 1, 0.55, 0.1])
    wsd = dict(schedule="wsd", max_iters=100, cooldown_frac=0.5)
    assert rates((4, 9, 50, 75, 100), warmup_iters=10, **wsd) == pytest.approx([0.5, 1, 1, 0.5, 0])
    assert rates((4, 9, 50, 75, 100), warmup_iters=0.1, **wsd) == pytest.approx([0.5, 1, 1, 0.5, 0])  # a share


@pytest.mark.parametrize("warmup", [0.05, 30, 500])
@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
def test_warmup_and_cooldown_compose(schedule, warmup):
    """With cooldown_frac=1 the rate once jumped where warmup ended."""
    steps = rates(range(101), schedule=schedule, warmup_iters=warmup, max_iters=100, cooldown_frac=1)
    jumps = np.abs(np.diff(steps))
    assert jumps.max() <= max(0.21 if warmup < 1 else 1 / warmup, 0.02) + 1e-9 and max(steps) <= 1 and min(steps) >= 0


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_parameter_in_one_group_and_norms_never_decay(optimizer):
    model = Gemma(SMALL)
    names = {id(p): name for name, p in model.named_parameters()}
    optimizers = make_optimizers(model, TrainConfig(optimizer=optimizer, weight_decay=0.1))
    groups = [group for o in optimizers for group in o.param_groups]
    assert sorted(names[id(p)] for g in groups for p in g["params"]) == sorted(names.values())
    for group in groups:
        for p in group["params"]:
            decays = "norm" not in names[id(p)] and "embed" not in names[id(p)]
            assert group["weight_decay"] == (0.1 if decays else 0)


def test_a_resumed_run_trains_with_its_own_settings():
    """load_state_dict alone would bring back those of the checkpoint, while we say that they have changed."""
    model = Gemma(SMALL).init_weights(0)
    before = make_optimizers(model, TrainConfig())
    update(model, before)
    after = make_optimizers(model, TrainConfig(weight_decay=0.1, momentum=0.5, beta1=0.6))
    train.load_optimizer_state(after, model, train.optimizer_state(before, model), sharded=False)
    assert after[0].param_groups[0]["weight_decay"] == 0.1 and after[0].param_groups[0]["momentum"] == 0.5
    assert after[1].param_groups[0]["betas"] == (0.6, 0.95)
    for old, new in zip(before, after, strict=True):
        assert len(old.state) == len(new.state) > 0
        for p, values in old.state.items():
            assert all(torch.equal(values[key], new.state[p][key]) for key in values)


def update(model, optimizers, grad_clip=1.0, x=None):
    x = torch.arange(16)[None] if x is None else x
    loss = train.accumulate_gradients(model, [(x, x)], CPU, torch.float32)
    return train.optimizer_step(optimizers, loss, grad_clip)


def test_muon_and_adamw_are_those_of_torch(monkeypatch):
    """Over steps whose rate changes, with wide and tall matrices. Both Muons orthogonalize in bfloat16, where rounding
    depends on the CPU and on whether matrices are multiplied one by one or as a stack: their updates differed by less
    than 1% on an Intel CPU and by 1.3% on an AMD one. So both compute in float64 here, where they agree closely."""
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
    """With plain gradient descent the step is the gradient: its length is the clip, or that of the gradient itself."""
    for clip, factor in ((0.0, 1.0), (1e-3, None), (1e9, 1.0)):
        model = Gemma(SMALL).init_weights(0)
        before = torch.cat([p.detach().flatten() for p in model.parameters()])
        _, norm = update(model, [torch.optim.SGD(model.parameters(), lr=1.0)], clip)
        moved = (torch.cat([p.detach().flatten() for p in model.parameters()]) - before).norm().item()
        assert norm > 0.1 and moved == pytest.approx(norm * factor if factor else clip, rel=1e-2)


def test_a_group_has_a_rate_of_its_own():
    trainer = train.Trainer(SimpleNamespace(cfg=TrainConfig(compile=False), model=Gemma(SMALL)), device=CPU)
    trainer.optimizers[1].param_groups[0]["lr_scale"] = 0.3
    lr = trainer.set_learning_rate()
    assert [o.param_groups[0]["lr"] for o in trainer.optimizers] == [lr, 0.3 * lr] and lr > 0


def test_a_trained_model_is_not_trained_at_a_rate_from_scratch(project):
    """A published model's weights did not survive the default rate of a run from scratch."""
    assert train.Trainer(SimpleNamespace(cfg=TrainConfig(compile=False), model=Gemma(SMALL))).cfg.learning_rate == 3e-3
    cfg = TrainConfig(compile=False, init_from="out/x/best")
    assert train.Trainer(SimpleNamespace(cfg=cfg, model=Gemma(SMALL))).cfg.learning_rate == 1e-4


def test_accumulation_weighs_targets_not_micro_batches():
    """Mean of means is the classic mistake (transformers 34191): with unequal masks it differs. Accumulated
    micro-batches must give the gradients of one batch of all."""
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


def test_dropout_differs_from_update_to_update(project, monkeypatch):
    seeds, plain = [], train.accumulate_gradients
    monkeypatch.setattr(
        train, "accumulate_gradients", lambda *args: (seeds.append(torch.initial_seed()), plain(*args))[1]
    )
    for _ in range(2):
        pretrain(project, "dropout", "--max_iters=3", "--dropout=0.1")
    assert len(set(seeds)) == 3 and seeds[:3] == seeds[3:], "a function of seed and step"


# ----------------------------------------------------------------------------------------------------------------------
# whole runs


def killed_at(monkeypatch, step):
    """Make a run end abruptly when it comes to this step."""
    rate = train.learning_rate
    monkeypatch.setattr(train, "learning_rate", lambda at, cfg: sys.exit(9) if at == step else rate(at, cfg))


@pytest.mark.parametrize("args", [["--compile=True"], [], ["--optimizer=adamw", "--dtype=float32", "--dropout=0.1"]])
def test_a_resumed_run_is_the_undisturbed_one_to_the_bit(project, monkeypatch, args):
    """Compiled code once added up the embedding's gradient in whatever order threads finished, and was not exact."""
    name = f"resume{len(args)}"
    whole, _ = pretrain(project, f"{name}-whole", "--max_iters=12", *args)
    flags = ["--dataset=fables", f"--out_dir=out/{name}-killed", *TINY, "--max_iters=12", *args]
    with monkeypatch.context() as patch:  # the checkpoint is of update 5, the log goes on
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


def test_what_a_run_writes(project):
    run, printed = pretrain(project, "all files", "--max_iters=11", "--learning_rate=0.01")
    assert "python sample.py '--out_dir=out/all files' --start" in printed  # to be copied as it stands
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
    assert 0 <= 11 * 4 * 2 * 64 - evals[-1]["tokens"] < 64  # less where the last row of the data is short
    assert (run / "samples.txt").read_text().count("--- update") == 4
    assert "x the entropy floor of" in printed and "tokens/s" in printed and "embedding" in printed
    summary = json.loads((run / "summary.json").read_text())
    assert summary["updates"] == 11 and summary["metrics"]["val_loss"] == evals[-1]["val_loss"]
    assert summary["settings"]["dataset"] == "fables" and summary["floor_bits_per_byte"] > 0
    # no prefix of a compiled model in a checkpoint (nanoGPT 325)
    from safetensors import safe_open

    names = list(safe_open(run / "best" / "model.safetensors", "pt").keys())
    assert names and all(name.startswith("model.") for name in names)


def test_transformers_opens_a_checkpoint_and_writes_the_same(project):
    run, _ = pretrain(project, "peer", "--max_iters=20", "--learning_rate=0.01")
    peer = AutoModelForCausalLM.from_pretrained(run / "best")
    words = AutoTokenizer.from_pretrained(run / "best")
    tokenizer = train.Tokenizer.load(run / "best")
    text = "Once upon a time, a fox"
    ids = [tokenizer.eot, *map(int, tokenizer.encode(text))]
    assert words(text).input_ids == ids and words.eos_token_id == tokenizer.eot
    assert peer.generation_config.eos_token_id == tokenizer.eot
    prompt = torch.tensor([ids])
    theirs = peer.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=60, do_sample=False)
    ours = Gemma.from_pretrained(run / "best").eval().generate(prompt, 60, temperature=0, stop_ids=[tokenizer.eot])
    assert theirs[0, len(ids) :].tolist() == [t.item() for t in ours]


def test_eval_only_and_init_from_a_directory(project):
    run, _ = pretrain(project, "first", "--max_iters=6", "--dtype=float32")
    best = min(e["val_loss"] for e in read_log(run / "log.jsonl") if e["event"] == "eval")
    flags = ["--dataset=fables", f"--init_from={run}/best", *TINY, "--dtype=float32"]
    how = ["--eval_only=True", f"--out_dir={run}", "--max_minutes=9"]  # moves nothing, plans nothing
    printed = run_script(project, "train.py", *flags, *how).stdout
    assert f"val loss {best:.4f}" in printed and (run / "log.jsonl").exists() and "max_minutes" not in printed
    second, _ = pretrain(project, "second", f"--init_from={run}/best", "--max_iters=1", "--dtype=float32")
    first_eval = next(e for e in read_log(second / "log.jsonl") if e["event"] == "eval")
    assert first_eval["val_loss"] == pytest.approx(best, abs=1e-6)


def test_a_new_run_moves_an_old_one_aside(project):
    run, _ = pretrain(project, "twice", "--max_iters=1")
    before = (run / "log.jsonl").read_text()
    pretrain(project, "twice", "--max_iters=2")
    (aside,) = (project / "out").glob("twice-*")
    assert (aside / "log.jsonl").read_text() == before


def test_only_runs_are_moved_aside(project):
    """train.py once renamed whatever folder --out_dir named: a mounted volume, a link to another disk, data/."""
    run, _ = pretrain(project, "base", "--max_iters=1")
    (project / "photos").mkdir()
    (project / "photos" / "a.jpg").write_text("a picture")
    (project / "link").symlink_to(run)
    os.mkdir(project / "empty")
    before = sorted(project.rglob("*"))
    flags = ["train.py", "--dataset=fables", *TINY, "--max_iters=1"]
    for out_dir, message, *more in (
        ("photos", "no run of ours"),
        ("data", "no run of ours"),
        (".", "no run of ours"),
        ("photos/a.jpg", "no run of ours"),
        ("link", "can't be moved aside"),
        ("out/base", "contains the model to start from", "--init_from=out/base/best"),
        ("a\0b", "wants str"),
    ):
        assert message in fails(project, *flags, f"--out_dir={out_dir}", *more)
    assert sorted(project.rglob("*")) == before and (project / "link").is_symlink()
    run_script(project, *flags, "--out_dir=empty")
    assert (project / "empty" / "last").exists() and not list(project.glob("empty-*"))


def test_the_rate_of_a_resumed_run_is_its_own(project):
    """Not given, it is that of the run, whether that began from scratch or from a model."""
    base, _ = pretrain(project, "rate", "--max_iters=5")
    tuned, _ = pretrain(project, "rate2", f"--init_from={base}/best", "--max_iters=5")
    for run, rate in ((base, 3e-3), (tuned, 1e-4)):
        pretrain(project, run.name, "--init_from=resume", "--max_iters=8", "--cooldown_frac=0")
        assert read_log(run / "log.jsonl")[-2]["lr"] == rate


def test_minutes_become_a_number_of_updates_that_repeats_and_resumes_the_run(project):
    run, printed = pretrain(project, "minutes", "--max_minutes=0.02", "--eval_interval=1000")
    count = json.loads((run / "summary.json").read_text())["updates"]
    assert f"--max_iters={count} repeats them" in printed and 5 < count < 1000
    again, _ = pretrain(project, "repeated", f"--max_iters={count}", "--eval_interval=1000")
    assert (run / "best/model.safetensors").read_bytes() == (again / "best/model.safetensors").read_bytes()
    _, printed = pretrain(project, "minutes", "--max_minutes=0.02", "--init_from=resume")
    assert f"{count:,} updates" in printed and "max_iters" not in printed.replace(f"--max_iters={count}", "")
    flags = ["--dataset=fables", "--out_dir=out/minutes", *TINY, "--init_from=resume", "--max_minutes=1"]
    assert f"planned for {count} updates; for more, name --max_iters" in fails(project, "train.py", *flags)
    pretrain(project, "minutes", f"--max_iters={count + 2}", "--max_minutes=0", "--init_from=resume")
    settings = json.loads((run / "summary.json").read_text())["settings"]
    assert (settings["init_from"], settings["max_iters"]) == ("scratch", count + 2)


@pytest.mark.parametrize("job, init_from", [("this", "resume"), ("an older", "scratch")])
def test_a_restart_goes_on_with_its_own_run_alone(tmp_path, monkeypatch, job, init_from):
    """One that failed before its first checkpoint once took the run of before for its own, and was done at once."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "this")
    (tmp_path / "last").mkdir()
    (tmp_path / ".job").write_text(job)
    assert train.resolve_out_dir(train.TrainConfig(out_dir=str(tmp_path))).init_from == init_from


def test_runs_are_compared(project):
    for name in "ab":
        pretrain(project, name, "--max_iters=5", "--learning_rate=0.01")
    printed = run_script(project, "train.py", "--compare=out/a,out/b").stdout
    assert printed.count("bits per byte after 5 updates") == 2 and (project / "out/compare.png").stat().st_size > 10_000
    assert "no evaluation" in run_script(project, "train.py", "--compare=out/a,out/none", ok=False).stderr


def test_runs_of_two_kinds_are_not_compared(tmp_path):
    """Bits per byte and nats per token were once drawn on one axis."""
    for name, loss in (("pretrained", {"val_loss": 1.0, "val_bpb": 0.4}), ("tuned", {"val_loss": 1.0})):
        entry = {"event": "eval", "step": 0, "tokens": 0, "seconds": 0.0, "sample": "", **loss}
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_text(json.dumps(entry) + "\n")
    with pytest.raises(UserError, match="name one kind"):
        train.compare_runs([tmp_path / "pretrained", tmp_path / "tuned"])


def test_in_a_terminal_progress_stays_on_one_line(project):
    pty = pytest.importorskip("pty")
    terminal, side = pty.openpty()
    flags = ["--dataset=fables", "--out_dir=out/terminal", *TINY, "--max_iters=3", "--eval_interval=1000"]
    process = subprocess.Popen([sys.executable, "train.py", *flags], cwd=project, stdout=side)
    os.close(side)
    shown = b""
    with contextlib.suppress(OSError):  # the other side is closed
        while piece := os.read(terminal, 4096):
            shown += piece
    assert process.wait() == 0
    assert re.search(rb"\x1b\[Kupdate +1/3: [^\n]*\r\x1b\[Kupdate +2/3: [^\n]*\r\x1b\[Kupdate +3/3: ", shown), shown


def test_best_is_the_best_not_the_last(project):
    """nanoGPT overwrites its best loss by a worse one when it keeps every checkpoint."""
    run, _ = pretrain(
        project, "diverging", "--max_iters=10", "--optimizer=adamw", "--learning_rate=3", "--warmup_iters=0"
    )
    evals = [e for e in read_log(run / "log.jsonl") if e["event"] == "eval"]
    losses = [e["val_loss"] for e in evals]
    assert min(losses[1:]) > losses[0], "the run was to get worse"
    assert [e["best_val_loss"] for e in evals] == np.minimum.accumulate(losses).tolist()
    printed = run_script(
        project, "train.py", "--dataset=fables", f"--init_from={run}/best", *TINY, "--eval_only=True"
    ).stdout
    assert f"val loss {min(losses):.4f}" in printed


@pytest.mark.parametrize("fatal", [1, 2])
def test_a_save_cut_off_in_the_middle_leaves_a_whole_checkpoint(tmp_path, monkeypatch, fatal):
    """Whichever rename of the swap is the last thing that happens."""
    config = GemmaConfig(vocab_size=448, hidden_size=32, num_hidden_layers=1, head_dim=16, intermediate_size=64)
    old, new = Gemma(config).init_weights(1), Gemma(config).init_weights(2)
    write_checkpoint(tmp_path / "last", old.save_pretrained, old.state_dict())
    rename, calls = os.replace, []

    def dies(*args):
        calls.append(args)
        if len(calls) == fatal:
            raise KeyboardInterrupt
        rename(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dies)
        with pytest.raises(KeyboardInterrupt):
            write_checkpoint(tmp_path / "last", new.save_pretrained, new.state_dict())

    def weights():
        return list(train.open_model(tmp_path / "last", "cpu").parameters())

    assert all(torch.equal(a, b) for a, b in zip(weights(), old.parameters(), strict=True))
    write_checkpoint(tmp_path / "last", new.save_pretrained, new.state_dict())  # and the next save goes through
    assert all(torch.equal(a, b) for a, b in zip(weights(), new.parameters(), strict=True))


@pytest.mark.slow
def test_compiled_and_plain_training_agree(project):
    plain, _ = pretrain(project, "plain", "--max_iters=3", "--dtype=float32")
    compiled, _ = pretrain(project, "compiled", "--max_iters=3", "--dtype=float32", "--compile=True")
    assert [loss for _, loss in losses(plain)] == pytest.approx([loss for _, loss in losses(compiled)], rel=1e-4)


def test_a_dataset_is_found_where_a_crash_left_it(project, monkeypatch, tmp_path):
    shutil.copytree(project / "data" / "fables", tmp_path / "fables.replaced")  # by a crash between two renames
    monkeypatch.setattr(train, "DATA", tmp_path)
    assert train.open_dataset("fables").path.name == "fables.replaced"
    with pytest.raises(train.UserError, match="--dataset=fab: no such set"):
        train.open_dataset("fab")


@pytest.mark.parametrize(
    "args, message",
    [
        (["--dataset=nothing"], "python prepare.py --dataset=nothing"),
        (["--dataset=/no/such/path"], "no such set"),
        (["--dataset=a**"], "no such set"),
        (["--dataset=a\0b"], "wants str"),
        (["--dataset="], "no such set"),
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


def test_a_mirror_that_is_not_installed_says_how_to_get_it(project):
    if importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed here")
    flags = ["--dataset=fables", "--out_dir=out/wandb", *TINY, "--wandb=True"]
    assert "pip install wandb" in fails(project, "train.py", *flags)
