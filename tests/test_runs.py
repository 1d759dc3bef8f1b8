"""support/runs.py: a run's folder, its checkpoints, and the state from which it resumes."""

import os

import pytest
import torch
from conftest import TINY, fails, run_script

import train
from model import Gemma, GemmaConfig
from support.runs import (
    NEW_STATE,
    RunFolder,
    load_optimizers,
    new_state,
    open_model,
    optimizer_state,
    read_state,
    resolve_init_from,
    write_checkpoint,
)
from train import TrainConfig, make_optimizers

SMALL = GemmaConfig(vocab_size=448, hidden_size=32, num_hidden_layers=2, head_dim=16, intermediate_size=64)
FLAGS = ["train.py", "--dataset=fables", *TINY, "--max_iters=1"]


@pytest.mark.parametrize("job, init_from", [("this", "resume"), ("an older", "scratch")])
def test_torchrun_restarts_its_own_run_only(tmp_path, monkeypatch, job, init_from):
    """A run that failed before its first checkpoint once resumed the run before it, and was done at once."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "this")
    (tmp_path / "last").mkdir()
    (tmp_path / ".job").write_text(job)
    assert resolve_init_from(str(tmp_path), "scratch") == init_from


def test_a_new_run_moves_an_old_one_aside(fables_project):
    for steps in (1, 2):
        run_script(fables_project, *FLAGS, f"--max_iters={steps}", "--out_dir=out/twice")
        if steps == 1:
            before = (fables_project / "out/twice/log.jsonl").read_text()
    (aside,) = (fables_project / "out").glob("twice-*")
    assert (aside / "log.jsonl").read_text() == before


def test_only_runs_are_moved_aside(fables_project):
    """train.py once renamed any folder that --out_dir named: a mounted volume, a link to another disk, data/."""
    project = fables_project
    run_script(project, *FLAGS, "--out_dir=out/base")
    (project / "photos").mkdir()
    (project / "photos" / "a.jpg").write_text("a picture")
    (project / "link").symlink_to(project / "out/base")
    os.mkdir(project / "empty")
    before = sorted(project.rglob("*"))
    for out_dir, message, *more in (
        ("photos", "not from a nanoGemma run"),
        ("data", "not from a nanoGemma run"),
        (".", "not from a nanoGemma run"),
        ("photos/a.jpg", "not from a nanoGemma run"),
        ("link", "cannot be moved aside"),
        ("out/base", "contains the model to start from", "--init_from=out/base/best"),
        ("a\0b", "wants str"),
    ):
        assert message in fails(project, *FLAGS, f"--out_dir={out_dir}", *more)
    assert sorted(project.rglob("*")) == before and (project / "link").is_symlink()
    run_script(project, *FLAGS, "--out_dir=empty")
    assert (project / "empty" / "last").exists() and not list(project.glob("empty-*"))


@pytest.mark.parametrize("fatal", [1, 2])
def test_a_save_cut_off_in_the_middle_leaves_a_whole_checkpoint(tmp_path, monkeypatch, fatal):
    """Either rename of the swap may be the last thing that happens."""
    old, new = Gemma(SMALL).init_weights(1), Gemma(SMALL).init_weights(2)
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
        return list(open_model(tmp_path / "last", "cpu").parameters())

    assert all(torch.equal(a, b) for a, b in zip(weights(), old.parameters(), strict=True))
    write_checkpoint(tmp_path / "last", new.save_pretrained, new.state_dict())  # the next save succeeds
    assert all(torch.equal(a, b) for a, b in zip(weights(), new.parameters(), strict=True))


def trained_for_a_step(model, cfg):
    """Return the optimizers of a model after one step."""
    optimizers, x = make_optimizers(model, cfg), torch.arange(16)[None]
    loss = train.accumulate_gradients(model, [(x, x)], torch.device("cpu"), torch.float32)
    train.optimizer_step(optimizers, loss, 1.0)
    return optimizers


def test_a_resumed_run_trains_with_its_own_settings():
    """load_state_dict alone would restore the settings of the checkpoint, although a line says that they changed."""
    model = Gemma(SMALL).init_weights(0)
    before = trained_for_a_step(model, TrainConfig())
    after = make_optimizers(model, TrainConfig(weight_decay=0.1, momentum=0.5, beta1=0.6))
    load_optimizers(after, model, optimizer_state(before, model))
    assert after[0].param_groups[0]["weight_decay"] == 0.1 and after[0].param_groups[0]["momentum"] == 0.5
    assert after[1].param_groups[0]["betas"] == (0.6, 0.95)
    for old, new in zip(before, after, strict=True):
        assert len(old.state) == len(new.state) > 0
        for p, values in old.state.items():
            assert all(torch.equal(values[key], new.state[p][key]) for key in values)


def test_a_value_added_to_the_state_is_saved_and_read_again(tmp_path):
    """For example an average of the weights, or a patience for early stopping."""
    model = Gemma(SMALL).init_weights(0)
    optimizers, state = trained_for_a_step(model, TrainConfig()), new_state("a fingerprint", {"seed": 1})
    state.step, state.patience = 7, {"left": 3, "averages": torch.arange(3.0)}
    RunFolder(tmp_path / "run", "scratch").save("last", model.save_pretrained, model, state, optimizers)
    again = read_state(tmp_path / "run" / "last", "a fingerprint", {"seed": 1}, fixed=("seed",))
    assert again.step == 7 and again.patience["left"] == 3 and again.patience["averages"].tolist() == [0, 1, 2]
    assert again.settings == {"seed": 1} and vars(again).keys() >= NEW_STATE.keys() | {"optimizer", "dataset"}
    assert not hasattr(state, "optimizer")  # saving leaves the state unchanged
