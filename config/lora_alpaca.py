# Stanford Alpaca's 52,000 instructions on Gemma 3 270M, one epoch, with the defaults of lora.py: rank 8 on all linear
# layers, AdamW at 2.4e-4, warmup and cooldown. For one GPU. Not yet measured.
#
#     python lora.py config/lora_alpaca.py
data = "alpaca"
init_from = "google/gemma-3-270m"
out_dir = "out/lora-alpaca"

epochs = 1.0
max_tokens_per_batch = 16384

eval_interval = 50
