# Gemma 3 270M on FineWeb-Edu, from scratch: the worked example of a larger run, on one machine with eight GPUs.
#
#     python prepare.py --dataset=HuggingFaceFW/fineweb-edu --subset=sample-10BT --streaming=True --name=fineweb \
#         --val_fraction=0.0005
#     torchrun --standalone --nproc_per_node=8 train.py config/train_fineweb_270m.py
#
# The sample has about 10 billion GPT-2 tokens as published, 20 GB of bins; streamed, it needs no other space. Not yet
# measured.
from config.train_tinystories_270m import *  # noqa: F403

dataset = "fineweb"
out_dir = "out/fineweb-270m"

# 32 rows x 1,024 tokens x 16 micro-batches = 524,288 tokens an update: two micro-batches for each of eight GPUs.
# 19,000 updates = 9.96G tokens, a little less than once through the sample: rows that begin where documents begin
# repeat some text (the plan at the start says how much).
gradient_accumulation_steps = 16
max_iters = 19_000
warmup_iters = 500

eval_interval = 500
eval_tokens = 2_000_000
sample_prompt = "The water cycle"
