# Databricks' 15,000 instructions on a Gemma 3, with the settings of a known Keras walk-through of Gemma and LoRA: rank
# 4, AdamW at 5e-5, weight decay 0.01, one record a batch, one epoch. Not yet measured.
#
#     python lora.py config/lora_dolly.py --init_from=google/gemma-3-1b-pt
data = "dolly"
out_dir = "out/lora-dolly"

rank = 4
alpha = 4.0
epochs = 1.0
batch_size = 1
max_length = 512

learning_rate = 5e-5
weight_decay = 0.01
beta2 = 0.999
warmup_iters = 0
cooldown_frac = 0.0  # the rate stays as it is

eval_interval = 2000
log_interval = 50
