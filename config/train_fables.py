# The quick start: fables on a laptop CPU.
dataset = "fables"
out_dir = "out/fables"
