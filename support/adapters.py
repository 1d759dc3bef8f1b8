"""PEFT's adapter_config.json and tensors, and instruct.json, which says how a model or an adapter was tuned."""

from pathlib import Path

from model import read_json, read_tensor, tensor_shapes, weights_fingerprint
from support.settings import UserError, user_errors

# the fields of PEFT's LoraConfig that load_adapter() understands, and their types
ADAPTER_FIELDS = {"r": (int,), "lora_alpha": (int, float), "lora_dropout": (int, float), "use_rslora": (bool,)}
# fields that do not change the adapter's output; the layers that it adapts follow from the names of its weights
OTHER_FIELDS = {"peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "rank_pattern",
                "inference_mode", "megatron_core", "qalora_group_size", "corda_config", "lora_ga_config",
                "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "revision"}  # fmt: skip
# values that do not change the output either; other initializations, such as PiSSA's, change the base model too
PLAIN = {"bias": ["none"], "init_lora_weights": [True, "gaussian", "orthogonal", "mica"]}
MERGE = "merge it with PEFT's merge_and_unload() and use the merged model"


def read_adapter_config(path):
    """Return adapter_config.json as a dict. Raises ValueError, naming the field, unless it is plain LoRA."""
    config = {"lora_dropout": 0.0, "use_rslora": False} | read_json(path / "adapter_config.json")
    if config.get("peft_type") != "LORA":
        raise ValueError(f"adapter_config.json: peft_type={config.get('peft_type')!r}, only LORA can be read")
    for key, kinds in ADAPTER_FIELDS.items():
        if type(config.get(key)) not in kinds:
            raise ValueError(f"adapter_config.json: {key}={config.get(key)!r} is not of type {kinds[-1].__name__}")
    for key in config.keys() - ADAPTER_FIELDS.keys() - OTHER_FIELDS:
        if config[key] and config[key] not in PLAIN.get(key, []):
            raise ValueError(f"adapter_config.json: {key}={config[key]!r} is not plain LoRA; {MERGE}")
    return config


def read_adapter_weights(path):
    """Return {our name: tensor} of an adapter. Skip weights of the image encoder, and print how many."""
    tensors = read_tensors(path / "adapter_model.safetensors")
    names = [name for name in tensors if "vision_tower." not in name and "multi_modal_projector." not in name]
    if others := [name for name in names if not name.endswith((".lora_A.weight", ".lora_B.weight"))]:
        raise ValueError(f"adapter_model.safetensors: {others[0]} belongs to no LoRA of a linear layer; {MERGE}")
    if images := len(tensors) - len(names):
        print(f"{path}: left out {images} weights of the image encoder: only the text part is read")
    if not names:
        raise ValueError("adapter_model.safetensors has no weights of the text part")
    # the text part of a multimodal model has a prefix
    return {n.removeprefix("base_model.model.").replace("language_model.", "", 1): tensors[n] for n in names}


def read_tensors(file):
    """Return {name: tensor} of a safetensors file."""
    return {name: read_tensor(file, name, "cpu") for name in tensor_shapes(file)}


def read_instruct(path):
    """Return instruct.json, or {} if it is missing: the chat template, and the fingerprint of an adapter's base."""
    file = Path(path) / "instruct.json"
    with user_errors(f"{file} is damaged"):
        return read_json(file) if file.exists() else {}


def check_base(adapter, base):
    """Raise UserError if the weights in the directory `base` are not the ones that the adapter was tuned on."""
    expected = read_instruct(adapter).get("base_fingerprint")  # PEFT's own adapters have none
    if expected and expected != weights_fingerprint(base):
        raise UserError(f"{adapter} was tuned on other weights than {base} has now: name the original by --model, or "
                        "tune again")  # fmt: skip
