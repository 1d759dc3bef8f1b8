"""What several tests share."""

import base64
import contextlib
import http.server
import importlib
import io
import json
import os
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
if "PYTEST_XDIST_WORKER" in os.environ:  # a thread for each worker: two for each would wait for one another
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def tinystories():
    path = SHARED / "data" / "tinystories_v2_head.txt"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return path


@pytest.fixture
def needs_gpt2():
    """GPT-2's vocabulary in TIKTOKEN_CACHE_DIR, under the name tiktoken gives its download."""
    if not (Path(os.environ.get("TIKTOKEN_CACHE_DIR", "")) / "6d1cbeee0f20b3d9449abfede4726ed8212e3aee").exists():
        pytest.skip("GPT-2's vocabulary is not in TIKTOKEN_CACHE_DIR, and tests use no network")


def copy_project(path):
    """The scripts alone, in a folder of their own."""
    for name in ("model.py", "prepare.py", "train.py", "lora.py", "sample.py"):
        shutil.copy(HOME / name, path)
    shutil.copytree(HOME / "config", path / "config", ignore=shutil.ignore_patterns("__pycache__"))
    (path / "data").mkdir()
    for file in (HOME / "data").glob("fable_grammar.*"):
        shutil.copy(file, path / "data")
    return path


@pytest.fixture
def project(tmp_path):
    return copy_project(tmp_path)


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
    """Run `python args...` in the project's folder as a user would -> the finished process: a script's main in this
    process, which saves importing PyTorch each time, anything else in a process of its own."""
    args = list(map(str, args))
    here = args[0] in SETTINGS and "HF_ENDPOINT" not in os.environ  # which huggingface_hub reads when it is imported
    run = run_inside if here else run_outside
    result = run(project, args, timeout, stdin)
    assert not ok or result.returncode == 0, result.stdout + result.stderr
    return result


def run_outside(project, args, timeout=240, stdin=None):
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=timeout, input=stdin)


def run_inside(project, args, _timeout=None, stdin=None):
    """What a script's main guard does, in this process, with `project` as the current folder and its data/."""
    import torch  # not before the environment above is set: it counts threads when it is imported

    import config

    main = importlib.import_module(args[0].removesuffix(".py")).main
    out, err, code = io.StringIO(), io.StringIO(), 0
    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.chdir(project)
        for module in ("prepare", "train"):
            patch.setattr(f"{module}.DATA", Path(project) / "data")
        patch.setattr(sys, "argv", args)
        patch.setattr(sys, "stdin", io.StringIO(stdin or ""))
        try:
            config.run(main, *settings_of(args[0]))
        except SystemExit as e:
            code = e.code or 0
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def one_line(result, code):
    """A finished process that must have failed with this code and one line on stderr -> that line."""
    lines = [line for line in result.stderr.splitlines() if line]
    assert result.returncode == code and len(lines) == 1, result.stdout + result.stderr
    return lines[0]


def fails(project, *args):
    """Run a script that must find a mistake of the user's -> the line that says so."""
    return one_line(run_script(project, *args, ok=False), 2)


def losses(run):
    """(update, training loss) of each line in a run's log."""
    from train import read_log  # not before the environment above is set

    return [(e["step"], e["train_loss"]) for e in read_log(run / "log.jsonl") if e["event"] == "step"]


# a model and a batch small enough for any test
TINY = """
--hidden_size=32 --intermediate_size=64 --num_hidden_layers=3 --sliding_window_pattern=2 --num_attention_heads=2
--num_key_value_heads=1 --head_dim=16 --sliding_window=24 --max_position_embeddings=512 --block_size=64 --batch_size=4
--gradient_accumulation_steps=2 --warmup_iters=2 --eval_interval=5 --log_interval=1 --sample_tokens=8 --compile=False
--device=cpu
""".split()  # noqa: SIM905


def publish_gemma(path, instructed=False):
    """A small random Gemma 3 in `path`, as Google publishes them: bfloat16, a BPE with byte fallback, a special token
    that the model has no row for; instructed: with a chat template, and ending at the end of a turn."""
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


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in for the Hugging Face Hub on this machine, to which huggingface_hub is pointed: {repository: directory}
    to fill; a directory of None is a gated repository, and what is not listed does not exist. The token "hf_writer"
    may write to repositories of the user "writer"."""
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

        def do_POST(self):
            """Make a repository; say how each file is to be sent, here within the commit; take a commit."""
            sent = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers["Authorization"] != "Bearer hf_writer":
                return self.fail(401, "")
            status, answer = 200, {}
            if self.path == "/api/repos/create":
                asked = json.loads(sent)
                if asked["organization"] != "writer":
                    return self.fail(403, "")
                name = f"writer/{asked['name']}"
                if name in repositories:
                    status = 409
                else:
                    repositories[name] = tmp_path / "uploaded" / asked["name"]
                    repositories[name].mkdir(parents=True)
                answer = {"url": f"{os.environ['HF_ENDPOINT']}/{name}"}
            elif "/preupload/" in self.path:
                files = json.loads(sent)["files"]
                answer = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            elif "/commit/" in self.path:
                name = self.path.removeprefix("/api/models/").split("/commit/")[0]
                for entry in map(json.loads, sent.splitlines()):
                    if entry["key"] == "file":
                        (repositories[name] / entry["value"]["path"]).write_bytes(
                            base64.b64decode(entry["value"]["content"])
                        )
                answer = {"commitUrl": f"{os.environ['HF_ENDPOINT']}/{name}/commit/{commit}", "commitOid": commit}
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

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
