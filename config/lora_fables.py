# Instruction-tune the quick start's model on tasks about fables, on two CPU cores.
data = "fables"
init_from = "out/fables/best"
out_dir = "out/lora-fables"
forgetting = "fables"
template = "short"
rank = 6
alpha = 12.0
max_records = 8000
max_tokens_per_batch = 4096
max_length = 512
optimizer = "adamw"
learning_rate = 5e-3
warmup_iters = 20
cooldown_frac = 0.5
eval_interval = 1000
log_interval = 20
compile = False
