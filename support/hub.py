"""Downloads from the Hugging Face Hub. HF_HUB_OFFLINE=1 in the environment allows only earlier downloads."""

import os
import re
from pathlib import Path

from support.documents import kind_of
from support.settings import UserError, user_errors

TEXTS_ON_THE_HUB = {"tinystories": "roneneldan/TinyStories"}
RECORDS_ON_THE_HUB = {"alpaca": "tatsu-lab/alpaca", "dolly": "databricks/databricks-dolly-15k"}


def is_hub_id(name):
    """Return whether a name looks like USER/REPOSITORY and is not a path on this disk."""
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name))) and not os.path.exists(name)


def hub_directory(name, files=("*.json", "*.safetensors", "*.jinja")):
    """Return `name` as a path. If it is a Hub id, download the repository's `files` first."""
    if not is_hub_id(name):
        return Path(name)
    with user_errors(f"{name}: not a directory here, and not downloaded from the Hugging Face Hub"):
        from huggingface_hub import errors, snapshot_download

        try:
            return Path(snapshot_download(name, allow_patterns=list(files)))
        except errors.GatedRepoError:
            why = f"gated: accept its terms at https://huggingface.co/{name}, then log in with `hf auth login`"
        except errors.RepositoryNotFoundError:
            why = "neither a directory here nor a repository on the Hub (a private one needs `hf auth login`)"
        except errors.LocalEntryNotFoundError:
            why = "not a directory here nor an earlier download, and the Hugging Face Hub does not answer"
        raise UserError(f"{name}: {why}")


def load_dataset_from_hub(name, flag, subset="", streaming=False):
    """Return {"train": rows, "val": rows} of a dataset on the Hub, without "val" if it has no split "validation". Print
    which splits are left out. flag: the setting that names it, for error messages."""
    if kind_of(name) or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise UserError(f"--{flag}={name!r}: no such file or folder, and not the name of a dataset")
    with user_errors(f"--{flag}={name}: not a file or folder here, and not downloaded from the Hugging Face Hub"):
        import datasets  # slow to import

        splits = datasets.load_dataset(name, subset or None, streaming=streaming)
    train = "train" if "train" in splits else next(iter(splits))
    used = {"train": train} | ({"val": "validation"} if "validation" in splits.keys() - {train} else {})
    if others := sorted(splits.keys() - used.values()):
        print(f"{name}: left out the splits {', '.join(others)}")
    return {ours: splits[theirs] for ours, theirs in used.items()}
