# Gemma 3 270M on TinyStories, from scratch, on one good GPU.
#
#     python prepare.py                                    # GPT-2's vocabulary: 50,257 entries, about 4.1 bytes a token
#     python train.py config/train_tinystories_270m.py
#
# The shape is the published 270M's. With GPT-2's vocabulary, rounded up to 50,304, that is 132.5M parameters: 100.3M in
# the blocks and 32.2M in the tied embedding (the other 136M of "270M" are rows for Gemma's 262,144 tokens).
dataset = "tinystories"
out_dir = "out/tinystories-270m"

# 32 rows x 1,024 tokens x 8 micro-batches = 262,144 tokens an update. TinyStories has about 470M tokens (as published;
# the plan at the start counts them), so 6,000 updates = 1.57G tokens are about 3 epochs. "150k iterations" of other
# projects are micro-batches, 4,687 updates; one iteration here is one update.
#
# Memory, estimated but for the H100's 22.5 GB as it stands here (docs/gpu.md). 3.3 GB whatever the batch: float32
# weights 0.53, gradients 0.53, moments 0.66 (Muon 0.40, AdamW 0.26), bfloat16 copies 0.27, the head's chunk of logits
# 0.67, CUDA 0.6. Beside it 0.60 MB a token of a micro-batch for activations, 0.73 on GPUs that attend in blocks (all
# before Ampere); not compiled twice that, and 2 GB more for the head. Same updates, to add to the command line:
#    8 GB    --batch_size=4 --gradient_accumulation_steps=64                       #  5.8 GB
#   12 GB    --batch_size=8 --gradient_accumulation_steps=32                       #  8.2 GB
#   16 GB    --batch_size=8 --gradient_accumulation_steps=32                       #  8.2 GB (16 rows: 13.1)
#   24 GB    --batch_size=16 --gradient_accumulation_steps=16                      # 13.1 GB
#   80 GB    --batch_size=64 --gradient_accumulation_steps=4                       # 43 GB
# Still too much: --batch_size=1 --gradient_accumulation_steps=256 takes 4.0 GB, and the head's chunk (model.py's CHUNK)
# can be made smaller.
batch_size = 32
block_size = 1024  # twice the window of 512, so sliding layers do slide
gradient_accumulation_steps = 8
max_iters = 6000

# A high rate, warmed up briefly, held, and brought down to 0 over the last 40% of updates. The published look-alikes
# raise it where they mean to lower it, and keep weights in bfloat16, where an update this small is rounded away.
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
