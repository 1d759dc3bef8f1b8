"""support/export_gguf.py: GGUF files, read by the gguf package and by llama.cpp."""

import itertools
import json
from pathlib import Path

import gguf
import pytest
import torch
from conftest import TINY, publish_gemma, random_texts, refused, run_script, sampled
from transformers import AutoModelForCausalLM

from data import fable_grammar
from model import Gemma
from support.export_gguf import add_gguf_tokenizer, export_gguf
from support.settings import UserError
from support.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def unusual(fables_project):
    """A model with unusual settings that all show within a hundred tokens. It was trained a little, so that its
    likeliest token is far ahead of the others."""
    shape = "--sliding_window=12 --query_pre_attn_scalar=23 --rope_linear_factor=8 --rope_theta=500 --head_dim=32"
    run_script(
        fables_project, "train.py", "--dataset=fables", *TINY, *shape.split(), "--hidden_size=64",
        "--num_hidden_layers=4", "--sliding_window_pattern=3", "--max_iters=30", "--eval_interval=30",
        "--learning_rate=0.01", "--out_dir=out/unusual",
    )  # fmt: skip
    return fables_project / "out/unusual/best"


TEXT = "Once upon a time a fox said: 'I'll go!' " * 3


def export(project, model, kind):
    file = project / f"{Path(model).parent.name}-{kind}.gguf"
    sampled(project, f"--model={model}", f"--export_gguf={file}", f"--gguf_type={kind}")
    return file


def greedy(path, ids, count=100):
    """Return the likeliest `count` tokens after ids, past any end-of-text, on which transformers must agree."""
    prompt = torch.tensor([ids])
    ours = [t.item() for t in Gemma.from_pretrained(path).eval().generate(prompt, count, temperature=0)]
    peer = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    peer.generation_config.eos_token_id = None
    mask = torch.ones_like(prompt)  # without it transformers masks the first token, which is also the padding token
    theirs = peer.generate(prompt, attention_mask=mask, max_new_tokens=count, do_sample=False)[0, len(ids) :]
    assert ours == theirs.tolist()
    return ours


@pytest.mark.parametrize("kind", ["f32", "bf16", "f16", "q8_0"])
def test_a_gguf_file_holds_the_weights(fables_project, unusual, kind):
    """Every weight is as exact as its type. llama.cpp expects norms with 1 added."""
    file = gguf.GGUFReader(export(fables_project, unusual, kind))
    tensors = {t.name: torch.tensor(gguf.dequantize(t.data, t.tensor_type)) for t in file.tensors}
    state = Gemma.from_pretrained(unusual).state_dict()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, 4)
    assert len(tensors) == len(state)
    for name, weight in state.items():
        stored = tensors[names.get_name(name, (".weight",))]
        if weight.ndim == 1:
            gain = (1 + weight) * (32 / 23) ** 0.5 if "q_norm" in name else 1 + weight
            torch.testing.assert_close(stored, gain)
        else:
            error = {"f32": 0, "bf16": 2**-8, "f16": 2**-11, "q8_0": 1 / 127}[kind] * weight.abs().max()
            assert (stored - weight).abs().max() <= error, name


def test_llama_cpp_generates_our_tokens(fables_project, unusual):
    """The model has both kinds of layers, a prompt beyond the window, an attention scale and RoPE bases of its own,
    and scaled positions."""
    peer = open_in_llama_cpp(export(fables_project, unusual, "f32"))
    tokenizer = Tokenizer.load(unusual)
    ids = [tokenizer.bos, *map(int, tokenizer.encode(TEXT))]
    assert peer.tokenize(TEXT.encode(), add_bos=True, special=False) == ids
    for text in random_texts(1000):
        assert peer.tokenize(text.encode(), add_bos=False, special=False) == tokenizer.encode(text).tolist()
    assert list(itertools.islice(peer.generate(ids, temp=0, top_k=1, repeat_penalty=1.0), 100)) == greedy(unusual, ids)


def open_in_llama_cpp(file):
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python, which takes minutes to build")
    return llama_cpp.Llama(str(file), n_ctx=512, verbose=False, type_k=llama_cpp.GGML_TYPE_F32,
                           type_v=llama_cpp.GGML_TYPE_F32, swa_full=False)  # fmt: skip


def test_added_tokens_are_written_as_llama_cpp_writes_them(tmp_path):
    """Gemma adds runs of spaces as tokens that are not special. Exported with "▁" for spaces they were never found
    in a text, and llama.cpp wrote "▁▁▁▁if" for four spaces and "if". Reserved tokens are no text."""
    publish_gemma(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    vocab = spec["model"]["vocab"]
    word = next(token for token in vocab if token.startswith("▁") and len(token) > 2)
    reserved = "<unused7>"
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    taken = next(token for token in vocab if token.isalpha())  # its row becomes the reserved token's
    vocab[reserved] = vocab.pop(taken)
    spec["model"]["merges"] = [pair for pair in spec["model"]["merges"] if taken not in (*pair, "".join(pair))]
    spec["added_tokens"] += [{"id": vocab[token], "content": token, **plain} for token in (word, reserved)]
    written = {}

    class Writer:
        def __getattr__(self, name):
            return lambda *args: written.update({name: args[0]})

    add_gguf_tokenizer(Writer(), Tokenizer(spec), max(vocab.values()) + 1)
    tokens, types = written["add_token_list"], written["add_token_types"]
    assert tokens[vocab[word]] == word.replace("▁", " ") and types[vocab[word]] == gguf.TokenType.USER_DEFINED
    assert tokens[vocab[reserved]] == reserved and types[vocab[reserved]] == gguf.TokenType.CONTROL
    other = next(token for token in vocab if token.startswith("▁") and token != word)
    assert tokens[vocab[other]] == other and types[vocab[other]] == gguf.TokenType.NORMAL


def test_llama_cpp_reads_gemmas_tokenizer(fables_project, tmp_path):
    published = publish_gemma(tmp_path / "published", instructed=True)
    peer = open_in_llama_cpp(export(fables_project, published, "f32"))
    tokenizer = Tokenizer.load(published)
    fable, _ = fable_grammar.tell("gguf")
    for text in (fable, "A fox.\n\nÜber <eos> 🦆"):
        assert peer.tokenize(text.encode(), add_bos=True, special=False) == [2, *tokenizer.encode(text).tolist()]
    assert peer.token_eos() == 1 and "<start_of_turn>" in peer.metadata["tokenizer.chat_template"]


@pytest.mark.parametrize(
    "args, message",
    [
        (["--gguf_type=q4_k", "--export_gguf=x.gguf"], "f32, bf16, f16 or q8_0"),
        (["--export_gguf=no/folder/x.gguf"], "no/folder"),
    ],
)
def test_mistakes_of_an_export_end_in_one_line(fables_project, unusual, args, message):
    assert message in refused(fables_project, f"--model={unusual}", *args)


def test_a_model_that_llama_cpp_cannot_compute_is_not_exported(unusual, tmp_path):
    model = Gemma.from_pretrained(unusual)
    model.config.hidden_activation = "relu2"
    with pytest.raises(UserError, match="hidden_activation=relu2"):
        export_gguf(model, Tokenizer.load(unusual), tmp_path / "x.gguf", "f32")
    model.config.hidden_activation, model.config.tie_word_embeddings = "gelu_pytorch_tanh", False  # a field you add
    with pytest.raises(UserError, match="tie_word_embeddings=False"):
        export_gguf(model, Tokenizer.load(unusual), tmp_path / "x.gguf", "f32")
    assert not list(tmp_path.iterdir())
