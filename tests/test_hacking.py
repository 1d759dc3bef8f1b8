"""docs/hacking.md: each of its changes, applied to a copy, runs for three updates."""

import json
import re
import shlex

import pytest
from conftest import HOME, TINY, copy_project, run_outside, run_script

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
        text = file.read_text() if file.exists() else ""
        assert text.count(old) == 1 or not text, f"{name}: {old}"
        file.write_text(text.replace(old, new) if text else new)


def hack(project, sections):
    """Apply these changes, which end in commands of one script, and run it with the flags of all."""
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


def log(project):
    return [json.loads(line) for line in (project / "out/hacked/log.jsonl").read_text().splitlines()]


CHECKS = {  # that the change did something
    "ReLU² in the MLP": lambda project: "relu2" in (project / "out/hacked/last/config.json").read_text(),
    "Log one more number": lambda project: all("embedding_rms" in e for e in log(project) if e["event"] == "step"),
    "Another instruction format": lambda project: "B:" in (project / "out/hacked/best/instruct.json").read_text(),
    "Another bundled corpus": lambda project: (project / "data/sums/meta.json").exists(),
    "Numbered checkpoints that stay": lambda project: (project / "out/hacked/step-3/model.safetensors").exists(),
}


@pytest.mark.parametrize("flag", ["--optimizer=lion", "--schedule=inverse_sqrt", "--hidden_activation=relu2"])
def test_a_name_that_is_nowhere_fails_loudly(trained, flag):
    """A forgotten place once trained Muon, or a linear schedule, without a word."""
    result = run_script(trained, "train.py", "--dataset=fables", *TINY, flag, ok=False)
    assert result.returncode == 2 and "must be" in result.stderr
