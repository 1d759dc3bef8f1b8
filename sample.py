"""
Read what a model writes, export it for llama.cpp, or publish it.

    python sample.py --start="Once upon"                  # the newest best checkpoint under out/
    python sample.py --out_dir=out/fables --num_samples=4
    python sample.py --model=google/gemma-3-270m-it --instruct="Name three birds."   # any Gemma 3, here or on the Hub
    python sample.py --start=FILE:prompt.txt
    python sample.py --interactive=True                   # keeps asking for a beginning
    python sample.py --adapter=out/lora-fables/best --instruct="What is the lesson of this fable?" --input="Once ..."
    python sample.py --adapter=out/lora-fables/best --interactive=True   # a conversation
    python sample.py --out_dir=out/fables --export_gguf=fables.gguf      # a file for llama.cpp and Ollama
    python sample.py --out_dir=out/fables --push_to_hub=USER/NAME        # to the Hugging Face Hub, with a model card
"""

import json
import os
import re
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from config import NO_LIMIT, UserError, check_range, run, user_errors
from lora import HUB_RECORDS, check_base, encode_conversation, end_of_response, load_adapter, merge_lora, template_of
from model import SLIDING, read_json
from prepare import GPT2_PATTERN, ON_THE_HUB, Tokenizer, hub_directory, intact_dir, is_hub_id
from train import can_compile, open_model, pick_device, pick_dtype, read_log, runtime_errors


@dataclass
class SampleConfig:
    start: str = ""  # the beginning of the text; FILE:path reads it from a file; empty: a new document
    out_dir: str = ""  # sample from the best checkpoint of this run; empty: of the newest run under out/
    model: str = ""  # or from this model directory, or a Hub id of a Gemma 3
    adapter: str = ""  # a LoRA adapter to put on it; the model is by default the one it was trained on
    instruct: str = ""  # an instruction to answer, rendered as in training
    input: str = ""  # the text the instruction is about
    compare: bool = False  # answer the instruction without the adapter first
    num_samples: int = 1  # texts from the same beginning, made as one batch
    max_new_tokens: int = 300  # stop here, if not at end-of-text before
    temperature: float = 0.8  # 0: always the likeliest token; 1: as the model has it
    top_k: int = 0  # draw from the k likeliest tokens; 0: from all
    top_p: float = 1.0  # draw from the smallest set of tokens with this mass
    seed: int = 1337  # the same seed gives the same text
    interactive: bool = False  # read lines from the terminal: beginnings to continue, or with an adapter a conversation
    export_gguf: str = ""  # write the model, with the adapter merged in, to this file instead of sampling
    gguf_type: str = "bf16"  # what its matrices are stored as: f32, bf16, f16 or q8_0
    push_to_hub: str = ""  # upload the model, or the adapter alone, to this repository, USER/NAME, instead of sampling
    device: str = "auto"  # auto, cpu, cuda, mps
    dtype: str = "auto"  # bfloat16, float32; auto: bfloat16 where it is fast
    compile: bool = False  # torch.compile the step that makes a token: pays back after some thousand of them

    def __post_init__(self):
        check_range(self, 1, NO_LIMIT, "num_samples")
        check_range(self, 1e-6, 1, "top_p")
        if self.gguf_type not in ("f32", "bf16", "f16", "q8_0"):
            raise ValueError(f"gguf_type={self.gguf_type!r} must be f32, bf16, f16 or q8_0")
        if self.export_gguf and not (folder := Path(self.export_gguf).parent).is_dir():
            raise ValueError(f"export_gguf={self.export_gguf}: no folder {folder}")
        if self.export_gguf and os.path.isdir(self.export_gguf):
            raise ValueError(f"export_gguf={self.export_gguf} is a folder: name a file")
        if self.push_to_hub and not is_hub_id(self.push_to_hub):
            raise ValueError(f"push_to_hub={self.push_to_hub} must be USER/NAME, of no folder here")
        if self.compare and not (self.adapter and self.instruct):
            raise ValueError("compare needs an adapter and an instruct to answer")


@runtime_errors("lower num_samples or max_new_tokens")
def main(cfg):
    device = pick_device("cpu" if cfg.export_gguf else cfg.device)
    dtype = pick_dtype("float32" if cfg.export_gguf else cfg.dtype, device)
    adapter = hub_directory(cfg.adapter) if cfg.adapter else None
    path = find_checkpoint(cfg, adapter)
    if cfg.push_to_hub:
        return push_to_hub(cfg, path, adapter)
    model = open_model(path, device, dtype).eval()
    tokenizer = Tokenizer.load(path)
    template = (adapter and template_of(adapter, tokenizer)) or template_of(path, tokenizer)
    writer = Writer(cfg, model, tokenizer, template)
    asked = [{"role": "user", "content": cfg.instruct, "input": cfg.input}]
    print(f"[{path}{f' with {adapter}' if adapter else ''}]\n")
    if cfg.compare:
        print("base:\n")
        writer.answer(asked)
        print("tuned:\n")
    if adapter:
        check_base(adapter, path)
        with user_errors(f"--adapter={cfg.adapter}"):
            load_adapter(model, adapter).to(dtype).eval()
    if cfg.export_gguf:
        tokenizer.config |= {"chat_template": template} if template else {}  # the adapter's, where that has one
        return export_gguf(merge_lora(model), tokenizer, cfg.export_gguf, cfg.gguf_type)
    if cfg.compile and can_compile(device):
        model.compile_step()
    if cfg.interactive:
        writer.converse(takes_turns=bool(adapter or template))
    elif cfg.instruct:
        writer.answer(asked)
    else:
        writer.continue_text(read_start(cfg.start))


def find_checkpoint(cfg, adapter):
    """The model directory that the settings name, or that the adapter was trained on."""
    if cfg.model:
        path = hub_directory(cfg.model)
    elif adapter:
        with user_errors(f"--adapter={cfg.adapter}: no adapter here"):
            base = read_json(adapter / "adapter_config.json")["base_model_name_or_path"]
        if not base:
            raise UserError(f"--adapter={cfg.adapter}: does not say what it was trained on: name it by --model")
        path = hub_directory(base)
    elif cfg.out_dir:
        path = intact_dir(Path(cfg.out_dir) / "best")
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


def read_start(text):
    if not text.startswith("FILE:"):
        return text
    with user_errors(f"--start={text}"):
        return Path(text[5:]).read_text(encoding="utf-8-sig")


class Writer:
    """A model that writes to the terminal. template: of the instructions that it knows, None for a plain model."""

    def __init__(self, cfg, model, tokenizer, template):
        self.cfg, self.model, self.tokenizer, self.template = cfg, model, tokenizer, template
        ends = model.config.eos_token_id
        self.stops = [tokenizer.eot, *(ends if isinstance(ends, list) else [])]

    def continue_text(self, text):
        return self.write(text, [self.tokenizer.bos, *self.tokenizer.encode(text).tolist()], self.stops)

    def answer(self, messages):
        """The response to a conversation (lora.py says what messages are), printed and returned."""
        template = self.template or "alpaca"
        ids, _ = encode_conversation(self.tokenizer, messages, template)
        return self.write("", ids, [*self.stops, end_of_response(self.tokenizer, template)])

    def write(self, text, ids, stops):
        """Print what follows the prompt `ids`, of which `text` shows; one sample streams, several come when all are
        done. Returns the first."""
        cfg, limit = self.cfg, self.model.config.max_position_embeddings
        if len(ids) >= limit:
            raise UserError(
                f"the prompt's {len(ids)} tokens leave no room in the model's {limit} positions: shorten it"
            )
        started, printed = time.perf_counter(), 0
        steps = self.model.generate_batch(
            [ids] * cfg.num_samples, cfg.max_new_tokens, stops, temperature=cfg.temperature, top_k=cfg.top_k,
            top_p=cfg.top_p, seed=cfg.seed,
        )  # fmt: skip
        for made in steps:
            if cfg.num_samples == 1:
                shown = self.shown(text, made[0])
                if not shown.endswith("\ufffd"):  # not in the middle of a character
                    print(shown[printed:], end="", flush=True)
                    printed = len(shown)
        seconds, count = time.perf_counter() - started, sum(map(len, made))
        texts = [self.shown(text, sample) for sample in made]
        print("\n\n---\n\n".join(texts)[printed:], end="")
        print(f"\n\n[{count} tokens, {count / seconds:.0f} per second]\n")
        return texts[0]

    def shown(self, text, made):
        return (text + self.tokenizer.decode(made)).lstrip()

    def converse(self, takes_turns):
        """Read lines until the end of input: the user's turns of one conversation, or beginnings to continue."""
        messages = []
        while True:
            try:
                line = input("> ")
            except EOFError:
                return print()
            try:
                if takes_turns:
                    messages.append({"role": "user", "content": line})
                    messages.append({"role": "assistant", "content": self.answer(messages).strip()})
                else:
                    self.continue_text(line)
            except UserError as e:  # too long: forget what was said and go on
                print(e)
                messages = []


# ---- export ----------------------------------------------------------------------------------------------------------


def export_gguf(model, tokenizer, path, matrix_type):
    """Write a float32 model and its tokenizer as a GGUF file, which llama.cpp and what is built on it read.

    matrix_type: f32, bf16, f16 or q8_0. Names, shapes and metadata are those of llama.cpp's conversion/gemma.py."""
    import gguf  # needed for this alone

    c = model.config
    if c.hidden_activation != "gelu_pytorch_tanh":
        raise UserError(f"llama.cpp's Gemma 3 has no hidden_activation={c.hidden_activation}")
    writer = gguf.GGUFWriter(f"{path}.part", "gemma3")
    writer.add_name(Path(path).stem)
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if matrix_type == "f32" else f"MOSTLY_{matrix_type.upper()}"])
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_sliding_window(c.sliding_window)
    writer.add_sliding_window_pattern([kind == SLIDING for kind in c.layer_types])
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_rope_freq_base_swa(c.rope_local_base_freq)
    if c.rope_linear_factor != 1:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(c.rope_linear_factor)
    add_gguf_tokenizer(writer, tokenizer, c.vocab_size)
    add_gguf_weights(writer, model, matrix_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(f"{path}.part", path)
    runner = "llama-cli" if tokenizer.config.get("chat_template") else 'llama-completion -no-cnv -p "Once"'
    print(f"{path}: {os.path.getsize(path) / 1e6:,.1f} MB; {runner} -m {path} runs it, or docs/play.html in a browser")


def add_gguf_weights(writer, model, matrix_type):
    """The tensors: matrices in the wanted type, where it takes them, and norms in float32."""
    import gguf
    from gguf import GGMLQuantizationType as Type

    c, wanted = model.config, Type[matrix_type.upper()]
    # llama.cpp knows the attention scale of each published size; ours, where it differs, goes into the queries' norm
    theirs = c.hidden_size // c.num_attention_heads if c.num_hidden_layers == 62 else c.head_dim
    query_scale = (theirs / c.query_pre_attn_scalar) ** 0.5
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, c.num_hidden_layers)
    for name, weight in model.state_dict().items():
        array, stored = weight.float().cpu().numpy(), wanted
        if array.ndim == 1:  # a norm: its gain is 1 + weight here and weight there
            array, stored = (1 + array) * (query_scale if name.endswith("q_norm.weight") else 1), Type.F32
        elif wanted == Type.Q8_0 and array.shape[1] % 32:  # blocks of 32 don't fit
            stored = Type.BF16
        writer.add_tensor(names.get_name(name, (".weight",)), gguf.quantize(array, stored), raw_dtype=stored)


def add_gguf_tokenizer(writer, tokenizer, num_rows):
    """The tokenizer, as llama.cpp's "gpt2" kind where it is byte-level BPE cut as GPT-2's is, as its "llama" kind where
    it is BPE with byte fallback as Gemma's. num_rows: of the embedding, which the list of tokens must match."""
    from gguf import TokenType

    model, added = tokenizer.spec["model"], tokenizer.spec["added_tokens"]
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    tokens = [f"[unused{i}]" for i in range(num_rows)]
    types = [TokenType.UNUSED] * num_rows
    for text, i in model["vocab"].items():
        is_byte = model.get("byte_fallback") and re.fullmatch("<0x[0-9A-F]{2}>", text)
        tokens[i], types[i] = text, TokenType.BYTE if is_byte else TokenType.NORMAL
    for token in added:
        if token["id"] < num_rows:  # published models have no row for <image_soft_token>
            kind = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
            tokens[token["id"]], types[token["id"]] = token["content"], kind
    if tokenizer.bpe and tokenizer.bpe._pat_str == GPT2_PATTERN:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_merges([" ".join(pair) for pair in merges])
    elif model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        ranks = {a + b: rank for rank, (a, b) in reversed(list(enumerate(merges)))}
        writer.add_token_scores([-float(ranks.get(text, len(merges))) for text in tokens])  # the highest merges first
        writer.add_add_space_prefix(False)
    else:
        raise UserError("GGUF export knows two ways to cut words, GPT-2's (gpt2, bpe:SIZE) and Gemma's: not this one")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_bos_token_id(tokenizer.bos)
    writer.add_eos_token_id(tokenizer.eot)
    writer.add_pad_token_id(tokenizer.pad)
    writer.add_add_bos_token(True)
    if chat := tokenizer.config.get("chat_template"):
        writer.add_chat_template(chat)


# ---- publishing ------------------------------------------------------------------------------------------------------


def push_to_hub(cfg, path, adapter):
    """Upload a model, or an adapter alone, as a whole repository of the Hub: with a card, loss.png and a sample."""
    from huggingface_hub import HfApi, errors

    name, api, base = cfg.push_to_hub, HfApi(), None
    if adapter:
        check_base(adapter, path)
        named = read_json(adapter / "adapter_config.json")["base_model_name_or_path"]
        if not (base := next(filter(is_hub_id, (cfg.model, named)), None)):
            raise UserError(f"first push what {adapter} was tuned on, --model={path} --push_to_hub=USER/BASE, then "
                            f"name it, --adapter={adapter} --model=USER/BASE --push_to_hub={name}")  # fmt: skip
    with user_errors(f"--push_to_hub={name}: not uploaded, check the network"), tempfile.TemporaryDirectory() as folder:
        try:
            write_repository(Path(folder), adapter or path, name, base, api.file_exists(name, "README.md"))
            url = api.create_repo(name, exist_ok=True)
            api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload from nanoGemma")
        except errors.HfHubHTTPError as e:
            why = {401: "not logged in: `hf auth login`, with a token that can write",
                   403: "no right to write there: `hf auth login`, with a token that has it"}  # fmt: skip
            why = why.get(e.response.status_code, e.server_message or e.response.reason_phrase)
            raise UserError(f"--push_to_hub={name}: {why}") from None
    print(f"{url}: uploaded; the license in its README.md is for you to fill in")


def write_repository(folder, source, name, base, is_update):
    """Copy the files of a model or an adapter (never train_state.pt) and loss.png, and write the model card."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    run = source.parent if (source.parent / "summary.json").exists() else source  # a foreign directory is no run's
    files = [file for kind in ("*.json", "*.safetensors", "*.jinja") for file in source.glob(kind)]
    for file in [*files, *run.glob("loss.png")]:
        shutil.copy(file, folder)
    if base:
        config = read_json(source / "adapter_config.json") | {"base_model_name_or_path": base}
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    there = ModelCard.load(name).data.to_dict() if is_update else {}  # where the license may be filled in by now
    tokenizer, summary = Tokenizer.load(source), {"settings": {}, "metrics": {}}
    with user_errors(f"{run / 'summary.json'} is damaged"):
        summary = read_json(run / "summary.json") if (run / "summary.json").exists() else summary
        settings = summary["settings"]
        data, init = settings.get("dataset") or settings.get("data") or "", settings.get("init_from") or ""
        data = (ON_THE_HUB | HUB_RECORDS).get(data, data if is_hub_id(data) else Path(data).stem)
        results = [EvalResult("text-generation", data, data, *metric) for metric in summary["metrics"].items()]
        about = ModelCardData(
            library_name="peft" if base else "transformers", pipeline_tag="text-generation", tags=["gemma3"],
            base_model=base or (init if is_hub_id(init) else None), datasets=[data] if is_hub_id(data) else None,
            eval_results=results or None, model_name=name.split("/")[1] if results else None,
            **{key: there[key] for key in there if key.startswith("license")},
        )  # fmt: skip
        ModelCard.from_template(
            about, Path(__file__).parent / "docs/model_card.md", name=name, run=summary,
            sample=[entry["sample"] for entry in read_log(run / "log.jsonl") if entry.get("sample")][-1:],
            has_loss=(folder / "loss.png").exists(), chat=bool(tokenizer.config.get("chat_template")),
            start=tokenizer.bos_token * (tokenizer.bos_token not in str(tokenizer.spec.get("post_processor"))),
        ).save(folder / "README.md")  # fmt: skip


if __name__ == "__main__":
    run(main, SampleConfig)
