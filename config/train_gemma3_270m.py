# Your own text on Google's Gemma 3 270M: all weights, on two CPU cores.
#
#     python prepare.py --dataset=stories.txt --tokenizer=google/gemma-3-270m --val_fraction=0.1
#     python train.py config/train_gemma3_270m.py --dataset=stories
dataset = "stories"
init_from = "google/gemma-3-270m"
out_dir = "out/gemma3-270m"

batch_size = 4  # 4 rows x 512 tokens = 2,048 tokens a step
block_size = 512
max_iters = 50

warmup_iters = 0.1
eval_interval = 25
log_interval = 5
