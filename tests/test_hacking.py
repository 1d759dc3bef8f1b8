"""docs/hacking.md: each of its changes, applied to a copy, runs for three steps."""

import json
import re
import shlex

import pytest
import torch
from conftest import HOME, TINY, copy_project, run_outside, run_script
from safetensors.torch import load_file

SECTIONS = re.split(r"(?m)^## \d+\. ", (HOME / "docs" / "hacking.md").read_text())[1:]
LORA = ["--init_from=out/fables/best", "--data=records.json", "--rank=2", "--max_iters=3", "--sample_tokens=4"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = copy_project(tmp_path_factory.mktemp("project"))
    run_script(path, "prepare.py", "--dataset=fables", "--max_documents=100", "--val_fraction=0.1",
               "--tokenizer=bpe:300")  # fmt: skip
    run_script(path, "train.py", "--dataset=fables", *TINY, "--max_iters=1", "--eval_interval=1")
    records = [{"instruction": f"Say {i}.", "input": "aloud", "output": f"It is {i}."} for i in range(40)]
    (path / "records.json").write_text(json.dumps(records))
    return path


def apply(diff, project):
    """Each part of a diff names its file and replaces the lines with "-" by those with "+"; they stand there once."""
    for part in re.split(r"(?m)^--- ", diff)[1:]:
        name, *lines = part.splitlines()
        old, new = ("\n".join(line[1:] for line in lines if line[0] == sign) for sign in "-+")
        file = project / name
        text = file.read_text() if old else ""
        assert text.count(old) == 1 or not old, f"{name}: {old}"
        file.write_text(text.replace(old, new) if old else new)


def hack(project, sections, then=None):
    """Apply these changes, which end in commands of one script, and run it with the flags of all. then: a function of
    the project, to call before the changes are undone."""
    before = {
        project / f"{name}.py": (project / f"{name}.py").read_text() for name in ("model", "train", "lora", "prepare")
    }
    try:
        flags = []
        for section in sections:
            blocks = dict(re.findall(r"(?s)```(\w+)\n(.*?)```", section))
            apply(blocks["diff"], project)
            _, script, *more = shlex.split(blocks["sh"])
            flags += more
        flags += {"train.py": ["--dataset=fables", *TINY, "--max_iters=3"], "lora.py": LORA, "prepare.py": []}[script]
        flags += ["--out_dir=out/hacked"] if script != "prepare.py" else []
        result = run_outside(project, [f"./{script}", *flags])
        assert result.returncode == 0, result.stderr
        for section in sections:
            check = CHECKS.get(section.splitlines()[0])
            assert not check or check(project), section
        if then:
            then(project)
    finally:
        for file, text in before.items():
            file.write_text(text)


@pytest.mark.parametrize("script", ["train.py", "prepare.py", "lora.py"])
def test_the_changes_work_together(trained, script):
    hack(trained, [section for section in SECTIONS if f"```sh\npython {script}" in section])


@pytest.mark.slow
@pytest.mark.parametrize("section", SECTIONS[:-1], ids=lambda section: section.splitlines()[0])
def test_each_change_works_alone(trained, section):
    hack(trained, [section])


def test_lora_from_a_notebook(trained):
    (code,) = re.findall(r"(?s)```python\n(.*?)```", SECTIONS[-1])
    result = run_outside(trained, ["-c", code])
    assert result.returncode == 0, result.stderr
    assert (trained / "out/mine/adapter_config.json").exists()


def log(project, event):
    entries = [json.loads(line) for line in (project / "out/hacked/log.jsonl").read_text().splitlines()]
    return [entry for entry in entries if entry["event"] == event]


def settings_of_model(project):
    return json.loads((project / "out/hacked/last/config.json").read_text())


def average_is_evaluated(project):
    """last/ holds the weights of the training and best/ their average, whose loss the log has."""
    last, best = (load_file(project / f"out/hacked/{name}/model.safetensors") for name in ("last", "best"))
    state = torch.load(project / "out/hacked/last/train_state.pt", weights_only=True)
    differs = any(not torch.equal(last[name], best[name]) for name in last)
    return differs and all(torch.equal(state["average"][name], best[name]) for name in best)


CHECKS = {  # that the change did something
    "ReLU² in the MLP": lambda project: settings_of_model(project)["hidden_activation"] == "relu2",
    "Log one more number": lambda project: all("embedding_rms" in e for e in log(project, "step")),
    "Another instruction format": lambda project: "B:" in (project / "out/hacked/best/instruct.json").read_text(),
    "Another bundled corpus": lambda project: (project / "data/sums/meta.json").exists(),
    "Numbered checkpoints that stay": lambda project: (project / "out/hacked/step-3/model.safetensors").exists(),
    "An untied head": lambda project: settings_of_model(project)["tie_word_embeddings"] is False,
    "A soft cap on the logits": lambda project: settings_of_model(project)["final_logit_softcapping"] == 30,
    "A second validation set": lambda project: all(
        e["other_loss"] == e["val_loss"] and e["other_bpb"] == e["val_bpb"] for e in log(project, "eval")
    ),
    "An average of the weights, evaluated and saved as the best": average_is_evaluated,
    "Gradient norms of each layer in the log": lambda project: all(
        sum(norm**2 for norm in e["grad_norms"].values()) <= e["grad_norm"] ** 2 * 1.0001 and len(e["grad_norms"]) == 3
        for e in log(project, "step")
    ),
}


def test_every_check_belongs_to_a_change():
    assert CHECKS.keys() <= {section.splitlines()[0] for section in SECTIONS}


def test_no_change_touches_support():
    files = {name for section in SECTIONS for name in re.findall(r"(?m)^--- (.*)$", section)}
    assert files and not [name for name in files if name.startswith("support")]


def test_a_changed_head_is_the_same_in_transformers_and_has_its_own_gradient(trained):
    """A field of GemmaConfig was once overwritten by a constant in config.json, and reloaded as if it had never been
    there; and the loss's gradient is written by hand, so that a change of the logits can miss it."""
    sections = [s for s in SECTIONS if s.startswith(("An untied head", "A soft cap"))]
    code = """
import torch, transformers
from model import Gemma
model = Gemma.from_pretrained("out/hacked/last")
x = torch.arange(2, 42).view(2, 20)
model.lm_head.weight.data *= 100  # logits that the cap changes
model(x, x).backward()
ours = [p.grad.clone() for p in model.parameters()]
model.zero_grad()
torch.nn.functional.cross_entropy(model(x).flatten(0, 1), x.flatten()).backward()
for a, p in zip(ours, model.parameters()):
    assert (a - p.grad).norm() <= 1e-3 * p.grad.norm()
model.save_pretrained("out/changed")
peer = transformers.AutoModelForCausalLM.from_pretrained("out/changed", attn_implementation="eager")
assert model(x).abs().max() > 10, "the cap has nothing to do"
torch.testing.assert_close(model(x), peer(x).logits, rtol=1e-4, atol=1e-3)
"""

    def check(project):
        result = run_outside(project, ["-c", code])
        assert result.returncode == 0, result.stderr

    hack(trained, sections, then=check)


@pytest.mark.parametrize("flag", ["--optimizer=lion", "--schedule=inverse_sqrt", "--hidden_activation=relu2"])
def test_an_unknown_name_fails_loudly(trained, flag):
    """A forgotten place once trained Muon, or a linear schedule, without a word."""
    result = run_script(trained, "train.py", "--dataset=fables", *TINY, flag, ok=False)
    assert result.returncode == 2 and "must be" in result.stderr
