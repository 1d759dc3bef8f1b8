# Instruction-tune the quick start's model on tasks about fables, on two CPU cores, in about three minutes.
#
#     python lora.py config/lora_fables.py
data = "fables"
init_from = "out/fables/best"
out_dir = "out/lora-fables"
forgetting = "fables"
template = "short"  # Alpaca's would cost this vocabulary some hundred tokens a record

# rank 6 on all linear layers trains 87,552 of 2.25M parameters, 3.9%
rank = 6
alpha = 12.0

# one epoch of 8,000 records in batches of up to 4,096 tokens: about 500 updates, 2M tokens
max_records = 8000
max_tokens_per_batch = 4096

optimizer = "adamw"
learning_rate = 5e-3
warmup_iters = 20
cooldown_frac = 0.5

eval_interval = 1000
log_interval = 20
compile = False  # batches come in many shapes
