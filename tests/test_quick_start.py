"""The README's promise, kept by hand: python -m pytest -m slow tests/test_quick_start.py -s"""

import json
import re
import shlex
import time

import pytest
import torch
from conftest import HOME, copy_project, run_script

from data import fable_grammar
from model import Gemma
from prepare import Tokenizer


@pytest.mark.slow
def test_the_quick_start_reaches_the_floor_and_tells_consistent_fables(tmp_path):
    """Final bits per byte within 10% of the entropy floor; and of 100 sampled fables, how many the grammar could have
    told word for word, and how many name their two characters consistently."""
    line = next(line for line in (HOME / "README.md").read_text().splitlines() if "config/train_fables.py &&" in line)
    project = copy_project(tmp_path)
    started = time.time()
    for command in re.findall(r"python ((?:prepare|train|sample)\.py[^&]*)", line):
        run_script(project, *shlex.split(command), timeout=1200)
    minutes = (time.time() - started) / 60
    meta = json.loads((project / "data/fables/meta.json").read_text())
    evals = [e for e in map(json.loads, open(project / "out/fables/log.jsonl")) if e["event"] == "eval"]
    ratio = evals[-1]["val_bpb"] / meta["floor_bits_per_byte"]

    model = Gemma.from_pretrained(project / "out/fables/best").eval()
    tokenizer = Tokenizer.load(project / "out/fables/best")
    prompt = torch.full((100, 1), tokenizer.eot)
    made = torch.stack(list(model.generate(prompt, 400, 0.8, stop_ids=[tokenizer.eot], seed=1)), 1)
    texts = [tokenizer.decode(row) for row in made.tolist()]
    names = set(fable_grammar.POOLS["name"])
    # the hero and the friend, and nobody else to the end
    consistent = sum(len(names & set(re.findall(r"\w+", text))) == 2 for text in texts)
    exact = sum(bool(fable_grammar.derivations(text)) for text in texts)
    print(
        f"\n{minutes:.1f} minutes; {evals[-1]['val_bpb']:.4f} bits per byte, {ratio:.3f} x the floor; of 100 fables "
        f"{consistent} keep their two names, {exact} are word for word the grammar's"
    )
    assert ratio < 1.10 and consistent >= 80
