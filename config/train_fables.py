# The quick start: train a small Gemma 3 on the bundled fables, on two CPU cores, in about six minutes.
#
#     python prepare.py --dataset=fables
#     python train.py config/train_fables.py
dataset = "fables"
out_dir = "out/fables"

# Three sliding layers and one full layer. The heads of width 64 together are as wide as the model. Each head has its
# own keys and values: at this size, sharing them costs more in loss than it saves in time.
hidden_size = 192
intermediate_size = 512
num_hidden_layers = 4
sliding_window_pattern = 4
num_attention_heads = 3
num_key_value_heads = 3
head_dim = 64
max_position_embeddings = 1024

# 8 rows x 224 tokens = 1,792 tokens per step. A row holds one fable and the beginning of the next. A whole second fable
# would add more names to confuse, and copying names takes longest to learn. Many small steps help with it too.
# 3,000 steps = 5.4M tokens = 0.61 epochs of the 40,000 fables.
batch_size = 8
block_size = 224
max_iters = 3000

learning_rate = 5e-3
warmup_iters = 30
cooldown_frac = 0.5

eval_interval = 750
log_interval = 50
