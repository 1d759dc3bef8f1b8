# A smaller Gemma 3 on TinyStories with a vocabulary of our own: 6 layers, 2 key/value heads, a window of 128.
#
#     python prepare.py --tokenizer=bpe:32768 --name=tinystories-bpe32k
#     python train.py config/train_tinystories_90m.py
#
# The name is that of a published run whose width, depth, heads, window and vocabulary these are; with a tied embedding
# and this MLP it has 39.6M parameters, 16.8M of them in the embedding.
dataset = "tinystories-bpe32k"
out_dir = "out/tinystories-90m"

hidden_size = 512
intermediate_size = 2048
num_hidden_layers = 6
num_attention_heads = 8
num_key_value_heads = 2
head_dim = 64
sliding_window = 128
max_position_embeddings = 2048

# 128 rows x 256 tokens x 2 micro-batches = 65,536 tokens an update; 25,000 updates = 1.64G tokens, about 3.5
# epochs (the plan at the start has the exact number). Not yet measured on any hardware.
batch_size = 128
block_size = 256
gradient_accumulation_steps = 2
max_iters = 25_000
dropout = 0.1  # several epochs over the same stories

learning_rate = 2e-3
warmup_iters = 200
weight_decay = 0.01

eval_interval = 1000
eval_tokens = 500_000
log_interval = 20
sample_prompt = "Once upon a time"
