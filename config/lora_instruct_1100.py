# Instruction-tune the TinyStories laptop model on about a thousand records, on two CPU cores, in under two minutes.
#
#     python lora.py config/lora_instruct_1100.py --data=instruction_1100.json
#
# The records are those of rasbt/LLMs-from-scratch, chapter 7 (instruction, input, output). Held-out response perplexity
# falls from 1,104 to 26 and the answers take the form asked for, but a model that has read 1.4 MB of stories knows no
# antonyms: "An antonimal of 'dad' is 'strun'."
data = "instruction_1100.json"
init_from = "out/tinystories-cpu/best"
out_dir = "out/lora-instruct-1100"

rank = 16
alpha = 32.0
epochs = 6.0
max_tokens_per_batch = 2048
forgetting = "tinystories"

optimizer = "adamw"
learning_rate = 2e-3
warmup_iters = 10

eval_interval = 100
log_interval = 10
compile = False  # batches come in many shapes
