# Tune Google's published Gemma 3 270M on Databricks' 15,000 instructions, with the settings of lora_dolly.py. Not yet
# measured. Accept Gemma's terms at https://huggingface.co/google/gemma-3-270m, log in with `hf auth login`, then run
#
#     python lora.py config/lora_gemma3_270m_dolly.py
from config.lora_dolly import *  # noqa: F403

init_from = "google/gemma-3-270m"
out_dir = "out/lora-gemma3-270m-dolly"
