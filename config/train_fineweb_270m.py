# Train a Gemma 3 270M from scratch on FineWeb-Edu: an example of a larger run, on one machine with eight GPUs.
#
#     python prepare.py --dataset=HuggingFaceFW/fineweb-edu --subset=sample-10BT --streaming=True --name=fineweb \
#         --val_fraction=0.0005
#     torchrun --standalone --nproc_per_node=8 train.py config/train_fineweb_270m.py
#
# The published sample has about 10 billion GPT-2 tokens, which take 20 GB on disk. Joining takes 20 GB more.
# Not yet measured.
from config.train_tinystories_270m import *  # noqa: F403

dataset = "fineweb"
out_dir = "out/fineweb-270m"

# 32 rows x 1,024 tokens x 16 micro-batches = 524,288 tokens per step: two micro-batches for each of eight GPUs.
# 19,000 steps = 9.96G tokens are a little less than one epoch of the sample, because rows that begin with a document
# repeat some text (train.py prints how much when it starts).
gradient_accumulation_steps = 16
max_iters = 19_000
warmup_iters = 500

eval_interval = 500
eval_tokens = 2_000_000
sample_prompt = "The water cycle"
