"""support/adapters.py: adapters in PEFT's format are read, or refused by name."""

import json
import math

import pytest
import torch
from conftest import adapted, base_model, random_tokens
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Gemma3ForCausalLM

from lora import add_lora, load_adapter, lora_layers, save_adapter
from model import Gemma, weights_fingerprint
from support.adapters import check_base
from support.settings import UserError


def peft_adapter(path, **settings):
    """Save an adapter that changes the logits with PEFT, and its base, in the folder `path`. Return PEFT's model and
    its logits."""
    base_model().save_pretrained(path / "base")
    config = PeftConfig(**{"r": 4, "lora_alpha": 9, "target_modules": ["q_proj", "down_proj"]} | settings)
    peer = get_peft_model(Gemma3ForCausalLM.from_pretrained(path / "base"), config).eval()
    peer.save_pretrained(path / "initial")
    with torch.no_grad():
        for name, p in peer.named_parameters():
            if "lora_" in name:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)), alpha=0.05)
    peer.save_pretrained(path / "adapter")
    return peer, peer(random_tokens(2, 20)).logits


@pytest.mark.parametrize(
    "settings, refused",
    [
        ({"use_rslora": True}, None),
        ({"init_lora_weights": False}, None),
        ({"init_lora_weights": "gaussian"}, None),
        ({"init_lora_weights": "orthogonal"}, None),
        ({"init_lora_weights": "mica"}, None),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"init_lora_weights": "pissa_niter_2"}, "init_lora_weights='pissa_niter_2'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"rank_pattern": {"q_proj": 2}}, "rank"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
        ({"rank_pattern": {"q_proj": 4}}, None),
        ({"layers_to_transform": [1]}, None),
        ({"exclude_modules": ["model.layers.0.self_attn.q_proj"]}, None),
        ({"exclude_modules": ["vision_tower"]}, None),
        ({"target_modules": "all-linear"}, None),
        ({"target_modules": r".*\.(q_proj|v_proj)"}, None),
        ({"target_modules": ["self_attn.q_proj", "mlp.up_proj"]}, None),
        ({"target_modules": ["model.layers.0.self_attn.q_proj"]}, None),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens.* belongs to no LoRA of a linear layer"),
        ({"modules_to_save": ["norm"]}, "modules_to_save"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"target_parameters": ["embed_tokens.weight"]}, "target_parameters"),
    ],
)
def test_adapters_of_peft_open_with_its_logits_or_are_refused_by_name(tmp_path, settings, refused):
    """Adapters of PiSSA and OLoRA were once read as plain LoRA, although PEFT changes the base under them too."""
    _, logits = peft_adapter(tmp_path, **settings)
    model = Gemma.from_pretrained(tmp_path / "base").eval()
    if refused:
        with pytest.raises(ValueError, match=refused):
            load_adapter(model, tmp_path / "adapter")
    else:
        torch.testing.assert_close(load_adapter(model, tmp_path / "adapter")(random_tokens(2, 20)), logits)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_that_peft_converted_to_plain_lora_opens(tmp_path, init):
    peer, logits = peft_adapter(tmp_path, init_lora_weights=init)
    peer.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    model = load_adapter(Gemma.from_pretrained(tmp_path / "base").eval(), tmp_path / "plain")
    torch.testing.assert_close(model(random_tokens(2, 20)), logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"r": 4}, "not of rank 4"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(tmp_path, change, message):
    _, model = adapted()
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        load_adapter(base_model(), tmp_path)


def test_any_json_in_an_adapter_config_is_read_or_refused_in_one_line(tmp_path):
    _, model = adapted()
    save_adapter(model, tmp_path)
    file = tmp_path / "adapter_config.json"
    good = json.loads(file.read_text())
    odd = [None, True, -1, 2.5, 10**30, math.nan, "a", [], ["a"], [[]], {}, {"a": 1}]
    for config in [*odd, *({**good, key: value} for key in [*good, "use_dora", "new"] for value in odd)]:
        file.write_text(json.dumps(config))
        try:
            load_adapter(base_model(), tmp_path)
        except ValueError as e:
            assert len(str(e).splitlines()) == 1
        else:
            assert isinstance(config, dict)


def test_an_adapter_knows_the_weights_it_was_tuned_on(tmp_path):
    base, model = adapted()
    base.save_pretrained(tmp_path / "base")
    save_adapter(model, tmp_path / "adapter")
    check_base(tmp_path / "adapter", tmp_path / "base")  # PEFT's own adapters have no fingerprint
    instruct = {"base_fingerprint": weights_fingerprint(tmp_path / "base")}
    (tmp_path / "adapter/instruct.json").write_text(json.dumps(instruct))
    check_base(tmp_path / "adapter", tmp_path / "base")
    base_model(seed=1).save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match=r"other weights than .*base has now.*tune again"):
        check_base(tmp_path / "adapter", tmp_path / "base")


def test_an_adapter_of_a_multimodal_model_opens_as_far_as_it_acts_on_text(tmp_path, capsys):
    """The prefix of its text part has two spellings, by the version of transformers."""
    _, logits = peft_adapter(tmp_path)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    for text_part in ("model.language_model.", "language_model.model."):
        renamed = {
            name.replace("base_model.model.model.", f"base_model.model.{text_part}"): w for name, w in weights.items()
        }
        image = {"base_model.model.model.vision_tower.layers.0.q_proj.lora_A.weight": torch.zeros(4, 8)}
        save_file(renamed | image, file)
        model = load_adapter(Gemma.from_pretrained(tmp_path / "base").eval(), tmp_path / "adapter")
        torch.testing.assert_close(model(random_tokens(2, 20)), logits)
        assert "left out 1 weights of the image encoder" in capsys.readouterr().out


def test_an_adapter_on_some_layers_of_a_kind_names_them_for_peft(tmp_path):
    base_model().save_pretrained(tmp_path / "base")
    model = add_lora(base_model(), rank=2, target_modules="layers.0.self_attn.q_proj,mlp.up_proj")
    for _, layer in lora_layers(model):
        torch.nn.init.normal_(layer.lora_B.weight)
    save_adapter(model, tmp_path / "adapter")
    peer = PeftModel.from_pretrained(Gemma3ForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    tokens = random_tokens(2, 20)
    torch.testing.assert_close(peer(tokens).logits, model.eval()(tokens))
