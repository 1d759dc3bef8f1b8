# Train a smaller Gemma 3 on TinyStories, on a small GPU, with a vocabulary trained on the stories. Not yet measured.
#
#     python prepare.py --tokenizer=bpe:32768 --name=tinystories-bpe32k
#     python train.py config/train_tinystories_90m.py
#
# Named after a published run with the same width, depth, heads, window and vocabulary. With a tied embedding and this
# MLP, the model has 39.6M parameters, 16.8M of them in the embedding.
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

# 128 rows x 256 tokens x 2 micro-batches = 65,536 tokens per step; 25,000 steps = 1.64G tokens, about 3.5 epochs
# (train.py prints the exact number when it starts).
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
