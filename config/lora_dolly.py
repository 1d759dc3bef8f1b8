# Databricks' 15,000 instructions on any Gemma 3, one epoch, with lora.py's defaults. Not yet measured.
#
#     python lora.py config/lora_dolly.py --init_from=google/gemma-3-1b-pt
data = "dolly"
out_dir = "out/lora-dolly"

epochs = 1.0

eval_interval = 100
