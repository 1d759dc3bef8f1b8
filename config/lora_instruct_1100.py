# Instruction-tune the TinyStories laptop model on about a thousand records, on two CPU cores, in under four minutes.
#
#     python lora.py config/lora_instruct_1100.py --data=instruction_1100.json
#
# The records are those of rasbt/LLMs-from-scratch, chapter 7 (instruction, input, output). Held-out response perplexity
# falls from 1,255 to 45 (lora.py's defaults reach 60 in half the time). The answers have the requested form, but a
# model that has read 1.4 MB of stories can't translate: "The chovitionslation of 'bude' is 'fictictor.'"
data = "instruction_1100.json"
init_from = "out/tinystories-cpu/best"
out_dir = "out/lora-instruct-1100"

rank = 16
alpha = 32.0
epochs = 6.0
max_tokens_per_batch = 2048

learning_rate = 2e-3
warmup_iters = 10

eval_interval = 100
log_interval = 10
