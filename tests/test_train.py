import importlib.util
import json
import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, copy_project, fails, losses, run_script
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from model import Gemma, GemmaConfig
from train import (
    PretrainConfig,
    Pretraining,
    Rows,
    TrainConfig,
    bits_per_byte,
    deal,
    learning_rate,
    make_optimizers,
    read_log,
    save_checkpoint,
)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project with 400 fables prepared in it. Tests write to runs of their own."""
    path = copy_project(tmp_path_factory.mktemp("project"))
    run_script(
        path, "prepare.py", "--dataset=fables", "--max_documents=400", "--val_fraction=0.05", "--tokenizer=bpe:400"
    )
    return path


def pretrain(project, out, *args):
    """A tiny run into out/<out> -> its folder and what it printed."""
    result = run_script(project, "train.py", "--dataset=fables", f"--out_dir=out/{out}", *TINY, *args)
    return project / "out" / out, result.stdout


# ----------------------------------------------------------------------------------------------------------------------
# data


def make_rows(tmp_path, lengths, block_size, eot=0):
    """Rows over documents of these lengths (end-of-text included), whose tokens are all different."""
    tokens, next_id = [], 1
    for n in lengths:
        tokens += [*range(next_id, next_id + n - 1), eot]
        next_id += n - 1
    np.array(tokens, dtype=np.uint16).tofile(tmp_path / "train.bin")
    return Rows(
        tmp_path, {"dtype": "uint16"}, "train", block_size, SimpleNamespace(eot=eot, bos=eot, vocab_size=2**16)
    ), tokens


@pytest.mark.parametrize("block_size", [4, 10, 33, 500])
def test_each_token_is_a_target_once_with_its_document_before_it(tmp_path, block_size):
    lengths = np.random.default_rng(0).integers(1, 25, 60).tolist()
    rows, tokens = make_rows(tmp_path, lengths, block_size)
    x, y = rows.batch(range(len(rows)), fresh_only=True)
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
    seen = [i for step in range(30) for i in deal(35, 14, 3, step).tolist()]
    epochs = [seen[i : i + 35] for i in range(0, len(seen), 35)]
    assert len(epochs) == 12 and all(sorted(epoch) == list(range(35)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert deal(35, 14, 3, 7).tolist() == seen[7 * 14 : 8 * 14]
    assert deal(35, 14, 4, 7).tolist() != seen[7 * 14 : 8 * 14]
    assert deal(5, 14, 3, 0).tolist()[:10] != [0, 1, 2, 3, 4] * 2  # an update of several epochs
    assert sorted(deal(5, 10, 3, 0)) == sorted([0, 1, 2, 3, 4] * 2)


def pretraining(project, **settings):
    path = project / "data" / "fables"
    meta = json.loads((path / "meta.json").read_text())
    config = GemmaConfig(vocab_size=448, hidden_size=32, num_hidden_layers=2, head_dim=16, intermediate_size=64)
    loop = TrainConfig(gradient_accumulation_steps=settings.pop("gradient_accumulation_steps", 1), seed=3)
    cfg = PretrainConfig(block_size=256, **settings)
    return Pretraining(cfg, loop, Gemma(config).init_weights(0), train.Tokenizer.load(path), path, meta)


def test_how_an_update_is_cut_into_micro_batches_does_not_change_it(project):
    one = pretraining(project, batch_size=6).updates(4)
    three = pretraining(project, batch_size=2, gradient_accumulation_steps=3).updates(4)
    assert len(one) == 1 and len(three) == 3
    for i in (0, 1):
        assert torch.equal(one[0][i], torch.cat([batch[i] for batch in three]))


def test_evaluation_is_the_mean_over_all_tokens(project):
    task = pretraining(project, batch_size=5)
    loss = train.evaluate(task.model, task.validation(), torch.device("cpu"), torch.float32)
    assert task.model.training
    tokens = np.fromfile(project / "data" / "fables" / "val.bin", dtype=np.uint16)
    assert sum(int((y != -100).sum()) for _, y in task.validation()) == len(tokens) == task.meta["val"]["tokens"]
    few = pretraining(project, batch_size=5, eval_tokens=300).validation()
    assert 300 <= sum(int((y != -100).sum()) for _, y in few) < 300 + 256
    task.model.eval()
    total = 0.0  # the same by hand, a row at a time
    for i in range(len(task.val_rows)):
        x, y = task.val_rows.batch([i], fresh_only=True)
        with torch.no_grad():
            logp = task.model(x)[0].double().log_softmax(-1)
        total -= sum(logp[t, y[0, t]].item() for t in range(y.shape[1]) if y[0, t] != -100)
    assert loss == pytest.approx(total / len(tokens), rel=1e-5)
    assert bits_per_byte(loss, task.meta["val"]) == pytest.approx(
        total / math.log(2) / task.meta["val"]["bytes"], rel=1e-5
    )


# ----------------------------------------------------------------------------------------------------------------------
# optimizer and schedule


def test_schedules():
    cosine = TrainConfig(decay="cosine", learning_rate=1.0, min_lr=0.1, warmup_iters=10, max_iters=110)
    assert [learning_rate(s, cosine) for s in (0, 9, 10, 60, 110)] == pytest.approx([0.1, 1, 1, 0.55, 0.1])
    linear = TrainConfig(decay="linear", learning_rate=1.0, warmup_iters=10, max_iters=100, cooldown_frac=0.5)
    assert [learning_rate(s, linear) for s in (4, 9, 50, 75, 100)] == pytest.approx([0.5, 1, 1, 0.5, 0])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_parameter_in_one_group_and_norms_never_decay(optimizer):
    model = Gemma(GemmaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, head_dim=16, intermediate_size=64))
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
    model = Gemma(GemmaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, head_dim=16, intermediate_size=64))
    x = torch.arange(16)[None]
    before = make_optimizers(model, TrainConfig())
    train.update(model, [(x, x)], before, TrainConfig(), torch.device("cpu"), torch.float32)
    after = make_optimizers(model, TrainConfig(weight_decay=0.1, momentum=0.5, beta1=0.6))
    train.resume_optimizers(after, [optimizer.state_dict() for optimizer in before])
    assert after[0].param_groups[0]["weight_decay"] == 0.1 and after[0].param_groups[0]["momentum"] == 0.5
    assert after[1].param_groups[0]["betas"] == (0.6, 0.95)
    for old, new in zip(before, after, strict=True):
        assert len(old.state) == len(new.state) > 0
        for p, values in old.state.items():
            assert all(torch.equal(values[key], new.state[p][key]) for key in values)


def test_accumulation_weighs_targets_not_micro_batches(project):
    """Mean of means is the classic mistake (transformers 34191): with unequal masks it differs. Two accumulated
    micro-batches must train like one batch of both."""
    one, _ = pretrain(
        project, "acc1", "--batch_size=8", "--gradient_accumulation_steps=1", "--max_iters=4", "--dtype=float32"
    )
    two, _ = pretrain(
        project, "acc2", "--batch_size=2", "--gradient_accumulation_steps=4", "--max_iters=4", "--dtype=float32"
    )
    assert [loss for _, loss in losses(one)] == pytest.approx([loss for _, loss in losses(two)], rel=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# whole runs


@pytest.mark.parametrize("args", [["--compile=True"], [], ["--optimizer=adamw", "--dtype=float32", "--dropout=0.1"]])
def test_a_resumed_run_is_the_undisturbed_one_to_the_bit(project, args):
    """Compiled code once added up the embedding's gradient in whatever order threads finished, and was not exact."""
    name = f"resume{len(args)}"
    whole, _ = pretrain(project, f"{name}-whole", "--max_iters=12", *args)
    halves, _ = pretrain(project, f"{name}-halves", "--max_iters=12", *args)
    # as if killed during update 8: the checkpoint is of update 5, the log went on
    pretrain(project, f"{name}-killed", "--max_iters=12", *args)
    killed = project / "out" / f"{name}-killed"
    code = (
        "import train, sys\nfrom config import configure\nfrom model import GemmaConfig\n"
        "settings = configure([train.PretrainConfig, train.TrainConfig, GemmaConfig], sys.argv[1:])\n"
        "rate = train.learning_rate\n"
        "def stop(step, cfg):\n    if step == 8: sys.exit(9)\n    return rate(step, cfg)\n"
        "train.learning_rate = stop\ntrain.main(*settings)\n"
    )
    (project / "killer.py").write_text(code)
    flags = ["--dataset=fables", f"--out_dir=out/{name}-killed", *TINY, "--max_iters=12", *args]
    assert run_script(project, "killer.py", *flags, ok=False).returncode == 9
    assert losses(killed)[-1][0] == 8
    pretrain(project, f"{name}-killed", "--init_from=resume", "--max_iters=12", *args)
    assert losses(killed) == losses(whole) == losses(halves)
    assert [step for step, _ in losses(killed)] == list(range(1, 13))
    a, b = ((run / "last" / "model.safetensors").read_bytes() for run in (killed, whole))
    assert a == b
    evals = [[e["val_loss"] for e in read_log(run / "log.jsonl") if e["event"] == "eval"] for run in (killed, whole)]
    assert evals[0] == evals[1] and len(evals[0]) == 4


def test_what_a_run_writes(project):
    run, printed = pretrain(project, "files", "--max_iters=11", "--learning_rate=0.01")
    assert {p.name for p in run.iterdir()} == {"best", "last", "log.jsonl", "loss.png", "samples.txt"}
    entries = read_log(run / "log.jsonl")
    steps = [e for e in entries if e["event"] == "step"]
    evals = [e for e in entries if e["event"] == "eval"]
    assert [e["step"] for e in steps] == list(range(1, 12)) and [e["step"] for e in evals] == [0, 5, 10, 11]
    assert set(steps[0]) == {
        "event",
        "step",
        "tokens",
        "seconds",
        "train_loss",
        "lr",
        "grad_norm",
        "tokens_per_sec",
        "mfu",
    }
    assert set(evals[0]) == {"event", "step", "tokens", "seconds", "val_loss", "val_bpb", "best_val_loss", "sample"}
    assert evals[-1]["val_loss"] < evals[0]["val_loss"] - 0.3
    assert evals[-1]["tokens"] == 11 * 4 * 2 * 64
    assert (run / "samples.txt").read_text().count("--- update") == 4
    assert "x the entropy floor of" in printed and "tokens/s" in printed and "embedding" in printed
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
    assert words(text).input_ids == ids[1:] and words.eos_token_id == tokenizer.eot
    assert peer.generation_config.eos_token_id == tokenizer.eot
    prompt = torch.tensor([ids])
    theirs = peer.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=60, do_sample=False)
    ours = Gemma.from_pretrained(run / "best").eval().generate(prompt, 60, temperature=0, stop_ids=[tokenizer.eot])
    assert theirs[0, len(ids) :].tolist() == [t.item() for t in ours]


def test_eval_only_and_init_from_a_directory(project):
    run, _ = pretrain(project, "first", "--max_iters=6", "--dtype=float32")
    best = min(e["val_loss"] for e in read_log(run / "log.jsonl") if e["event"] == "eval")
    flags = ["--dataset=fables", f"--init_from={run}/best", *TINY, "--dtype=float32"]
    printed = run_script(project, "train.py", *flags, "--eval_only=True").stdout
    assert f"val loss {best:.4f}" in printed
    second, _ = pretrain(project, "second", f"--init_from={run}/best", "--max_iters=1", "--dtype=float32")
    first_eval = next(e for e in read_log(second / "log.jsonl") if e["event"] == "eval")
    assert first_eval["val_loss"] == pytest.approx(best, abs=1e-6)


def test_a_new_run_moves_an_old_one_aside(project):
    run, _ = pretrain(project, "twice", "--max_iters=1")
    before = (run / "log.jsonl").read_text()
    pretrain(project, "twice", "--max_iters=2")
    (aside,) = (project / "out").glob("twice-*")
    assert (aside / "log.jsonl").read_text() == before


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
    save_checkpoint(tmp_path / "last", old.save_pretrained, old.state_dict())
    rename, calls = os.replace, []

    def dies(*args):
        calls.append(args)
        if len(calls) == fatal:
            raise KeyboardInterrupt
        rename(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dies)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path / "last", new.save_pretrained, new.state_dict())

    def weights():
        return list(train.open_model(tmp_path / "last", "cpu").parameters())

    assert all(torch.equal(a, b) for a, b in zip(weights(), old.parameters(), strict=True))
    save_checkpoint(tmp_path / "last", new.save_pretrained, new.state_dict())  # and the next save goes through
    assert all(torch.equal(a, b) for a, b in zip(weights(), new.parameters(), strict=True))


def test_compiled_and_plain_training_agree(project):
    plain, _ = pretrain(project, "plain", "--max_iters=3", "--dtype=float32")
    compiled, _ = pretrain(project, "compiled", "--max_iters=3", "--dtype=float32", "--compile=True")
    assert [loss for _, loss in losses(plain)] == pytest.approx([loss for _, loss in losses(compiled)], rel=1e-4)


def test_newest_dataset_of_a_name(project, monkeypatch, capsys):
    monkeypatch.setattr(train, "DATA", project / "data")
    assert train.open_dataset("fab")[0].name == "fables"


@pytest.mark.parametrize(
    "args, message",
    [
        (["--dataset=nothing"], "python prepare.py --dataset=nothing"),
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
    ],
)
def test_mistakes_end_in_one_line(project, args, message):
    assert message in fails(project, "train.py", "--dataset=fables", *TINY, *args)


@pytest.mark.parametrize("mirror", ["wandb", "tensorboard"])
def test_a_mirror_that_is_not_installed_says_how_to_get_it(project, mirror):
    if importlib.util.find_spec(mirror):
        pytest.skip(f"{mirror} is installed here")
    flags = ["--dataset=fables", f"--out_dir=out/{mirror}", *TINY, f"--{mirror}=True"]
    assert f"pip install {mirror}" in fails(project, "train.py", *flags)
