# Instruction-tune the quick start's model on tasks about fables, on two CPU cores, in about six minutes.
#
#     python lora.py config/lora_fables.py
data = "fables"
init_from = "out/fables/best"
out_dir = "out/lora-fables"
template = "short"  # Alpaca's would cost this vocabulary some hundred tokens a record

# rank 16 on all linear layers trains 233,472 of 2.40M parameters, 9.7%; rank 6 follows 1.5 points less
rank = 16
alpha = 32.0

# 6,000 conversations packed into 2,008 rows of 1,091 tokens, 2% of them padding: one epoch, a row an update. In rows
# of 1,789 tokens (--max_tokens_per_batch=2048) training takes a quarter longer and less is followed, 91.7% with rank 6.
max_records = 6000
epochs = 1.0
max_tokens_per_batch = 1100

learning_rate = 8e-3  # half of it followed 86%, this 94%, when each record had a row of its own (one base)
warmup_iters = 20
cooldown_frac = 0.6

log_interval = 50
