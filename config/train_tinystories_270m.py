# Train a Gemma 3 270M from scratch on TinyStories, on one good GPU.
#
#     python prepare.py                                    # GPT-2's vocabulary: 50,257 entries, about 4.1 bytes a token
#     python train.py config/train_tinystories_270m.py
#
# The shape is the published 270M's. With GPT-2's vocabulary, rounded up to 50,304, it has 132.5M parameters: 100.3M in
# the blocks and 32.2M in the tied embedding. The other 136M of "270M" are embedding rows for Gemma's 262,144 tokens.
dataset = "tinystories"
out_dir = "out/tinystories-270m"

# 32 rows x 1,024 tokens x 8 micro-batches = 262,144 tokens per step. TinyStories is said to have about 470M tokens
# (train.py prints the epochs when it starts), so 6,000 steps = 1.57G tokens are about 3 epochs. The "150k iterations"
# of other projects count micro-batches, and are 4,687 steps. Here one iteration is one step.
#
# Memory is estimated, except for the 22.5 GB of these settings on an H100 (docs/gpu.md). Any batch size needs 3.3 GB:
# float32 weights 0.53, gradients 0.53, moments 0.66 (Muon 0.40, AdamW 0.26), bfloat16 copies 0.27, the head's chunk of
# logits 0.67, CUDA 0.6. Activations add 0.60 MB per token of a micro-batch, or 0.73 MB on GPUs before Ampere, which
# compute attention in blocks. Without compilation they take twice as much, and the head 2 GB more. Flags for other GPUs
# that keep the tokens per step:
#    8 GB    --batch_size=4 --gradient_accumulation_steps=64                       #  5.8 GB
#   12 GB    --batch_size=8 --gradient_accumulation_steps=32                       #  8.2 GB
#   16 GB    --batch_size=8 --gradient_accumulation_steps=32                       #  8.2 GB (16 rows: 13.1)
#   24 GB    --batch_size=16 --gradient_accumulation_steps=16                      # 13.1 GB
#   80 GB    --batch_size=64 --gradient_accumulation_steps=4                       # 43 GB
# If that is too much, --batch_size=1 --gradient_accumulation_steps=256 takes 4.0 GB; model.py's CHUNK can be lower too.
batch_size = 32
block_size = 1024  # twice the window of 512, so sliding layers do slide
gradient_accumulation_steps = 8
max_iters = 6000

# A high learning rate, with a short warmup and a decay to 0 over the last 40% of steps. Similar published trainers
# raise the rate where they mean to lower it, and keep weights in bfloat16, which rounds such small updates away.
optimizer = "muon"
learning_rate = 2e-3
warmup_iters = 200
schedule = "wsd"
cooldown_frac = 0.4
weight_decay = 0.01
grad_clip = 1.0

eval_interval = 250
eval_tokens = 1_000_000  # of the validation split's 4.8M
log_interval = 10
sample_prompt = "Once upon a time"
