import sys, torch, time
from functools import partial
from pathlib import Path
from engine.bench.gpu_report import Report
from engine.bench.gpu_step import Stack, _time_step, _load_unless
from engine.bench.gpu_linears import compile_configs
from engine.bench.nf4_search import Matrix, cut, mma_candidates
from engine.kernels import nvrtc
from engine.kernels.linear_config import LinearConfig, Decode
from engine.kernels.tune_nf4 import wgmma_candidates, candidates
torch.manual_seed(0)
SHAPES=[(12288,4096),(4096,4096),(22016,4096),(4096,11008),(11008,4096)]
limit=nvrtc.shared_memory_limit()
report = Report(Path(sys.argv[1]), 100.0, 'exp')
t0=time.time()
lists={m:[c for c in wgmma_candidates(0, 1 if m<=8 else m//8) if c.fits(4096,limit)] for m in (32,16,8,1)}
res1=[c for c in candidates(0,1,22016,4096) if not c.wgmma]
compile_configs([c for l in lists.values() for c in l])
print('compiled',round(time.time()-t0,1),flush=True)
for m in (32,16,8,1):
    for n,k in SHAPES:
        mat=Matrix(n,k)
        base=mat.run(m, LinearConfig(0,1 if m<=8 else m//8,1,4,2 if m<=16 else 1,2,1))
        tries=[c for c in lists[m] if c.fits(k,limit)]
        bad=[cut(c) for c in tries if not torch.equal(mat.run(m,c),base)]
        if bad: print('UNEQUAL',m,n,k,bad,flush=True)
        if m==1: tries += [c for c in candidates(0,1,n,k) if not c.wgmma and c.decode==0]
        timed=sorted(((mat.time(m,c),cut(c),c) for c in tries), key=lambda t:t[0])[:5]
        again=sorted(((mat.time(m,c,repeats=9),s,c) for _,s,c in timed), key=lambda t:t[0])
        report.best[Decode.NF4_TABLE,n,k,1 if m==1 else m]=again[0][2]
        print(m,n,k,[(u,s) for u,s,_ in again],flush=True)
        del mat; torch.cuda.empty_cache()
stack = Stack('7B','nf4',report)
for n in (1,8,16,32):
    stack.set_tree(n); stack.load=nvrtc.load_kernel
    row={'ms':round(_time_step(stack),4)}
    for name,out in {'linears only':('tree_attention','fused_ops'),'no linears':('linear',),'no attention':('tree_attention',)}.items():
        stack.load=partial(_load_unless,out); row[name]=round(_time_step(stack),4)
    print(n,row,flush=True)
