"""PEFT's adapter_config.json and tensors, and instruct.json, which says how a model or an adapter was tuned."""

from pathlib import Path

from model import read_json, read_tensor, tensor_shapes, weights_fingerprint
from support.settings import UserError, user_errors

# the fields of PEFT's LoraConfig that load_adapter() understands, and their types
ADAPTER_FIELDS = {"r": (int,), "lora_alpha": (int, float), "lora_dropout": (int, float), "use_rslora": (bool,),
                  "target_modules": (str, list)}  # fmt: skip
# fields that do not change what the adapter computes
OTHER_FIELDS = {"peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision",
                "inference_mode", "megatron_core", "qalora_group_size", "corda_config", "lora_ga_config"}  # fmt: skip
# values that do not change it either; other initializations, such as PiSSA's, also change the base model
PLAIN = {"bias": ["none"], "init_lora_weights": [True, "gaussian", "orthogonal", "mica"]}


def read_adapter_config(path):
    """Return adapter_config.json as a dict. Raises ValueError, with the field's name, unless it is plain LoRA."""
    config = {"lora_dropout": 0.0, "use_rslora": False} | read_json(path / "adapter_config.json")
    if config.get("peft_type") != "LORA":
        raise ValueError(f"adapter_config.json: peft_type={config.get('peft_type')!r}, only LORA can be read")
    for key, kinds in ADAPTER_FIELDS.items():
        if type(config.get(key)) not in kinds:
            raise ValueError(f"adapter_config.json: {key}={config.get(key)!r} is not of type {kinds[-1].__name__}")
    if not all(isinstance(target, str) for target in config["target_modules"]):
        raise ValueError("adapter_config.json: target_modules are not names")
    for key in config.keys() - ADAPTER_FIELDS.keys() - OTHER_FIELDS:
        if config[key] and config[key] not in PLAIN.get(key, []):
            raise ValueError(
                f"adapter_config.json: {key}={config[key]!r} is not plain LoRA, and nothing else can be read"
            )
    return config


def read_tensors(file):
    """Return {name: tensor} of a safetensors file."""
    return {name: read_tensor(file, name, "cpu") for name in tensor_shapes(file)}


def read_instruct(path):
    """Return instruct.json, {} if there is none: the chat template, and for an adapter the fingerprint of its base."""
    file = Path(path) / "instruct.json"
    with user_errors(f"{file} is damaged"):
        return read_json(file) if file.exists() else {}


def check_base(adapter, base):
    """Raise UserError if the weights in the directory `base` are not the ones that the adapter was tuned on."""
    expected = read_instruct(adapter).get("base_fingerprint")  # PEFT's own adapters have none
    if expected and expected != weights_fingerprint(base):
        raise UserError(
            f"{adapter} was tuned on other weights than {base} has now: name those by --model, or tune again"
        )
