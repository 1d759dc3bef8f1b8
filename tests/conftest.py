"""Fixtures and helpers that several test files share."""

import contextlib
import functools
import http.server
import importlib
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

HOME = Path(__file__).parent.parent
SHARED = HOME.parent / "shared"  # development data: tests that read it skip where it is absent
if (SHARED / "tiktoken-cache").is_dir():
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken-cache"))
os.environ["HF_HUB_OFFLINE"] = "1"  # no test waits for a network
if "PYTEST_XDIST_WORKER" in os.environ:  # one thread for each worker: with two they would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def tinystories():
    path = SHARED / "data" / "tinystories_v2_head.txt"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return path


@pytest.fixture
def needs_gpt2():
    """Skip if GPT-2's vocabulary is not in TIKTOKEN_CACHE_DIR, under the name that tiktoken gives its download."""
    if not (Path(os.environ.get("TIKTOKEN_CACHE_DIR", "")) / "6d1cbeee0f20b3d9449abfede4726ed8212e3aee").exists():
        pytest.skip("GPT-2's vocabulary is not in TIKTOKEN_CACHE_DIR, and tests use no network")


def copy_project(path):
    """Copy the scripts and what they import into the folder `path`. Return `path`."""
    for name in ("model.py", "prepare.py", "train.py", "lora.py", "sample.py"):
        shutil.copy(HOME / name, path)
    for name in ("support", "config"):
        shutil.copytree(HOME / name, path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (path / "data").mkdir()
    for file in (HOME / "data").glob("fable_grammar.*"):
        shutil.copy(file, path / "data")
    return path


@pytest.fixture
def project(tmp_path):
    return copy_project(tmp_path)


def prepare_fables(path, count=300, tokenizer="bpe:400"):
    """Prepare a few fables in a project. Return `path`."""
    flags = [f"--max_documents={count}", f"--tokenizer={tokenizer}"]
    run_script(path, "prepare.py", "--dataset=fables", "--val_fraction=0.05", *flags)
    return path


@pytest.fixture(scope="module")
def fables_project(tmp_path_factory):
    """A project with 300 fables prepared in it. Tests write to runs of their own."""
    return prepare_fables(copy_project(tmp_path_factory.mktemp("project")))


# the settings that each script's main takes
SETTINGS = {
    "prepare.py": ["prepare.PrepareConfig"],
    "train.py": ["train.PretrainConfig", "train.TrainConfig", "model.GemmaConfig"],
    "lora.py": ["lora.LoraConfig", "lora.TuneConfig"],
    "sample.py": ["sample.SampleConfig"],
}


def settings_of(script):
    return [getattr(importlib.import_module(name.split(".")[0]), name.split(".")[1]) for name in SETTINGS[script]]


def run_script(project, *args, ok=True, timeout=240, stdin=None):
    """Run `python args...` in the project's folder as a user would. Return the finished process. A script's main runs
    in this process, which saves the import of PyTorch; anything else gets a process of its own."""
    args = list(map(str, args))
    # huggingface_hub reads HF_ENDPOINT when it is imported, so it needs a new process
    inside = args[0] in SETTINGS and "HF_ENDPOINT" not in os.environ
    run = run_inside if inside else run_outside
    result = run(project, args, timeout, stdin)
    assert not ok or result.returncode == 0, result.stdout + result.stderr
    return result


def run_outside(project, args, timeout=240, stdin=None):
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=timeout, input=stdin)


def run_inside(project, args, _timeout=None, stdin=None):
    """Run a script's main in this process, with `project` as the current folder and the project's own data/."""
    import torch  # after the environment above is set: torch counts threads when it is imported

    from support import settings

    main = importlib.import_module(args[0].removesuffix(".py")).main
    out, err, code = io.StringIO(), io.StringIO(), 0
    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.chdir(project)
        patch.setattr("support.datasets.DATA", Path(project) / "data")
        patch.setattr(sys, "argv", args)
        patch.setattr(sys, "stdin", io.StringIO(stdin or ""))
        try:
            settings.run(main, *settings_of(args[0]))
        except SystemExit as e:
            code = e.code or 0
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def one_line(result, code):
    """Check that a finished process failed with this code and one line on stderr. Return that line."""
    lines = [line for line in result.stderr.splitlines() if line]
    assert result.returncode == code and len(lines) == 1, result.stdout + result.stderr
    return lines[0]


def fails(project, *args):
    """Run a script that must find a mistake of the user's. Return the line that reports it."""
    return one_line(run_script(project, *args, ok=False), 2)


def losses(run):
    """Return (step, training loss) of each step in a run's log."""
    from support.log import read_log  # after the environment above is set

    return [(e["step"], e["train_loss"]) for e in read_log(run / "log.jsonl") if e["event"] == "step"]


# a model and a batch small enough for any test
TINY = """
--hidden_size=32 --intermediate_size=64 --num_hidden_layers=3 --sliding_window_pattern=2 --num_attention_heads=2
--num_key_value_heads=1 --head_dim=16 --sliding_window=24 --max_position_embeddings=512 --block_size=64 --batch_size=4
--gradient_accumulation_steps=2 --warmup_iters=2 --eval_interval=5 --log_interval=1 --sample_tokens=8 --compile=False
--device=cpu
""".split()  # noqa: SIM905


def publish_gemma(path, instructed=False):
    """Write a small random Gemma 3 to `path`, in the form in which Google publishes them: bfloat16, a BPE with byte
    fallback, a special token for which the embedding has no row. instructed: with a chat template, and with the end of
    a turn as a token that ends a text."""
    import torch
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GemmaTokenizer

    from data import fable_grammar

    trained = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{b:02X}>" for b in range(256))]
    fables = [fable_grammar.tell(f"gemma/{i}")[0].replace(" ", "▁") for i in range(200)]
    trained.train_from_iterator(
        fables, trainers.BpeTrainer(vocab_size=480, special_tokens=special, show_progress=False)
    )
    model = json.loads(trained.to_str())["model"]
    tokenizer = GemmaTokenizer(model["vocab"], [tuple(pair) for pair in model["merges"]])
    tokenizer.add_tokens([AddedToken("\n\n", normalized=False)])
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<start_of_turn>", "<end_of_turn>", "<image_soft_token>"]}
    )
    config = Gemma3TextConfig(
        vocab_size=len(tokenizer) - 1, hidden_size=48, intermediate_size=80, num_hidden_layers=7, num_attention_heads=4,
        num_key_value_heads=1, head_dim=16, query_pre_attn_scalar=16, sliding_window=32, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    published = Gemma3ForCausalLM(config).bfloat16()
    if instructed:
        published.generation_config.eos_token_id = [1, tokenizer.convert_tokens_to_ids("<end_of_turn>")]
        tokenizer.chat_template = (
            "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else 'user' }}"
            "{{ '\\n' + m.content | trim }}<end_of_turn>{{ '\\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
        )
    published.save_pretrained(path, max_shard_size="60KB")
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """A published instruction-tuned Gemma 3, small and random."""
    return publish_gemma(tmp_path_factory.mktemp("gemma"), instructed=True)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A local server in place of the Hugging Face Hub. The fixture's value is a dict {repository: directory} to fill. A
    directory of None makes a gated repository; a repository that is not listed does not exist."""
    repositories, commit = {}, "0" * 40

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self, body=True):
            path = self.path.split("?")[0]
            found = re.fullmatch(r"/(?:api/models/)?([^/]+/[^/]+)/(revision|tree|resolve)/[^/]+/?(.*)", path)
            if not found:
                return self.fail(404, "NotFound")
            name, what, file = found.groups()
            directory = repositories.get(name)
            if directory is None:
                gated = name in repositories
                return self.fail(403 if gated else 401, "GatedRepo" if gated else "RepoNotFound")
            files = [{"path": p.name, "rfilename": p.name, "size": p.stat().st_size, "oid": p.name, "type": "file"}
                     for p in sorted(directory.iterdir())]  # fmt: skip
            if what == "revision":
                content = json.dumps({"id": name, "sha": commit, "siblings": files}).encode()
            elif what == "tree":
                content = json.dumps(files).encode()
            elif (directory / file).exists():
                content = (directory / file).read_bytes()
            else:
                return self.fail(404, "EntryNotFound")
            self.send_response(200)
            headers = {"Content-Length": len(content), "ETag": f'"{hash((name, file))}"', "X-Repo-Commit": commit}
            for header, value in headers.items():
                self.send_header(header, str(value))
            self.end_headers()
            if body:
                self.wfile.write(content)

        def do_HEAD(self):
            self.do_GET(body=False)

        def fail(self, status, code):
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf-home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    yield repositories
    server.shutdown()
    server.server_close()


# ---- texts and prepared datasets -------------------------------------------------------------------------------------

STORIES = [f"Story number {i}: the {w} ran. Ünïcode {'x' * (i % 40)}." for i in range(300) for w in ("fox", "crow")]


def random_texts(count, seed=0):
    """Yield random Unicode strings, with assigned and unassigned characters and a little markup."""
    rng = random.Random(seed)
    odd = ["<|endoftext|>", " ", "\n", "'s", "  ", "\u200d", "\ufeff"]
    for _ in range(count):
        codes = (rng.choice([rng.randrange(1, 0x80), rng.randrange(0x110000)]) for _ in range(rng.randrange(40)))
        yield "".join(rng.choice(odd) if rng.random() < 0.1 else chr(c) for c in codes if not 0xD800 <= c < 0xE000)


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """An empty current folder with a data/ of its own, into which prepared() writes."""
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("support.datasets.DATA", tmp_path / "data")
    return tmp_path


def prepared(**settings):
    """Run prepare.py in this process. Return (path, meta) of the dataset that it wrote."""
    import prepare
    from support import datasets

    prepare.main(prepare.PrepareConfig(**{"tokenizer": "bpe:300", **settings}))
    path = datasets.DATA / (settings.get("name") or Path(settings["dataset"]).stem)
    return path, json.loads((path / "meta.json").read_text())


def documents_of(path, meta, split):
    """Return the texts of a .bin file, read without the code of prepare.py."""
    import numpy as np

    from support.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(path)
    tokens = np.fromfile(path / f"{split}.bin", dtype=meta["dtype"])
    assert tokens[-1] == tokenizer.eot
    parts = np.split(tokens, np.flatnonzero(tokens == tokenizer.eot) + 1)[:-1]
    assert len(tokens) == meta[split]["tokens"] and len(parts) == meta[split]["documents"]
    return [tokenizer.decode(part[:-1]) for part in parts]


def write_corpus(path, texts=STORIES):
    """Write texts to a file, in the format that its suffix names."""
    if path.suffix == ".txt":
        path.write_text("\n<|endoftext|>\n".join(texts) + "\n<|endoftext|>\n  \n", encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"id": i, "text": s}) + "\n" for i, s in enumerate(texts)))
    elif path.suffix == ".json":
        path.write_text(json.dumps([{"text": s} for s in texts]))
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)


# ---- small models, adapters and conversations ------------------------------------------------------------------------


def base_model(seed=0):
    """Return a small random Gemma."""
    from model import Gemma, GemmaConfig

    config = GemmaConfig(
        vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, sliding_window=7, sliding_window_pattern=2, max_position_embeddings=128,
        pad_token_id=None,
    )  # fmt: skip
    return Gemma(config).init_weights(seed).eval()


def random_tokens(*shape):
    """Return token ids for base_model()."""
    import torch

    return torch.randint(0, 97, shape, generator=torch.Generator().manual_seed(1))


def adapted(target_modules="all-linear"):
    """Return a base model, and the same model with an adapter that changes its logits."""
    import torch

    from lora import add_lora, lora_layers

    base, model = base_model(), base_model()
    torch.manual_seed(3)
    add_lora(model, 3, 7.0, target_modules=target_modules)
    for _, layer in lora_layers(model):
        torch.nn.init.normal_(layer.lora_B.weight, std=0.05)
    return base, model


@functools.cache
def small_tokenizer():
    """Return a byte-level BPE of 300 tokens. Its end-of-text is its only special token."""
    from support.tokenizer import Tokenizer, train_bpe

    return Tokenizer(train_bpe(["Say hi. Instruction Response Input hello world"] * 3, 300))


def talk(turns):
    """Return messages from (instruction, input, response) turns. A response of None is not written yet."""
    from support.conversations import exchange

    messages = [message for turn in turns for message in exchange(*turn)]
    return messages if turns[-1][2] is not None else messages[:-1]


# ---- sample.py -------------------------------------------------------------------------------------------------------


def sampled(project, *args):
    """Run sample.py in this process. Return what it prints."""
    import sample
    from support.settings import configure

    with contextlib.chdir(project), contextlib.redirect_stdout(io.StringIO()) as printed:
        sample.main(*configure([sample.SampleConfig], ["--device=cpu", "--dtype=float32", *map(str, args)]))
    return printed.getvalue()


def refused(project, *args):
    """Run sample.py with a mistake in its settings. Return the one line that reports it."""
    from support.settings import UserError

    with pytest.raises(UserError) as e:
        sampled(project, *args)
    assert len(str(e.value).splitlines()) == 1
    return str(e.value)
