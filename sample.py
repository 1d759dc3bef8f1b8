"""
Sample from a model, answer instructions, chat, or export it for llama.cpp.

    python sample.py --start="Once upon"                  # the newest best checkpoint under out/
    python sample.py --out_dir=out/fables --num_samples=4
    python sample.py --model=google/gemma-3-270m-it --instruct="Name three birds."   # any Gemma 3, here or on the Hub
    python sample.py --interactive=True                   # continues every line that you type
    python sample.py --adapter=out/lora-fables/best --instruct="What is the lesson of this fable?" --input="Once ..."
    python sample.py --adapter=out/lora-fables/best --interactive=True   # a conversation
    python sample.py --out_dir=out/fables --export_gguf=fables.gguf      # a file for llama.cpp and Ollama
"""

import time
from dataclasses import dataclass
from pathlib import Path

from lora import check_template, choose_template, load_adapter, merge_lora
from model import read_json
from support.adapters import check_base
from support.conversations import encode_conversation, end_of_response
from support.devices import can_compile, pick_device, pick_dtype, runtime_errors
from support.export_gguf import export_gguf
from support.files import latest_intact_dir
from support.hub import hub_directory
from support.runs import open_model
from support.settings import NO_LIMIT, UserError, check_range, run, user_errors
from support.tokenizer import Tokenizer


@dataclass
class SampleConfig:
    """Settings of sample.py."""

    start: str = ""  # the beginning of the text; FILE:path reads it from a file; empty: a new document
    out_dir: str = ""  # sample from the best checkpoint of this run; empty: of the newest run under out/
    model: str = ""  # sample from this model directory, or a Hub id of a Gemma 3
    adapter: str = ""  # a LoRA adapter to load; by default on the model that it was trained on
    instruct: str = ""  # an instruction to answer, in the model's instruction format
    input: str = ""  # the text the instruction is about
    template: str = ""  # instruction format: alpaca, short or gemma; empty: the model's own chat template, or alpaca
    num_samples: int = 1  # texts from the same beginning, generated as one batch
    max_new_tokens: int = 300  # longest text; an end-of-text token ends it earlier
    temperature: float = 0.8  # 0: always the likeliest token; 1: the model's own probabilities
    top_k: int = 0  # draw from the k likeliest tokens; 0: from all
    top_p: float = 1.0  # draw from the smallest set of tokens with this probability; 1: from all
    seed: int = 1337  # the same seed gives the same text
    interactive: bool = False  # read lines from the terminal: texts to continue, or the user's turns in a chat
    export_gguf: str = ""  # write the model, with the adapter merged, to this file instead of sampling
    gguf_type: str = "bf16"  # type of the matrices in that file: f32, bf16, f16 or q8_0
    device: str = "auto"  # auto, cpu, cuda, mps
    dtype: str = "auto"  # bfloat16 or float32; auto: bfloat16 if the hardware has it
    compile: bool = False  # torch.compile the step that generates a token; pays off after a few thousand tokens

    def __post_init__(self):
        check_range(self, 1, NO_LIMIT, "num_samples")
        check_template(self.template)
        if self.temperature:
            check_range(self, 1e-6, 1e6, "temperature")  # outside this range, logits overflow
        check_range(self, 1e-6, 1, "top_p")
        if self.gguf_type not in ("f32", "bf16", "f16", "q8_0"):
            raise ValueError(f"gguf_type={self.gguf_type!r} must be f32, bf16, f16 or q8_0")
        path = Path(self.export_gguf)
        if self.export_gguf and (path.is_dir() or not path.parent.is_dir()):
            raise ValueError(f"export_gguf={path} must name a file, in a folder that exists")
        if self.input and not self.instruct:
            raise ValueError("input needs an instruction: add --instruct")
        modes = "export_gguf", "interactive", "instruct", "start"
        for keys in modes, ("model", "out_dir"), ("adapter", "out_dir"):
            if len(given := [key for key in keys if getattr(self, key)]) > 1:
                raise ValueError(f"{' and '.join(given)} cannot be combined: give one of them")


@runtime_errors("lower num_samples or max_new_tokens")
def main(cfg):
    device = pick_device("cpu" if cfg.export_gguf else cfg.device)
    dtype = pick_dtype("float32" if cfg.export_gguf else cfg.dtype, device)
    adapter = hub_directory(cfg.adapter) if cfg.adapter else None
    path = find_checkpoint(cfg, adapter)
    model = open_model(path, device, dtype).eval()
    # prefer the adapter's tokenizer, as users of transformers do
    tokenizer = Tokenizer.load(adapter if adapter and (adapter / "tokenizer.json").exists() else path)
    tokenizer.check_rows(model.config.vocab_size)
    template, source = choose_template(cfg.template, [adapter, path] if adapter else [path])
    is_chat = bool(adapter or source)
    print(f"[{path}{f' with {adapter}' if adapter else ''}]")
    form = source or "alpaca, because there is no chat template"
    print(f"[instruction format: {form}]\n" if cfg.instruct or (cfg.interactive and is_chat) else "")
    if adapter:
        check_base(adapter, path)
        with user_errors(f"--adapter={cfg.adapter}"):
            load_adapter(model, adapter).to(dtype).eval()
    if cfg.export_gguf:
        tokenizer.config |= {"chat_template": template} if is_chat else {}
        return export_gguf(merge_lora(model), tokenizer, cfg.export_gguf, cfg.gguf_type)
    if cfg.compile and can_compile(device):
        model.compile_step()
    writer = Writer(cfg, model, tokenizer, template)
    if cfg.interactive:
        writer.converse(is_chat)
    elif cfg.instruct:
        writer.answer([{"role": "user", "content": cfg.instruct, "input": cfg.input}])
    else:
        text = cfg.start
        if text.startswith("FILE:"):
            with user_errors(f"--start={text}"):
                text = Path(text[5:]).expanduser().read_text(encoding="utf-8-sig")
        writer.continue_text(text)


def find_checkpoint(cfg, adapter):
    """Return the model directory that the settings name, or the one that the adapter was trained on."""
    if cfg.model:
        path = hub_directory(cfg.model)
    elif adapter:
        with user_errors(f"--adapter={cfg.adapter}: no adapter here"):
            base = read_json(adapter / "adapter_config.json")["base_model_name_or_path"]
        if not base:
            raise UserError(f"--adapter={cfg.adapter}: it does not name its base model: add --model")
        path = hub_directory(base)
    elif cfg.out_dir:
        path = latest_intact_dir(Path(cfg.out_dir) / "best")
        if not path.is_dir():
            raise UserError(f"--out_dir={cfg.out_dir}: no checkpoint in {path}")
    else:
        found = [file.parent for file in Path("out").glob("*/best/config.json")]
        if not found:
            raise UserError("no checkpoint under out/: train one first, python train.py config/train_fables.py")
        path = max(found, key=lambda run: (run / "config.json").stat().st_mtime)
    if (path / "adapter_config.json").exists() and not (path / "config.json").exists():
        raise UserError(f"{path} holds an adapter, not a whole model: use --adapter={path}")
    return path


class Writer:
    """A model that writes to the terminal. template: the text of a chat template."""

    def __init__(self, cfg, model, tokenizer, template):
        self.cfg, self.model, self.tokenizer, self.template = cfg, model, tokenizer, template
        stops = model.config.eos_token_id
        self.stops = [tokenizer.eot, *(stops if isinstance(stops, list) else [stops] if stops is not None else [])]

    def continue_text(self, text):
        ids = self.tokenizer.encode(text).tolist()
        if (read := self.tokenizer.decode(ids)) != text:
            print(f"[encoding changes this text; the model reads {read!r}]")
        return self.write(text, [self.tokenizer.bos, *ids], self.stops)

    def answer(self, messages):
        """Print the response to a conversation and return it."""
        ids, _ = encode_conversation(self.tokenizer, messages, self.template)
        return self.write("", ids, [*self.stops, end_of_response(self.tokenizer, self.template)])

    def write(self, text, ids, stops):
        """Print `text` and the continuations of prompt `ids`; stream the first. Return the first sample."""
        cfg, limit = self.cfg, self.model.config.max_position_embeddings
        if len(ids) >= limit:
            raise UserError(f"the prompt's {len(ids)} tokens fill the model's {limit} positions: shorten it")
        started, printed = time.perf_counter(), 0
        sampling = {key: getattr(cfg, key) for key in ("temperature", "top_k", "top_p", "seed")}
        for made in self.model.generate_batch([ids] * cfg.num_samples, cfg.max_new_tokens, stops, **sampling):
            shown = (text + self.tokenizer.decode(made[0])).lstrip()
            if not shown.endswith("\ufffd"):  # wait for the rest of a character
                print(shown[printed:], end="", flush=True)
                printed = len(shown)
        seconds, count = time.perf_counter() - started, sum(map(len, made))
        texts = [(text + self.tokenizer.decode(ids)).lstrip() for ids in made]
        print("\n\n---\n\n".join(texts)[printed:], end="")
        print(f"\n\n[{count} tokens, {count / seconds:.0f} per second]\n")
        return texts[0]

    def converse(self, is_chat):
        """Read lines until the end of input: the user's turns in a chat, or texts to continue."""
        messages = []
        while True:
            try:
                line = input("> ")
                if is_chat:
                    messages.append({"role": "user", "content": line})
                    messages.append({"role": "assistant", "content": self.answer(messages).strip()})
                else:
                    self.continue_text(line)
            except EOFError:
                return print()
            except UserError as e:  # too long: forget the conversation and continue
                print(e)
                messages = []


if __name__ == "__main__":
    run(main, SampleConfig)
