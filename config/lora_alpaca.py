# Stanford Alpaca's 52,000 instructions on Gemma 3 itself, with the settings usual for LoRA: rank 16 on all linear
# layers, AdamW at 2e-4, warmup and cosine decay, one epoch. One GPU; not yet measured.
#
#     python lora.py config/lora_alpaca.py
data = "alpaca"
init_from = "google/gemma-3-270m"
out_dir = "out/lora-alpaca"

rank = 16
alpha = 32.0
lora_dropout = 0.05
epochs = 1.0
max_length = 512
max_tokens_per_batch = 16384

learning_rate = 2e-4
schedule = "cosine"
warmup_iters = 30

eval_interval = 100
