import torch
from engine.bench.gpu_step import attention_layers, attention_run, wide_tree, AttentionShape
shape=AttentionShape(32,32,128,torch.bfloat16)
layers=attention_layers(shape,1000)
run=attention_run(layers,1000,wide_tree(32))
for i in range(10): run(i)
torch.cuda.synchronize()
