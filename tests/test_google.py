"""The whole path on Google's own weights. Run it by hand: GEMMA_DIR names a directory with Gemma 3 270M.

GEMMA_DIR=path/to/gemma-3-270m python -m pytest -n 0 -m slow -s tests/test_google.py

The weights are Google's, under Gemma's terms of use. Nothing made from them is committed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import HOME
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from data import orders
from lora import load_adapter
from model import Gemma
from support.log import read_log
from support.tokenizer import Tokenizer

GEMMA = Path(os.environ.get("GEMMA_DIR", "not set"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not GEMMA.is_dir(), reason="GEMMA_DIR names no directory with Gemma 3 270M"),
]
TEXTS = [
    'The old clock struck ten, and Mr. Hale said: "It\'s late!"\n\nNobody moved.',
    "def fibonacci(n):\n    if n < 2:\n        return n\n\treturn 1\n",
    "1. milk\n2. eggs\n   - brown\n\n\n\nüber 東京 🦊 مرحبا ▁ <eos> <start_of_turn>",
]


def run(*args):
    """Run a script of the project. Return what it prints."""
    made = subprocess.run([sys.executable, *map(str, args)], cwd=HOME, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return made.stdout


def logits_of(model, tokens):
    with torch.no_grad():
        found = model(tokens)
    return getattr(found, "logits", found)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """Return the folder of a short tuning run on 60 orders, merged."""
    path = tmp_path_factory.mktemp("google")
    orders.main(60, path / "orders.json")
    flags = [f"--init_from={GEMMA}", f"--data={path / 'orders.json'}", f"--out_dir={path / 'run'}"]
    print(run("lora.py", *flags, "--epochs=3", "--merge=True", "--num_samples=1"))
    return path / "run"


def test_ids_and_logits_equal_transformers():
    ours, theirs = Tokenizer.load(GEMMA), AutoTokenizer.from_pretrained(GEMMA)
    for text in TEXTS:
        ids = [ours.bos, *ours.encode(text).tolist()]
        assert ids == theirs(text, split_special_tokens=True).input_ids
        if "▁" not in text:
            assert ours.decode(ids) == text
    tokens = torch.tensor([[ours.bos, *ours.encode(" ".join(TEXTS) * 12).tolist()[:1200]]])  # longer than the window
    peer = AutoModelForCausalLM.from_pretrained(GEMMA, dtype=torch.float32).eval()
    wanted, found = logits_of(peer, tokens), logits_of(Gemma.from_pretrained(GEMMA), tokens)
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert torch.equal(found.argmax(-1), wanted.argmax(-1))


def test_a_few_orders_are_learned_and_the_report_says_so(tuned):
    (report,) = [entry for entry in read_log(tuned / "log.jsonl") if entry.get("event") == "report"]
    assert report["before"]["exact match"] == 0 and report["after"]["exact match"] > 0.3
    assert report["after"]["response loss"] < 0.1 * report["before"]["response loss"]


def test_the_adapter_opens_in_peft_and_the_merged_model_in_transformers(tuned):
    tokens = torch.tensor([[2, *Tokenizer.load(GEMMA).encode(TEXTS[0]).tolist()]])
    ours = logits_of(load_adapter(Gemma.from_pretrained(GEMMA), tuned / "best").eval(), tokens)
    peer = AutoModelForCausalLM.from_pretrained(GEMMA, dtype=torch.float32)
    peft = logits_of(PeftModel.from_pretrained(peer, tuned / "best").eval(), tokens)
    merged = AutoModelForCausalLM.from_pretrained(tuned / "merged", dtype=torch.float32).eval()
    for theirs in (peft, logits_of(merged, tokens)):
        assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
    assert AutoTokenizer.from_pretrained(tuned / "merged")(TEXTS[1]).input_ids[0] == 2


def test_sample_answers_and_exports(tuned, tmp_path):
    (record,) = json.loads((tuned.parent / "orders.json").read_text())[:1]
    asked = [f"--instruct={record['instruction']}", f"--input={record['input']}", "--temperature=0"]
    printed = run("sample.py", f"--adapter={tuned / 'best'}", *asked, "--max_new_tokens=60")
    assert "instruction format: alpaca" in printed and '"quantity":' in printed
    run("sample.py", f"--model={tuned / 'merged'}", f"--export_gguf={tmp_path / 'orders.gguf'}")
    assert (tmp_path / "orders.gguf").stat().st_size > 500e6
