# Train a small Gemma 3 on a text file of TinyStories, on a laptop: about two minutes on two CPU cores.
#
#     python prepare.py --dataset=stories.txt --name=tinystories --tokenizer=bpe:4096
#     python train.py config/train_tinystories_cpu.py
dataset = "tinystories"
out_dir = "out/tinystories-cpu"

hidden_size = 256
intermediate_size = 1024
num_hidden_layers = 6
num_attention_heads = 4
num_key_value_heads = 1
head_dim = 64
sliding_window = 512
max_position_embeddings = 1024

# 8 rows x 512 tokens = 4,096 tokens per step; 220 steps = 0.9M tokens, two minutes on two CPU cores. On the first
# 1.4 MB of TinyStories this is 2.1 epochs, and ends at 1.01 bits per byte on held-out stories. Longer runs memorize so
# little text; with more text, train for more steps.
batch_size = 8
block_size = 512
max_iters = 220

learning_rate = 8e-3
warmup_iters = 10
momentum = 0.8  # in a run of few steps, old gradients should fade sooner

eval_interval = 55
log_interval = 10
sample_prompt = "Once upon a time"
