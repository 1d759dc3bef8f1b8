"""The README's promises for the fables. Run them by hand, in about twenty minutes:

python -m pytest -n 0 -m slow -s tests/test_quick_start.py
"""

import importlib.util
import itertools
import json
import re
import shlex
import time

import pytest
import torch
from conftest import HOME, copy_project, run_script
from test_export_gguf import export, greedy, open_in_llama_cpp

from data import fable_grammar
from model import Gemma
from support.tokenizer import Tokenizer


def timed(project, command, **kwargs):
    """Run a script. Return its minutes."""
    started = time.time()
    run_script(project, *shlex.split(command), timeout=1200, **kwargs)
    return (time.time() - started) / 60


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project in which the README's first command has run, and the minutes that this took."""
    line = next(line for line in (HOME / "README.md").read_text().splitlines() if "config/train_fables.py &&" in line)
    path = copy_project(tmp_path_factory.mktemp("quick start"))
    minutes = sum(timed(path, command) for command in re.findall(r"python ((?:prepare|train|sample)\.py[^&]*)", line))
    return path, minutes


@pytest.mark.slow
def test_the_quick_start_comes_near_the_floor_and_tells_consistent_fables(project):
    """The final bits per byte are within 10% of the entropy floor. Of 100 sampled fables at least 80 name the same two
    characters throughout."""
    path, minutes = project
    meta = json.loads((path / "data/fables/meta.json").read_text())
    evals = [e for e in map(json.loads, open(path / "out/fables/log.jsonl")) if e["event"] == "eval"]
    ratio = evals[-1]["val_bpb"] / meta["floor_bits_per_byte"]

    model = Gemma.from_pretrained(path / "out/fables/best").eval()
    tokenizer = Tokenizer.load(path / "out/fables/best")
    prompt = torch.full((100, 1), tokenizer.eot)
    made = torch.stack(list(model.generate(prompt, 400, temperature=0.8, stop_ids=[tokenizer.eot], seed=1)), 1)
    texts = [tokenizer.decode(row) for row in made.tolist()]
    names = set(fable_grammar.POOLS["name"])
    # the hero and the friend, and nobody else
    consistent = sum(len(names & set(re.findall(r"\w+", text))) == 2 for text in texts)
    exact = sum(bool(fable_grammar.derivations(text)) for text in texts)
    print(
        f"\n{minutes:.1f} minutes; {evals[-1]['val_bpb']:.4f} bits per byte, {ratio:.3f} x the floor; of 100 fables "
        f"{consistent} keep their two names, the grammar could have told {exact} word for word"
    )
    assert ratio < 1.10 and consistent >= 80


def bits_per_byte(project, model):
    """Return a model's bits per byte on plain fables."""
    flags = [f"--init_from={model}", "--eval_only=True", "--dataset=fables", "--block_size=224"]
    printed = run_script(project, "train.py", *flags, timeout=1200).stdout
    return float(re.search(r"([\d.]+) bits per byte", printed)[1])


@pytest.mark.slow
def test_the_second_chapter_follows_held_out_instructions_and_forgets_little(project):
    path, _ = project
    minutes = timed(path, "lora.py config/lora_fables.py --merge=True")
    printed = (path / "out/lora-fables/samples.txt").read_text()
    figures = {
        name: (float(before), float(after))
        for name, before, after in re.findall(r"^(.*): ([\d.]+) before, ([\d.]+) after$", printed, re.M)
    }
    before, after = (bits_per_byte(path, model) for model in ("out/fables/best", "out/lora-fables/merged"))
    print(f"\n{minutes:.1f} minutes; {figures}; bits per byte on plain text {before:.4f} before, {after:.4f} after")
    assert figures["followed: all"][1] >= 0.9 and figures["followed: all"][0] < 0.1
    assert after < 1.1 * before
    adapter, base = (
        path / "out/lora-fables/best/adapter_model.safetensors",
        path / "out/fables/best/model.safetensors",
    )
    assert adapter.stat().st_size <= 0.1 * base.stat().st_size


@pytest.mark.slow
def test_the_quick_start_model_generates_the_same_everywhere(project):
    """The likeliest hundred tokens are equal in our code, in transformers, and in llama.cpp if it is installed."""
    path, _ = project
    best = path / "out/fables/best"
    tokenizer = Tokenizer.load(best)
    file = export(path, best, "f32")
    # two names can be equally likely: to 4e-5 in the logits after "The friend of the lion said: ", and either may win
    for start in ("Once upon a time", *(fable_grammar.tell(f"everywhere/{i}")[0][:300] for i in range(5))):
        ids = [tokenizer.bos, *map(int, tokenizer.encode(start))]
        ours = greedy(best, ids)
        if importlib.util.find_spec("llama_cpp"):
            peer = open_in_llama_cpp(file)
            assert peer.tokenize(start.encode(), add_bos=True, special=False) == ids
            assert list(itertools.islice(peer.generate(ids, temp=0, top_k=1, repeat_penalty=1.0), 100)) == ours
        else:
            print("\nllama.cpp is not installed: not compared")
