# Train on tiny Shakespeare, as in the first example of nanoGPT, on two CPU cores, in less than four minutes. Ends at
# 2.061 ± 0.007 bits per byte on the held-out last tenth (three seeds).
#
#     python prepare.py --dataset=shakespeare.txt --tokenizer=bpe:1024
#     python train.py config/train_shakespeare.py
dataset = "shakespeare"
out_dir = "out/shakespeare"

hidden_size = 192
intermediate_size = 576
num_hidden_layers = 6
num_attention_heads = 3
num_key_value_heads = 3
head_dim = 64
sliding_window = 512
max_position_embeddings = 1024

# 8 rows x 256 tokens = 2,048 tokens per step; 960 steps = 4.7 epochs. Weight decay keeps the model from memorizing the
# text, at no cost in time. With a tenth of this decay, a model of width 256 ended 0.1 higher (docs/experiments.md).
batch_size = 8
block_size = 256
max_iters = 960
weight_decay = 1.0

learning_rate = 8e-3
warmup_iters = 20
momentum = 0.9
cooldown_frac = 0.6

eval_interval = 240
log_interval = 10
sample_prompt = "ROMEO:\n"
