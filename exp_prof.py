import torch
from engine.bench.nf4_search import Matrix
from engine.kernels.linear_config import LinearConfig
import sys
m=Matrix(22016,4096)
c=LinearConfig(0,4,1,12,1,8,1,wgmma=1,cluster=1,x_blocks=4,wide_table=1)
for i in range(6): m.run(32,c,m.rounds[i%len(m.rounds)])
torch.cuda.synchronize()
