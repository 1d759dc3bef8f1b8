"""Export to GGUF, the file format of llama.cpp and the programs built on it."""

import os
import re
from pathlib import Path

import gguf
from gguf import GGMLQuantizationType as Type
from gguf import TokenType

from model import FULL, GEMMA3_CONSTANTS, SLIDING
from support.settings import UserError
from support.tokenizer import GPT2_PATTERN, byte_level_bpe


def export_gguf(model, tokenizer, path, matrix_type):
    """Write a float32 model and its tokenizer as a GGUF file. Raises UserError for a model that llama.cpp cannot run.
    matrix_type: f32, bf16, f16 or q8_0. Names, shapes and metadata are those of llama.cpp's conversion/gemma.py."""
    c = model.config
    for key, value in {"hidden_activation": "gelu_pytorch_tanh", **GEMMA3_CONSTANTS}.items():
        if getattr(c, key, value) != value:
            raise UserError(f"llama.cpp's Gemma 3 has no {key}={getattr(c, key)}")
    writer = gguf.GGUFWriter(f"{path}.part", "gemma3")
    writer.add_name(Path(path).stem)
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if matrix_type == "f32" else f"MOSTLY_{matrix_type.upper()}"])
    settings = {
        "context_length": c.max_position_embeddings, "embedding_length": c.hidden_size, "key_length": c.head_dim,
        "head_count": c.num_attention_heads, "head_count_kv": c.num_key_value_heads, "value_length": c.head_dim,
        "block_count": c.num_hidden_layers, "feed_forward_length": c.intermediate_size, "rope_freq_base": c.rope_theta,
        "rope_freq_base_swa": c.rope_local_base_freq, "layer_norm_rms_eps": c.rms_norm_eps,
        "sliding_window": c.sliding_window,
        "sliding_window_pattern": [{SLIDING: True, FULL: False}[kind] for kind in c.layer_types],
    }  # fmt: skip
    for key, value in settings.items():
        getattr(writer, f"add_{key}")(value)
    if c.rope_linear_factor != 1:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(c.rope_linear_factor)
    add_gguf_tokenizer(writer, tokenizer, c.vocab_size)
    # llama.cpp derives the attention scale from the model size; if ours differs, q_norm corrects it
    theirs = c.hidden_size // c.num_attention_heads if c.num_hidden_layers == 62 else c.head_dim
    query_scale = (theirs / c.query_pre_attn_scalar) ** 0.5
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, c.num_hidden_layers)
    for name, weight in model.state_dict().items():
        array, stored = weight.float().cpu().numpy(), Type[matrix_type.upper()]
        if array.ndim == 1:  # a norm: its gain is 1 + weight here, and weight in llama.cpp
            array, stored = (1 + array) * (query_scale if name.endswith("q_norm.weight") else 1), Type.F32
        elif stored == Type.Q8_0 and array.shape[1] % 32:  # q8_0 has blocks of 32 numbers
            stored = Type.BF16
        writer.add_tensor(names.get_name(name, (".weight",)), gguf.quantize(array, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(f"{path}.part", path)
    runner = "llama-cli" if tokenizer.config.get("chat_template") else 'llama-completion -no-cnv -p "Once"'
    print(f"{path}: {os.path.getsize(path) / 1e6:,.1f} MB; {runner} -m {path} runs it, or docs/play.html in a browser")


def add_gguf_tokenizer(writer, tokenizer, num_rows):
    """Add the tokenizer: as llama.cpp's "gpt2" if it is byte-level BPE that splits words like GPT-2, or as "llama" if
    it is BPE with byte fallback like Gemma's. num_rows: rows of the embedding, each of which gets a token."""
    model = tokenizer.spec["model"]
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    tokens, types = [f"[unused row {i}]" for i in range(num_rows)], [TokenType.UNUSED] * num_rows
    for text, i in model["vocab"].items():
        is_byte = model.get("byte_fallback") and re.fullmatch("<0x[0-9A-F]{2}>", text)
        tokens[i], types[i] = text, TokenType.BYTE if is_byte else TokenType.NORMAL
    # as in llama.cpp's converter: reserved tokens never match plain text, the other added tokens do
    reserved = r"<pad>|<mask>|<2mass>|\[@BOS@\]|<unused.*>|<[|｜].*[|｜]>"
    for token in tokenizer.spec["added_tokens"]:
        text, i = token["content"], token["id"]
        if i < num_rows:  # published models have no row for <image_soft_token>
            is_control = token["special"] or re.fullmatch(reserved, text)
            tokens[i] = text if is_control else text.replace("▁", " ")
            types[i] = TokenType.CONTROL if is_control else TokenType.USER_DEFINED
    bpe = byte_level_bpe(tokenizer.spec, tokenizer.ids_of_markers)
    if bpe and bpe._pat_str == GPT2_PATTERN:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_merges([" ".join(pair) for pair in merges])
    elif model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        ranks = {a + b: rank for rank, (a, b) in reversed(list(enumerate(merges)))}
        writer.add_token_scores([-float(ranks.get(text, len(merges))) for text in tokens])
        writer.add_add_space_prefix(False)
    else:
        raise UserError("GGUF export supports tokenizers like GPT-2's (gpt2, bpe:SIZE) and Gemma's, but not this one")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_bos_token_id(tokenizer.bos)
    writer.add_eos_token_id(tokenizer.eot)
    writer.add_pad_token_id(tokenizer.pad)
    writer.add_add_bos_token(True)
    if chat := tokenizer.config.get("chat_template"):
        writer.add_chat_template(chat)
