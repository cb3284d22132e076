"""python exp_step.py: 7B step at 1 and 32 rows with given cuts."""
import sys, json, torch
from functools import partial
from pathlib import Path
from engine.bench.gpu_report import Report
from engine.bench import gpu_step
from engine.bench.gpu_step import Stack, _time_step, _load_unless, _kernel_times
from engine.bench.gpu_linears import alone, compile_configs
from engine.kernels import nvrtc
from engine.kernels.linear_config import LinearConfig, Decode
torch.manual_seed(0)
def w(*c): 
    rt, rw, sw, d, mb, cl, xb, wide = c
    return lambda tiles: LinearConfig(0, tiles, rt, rw, sw, d, mb, wgmma=1, cluster=cl, x_blocks=xb, wide_table=wide)
def res(rt, rw, sw, mb, loop): return LinearConfig(0, 1, rt, rw, sw, 0, mb, row_loop=loop, resident=1)
ONE = {(12288,4096): res(1,1,8,2,3), (4096,4096): res(1,1,8,2,1), (22016,4096): res(1,2,8,1,6), (4096,11008): w(1,4,4,4,1,2,4,1)(1)}
P = w(1,4,4,4,1,2,2,1)
T32 = {
 'base': {(12288,4096): w(1,12,1,8,1,2,4,1), (4096,4096): P, (22016,4096): w(1,12,1,8,1,1,4,1), (4096,11008): P},
}
def run(extra={}, nodes=(1,32)):
    report = Report(Path(sys.argv[1] if len(sys.argv)>1 else '/tmp'), 100.0, 'exp')
    stack = Stack('7B','nf4',report)
    out={}
    sets = {**T32, **extra}
    for name, cuts in sets.items():
        for n in nodes:
            if n==1 and name!='base': continue
            for (a,b),c in (ONE if n==1 else cuts).items():
                report.best[Decode.NF4_TABLE,a,b,1 if n==1 else 32] = c if n==1 else c(4)
            stack.set_tree(n); stack.load=nvrtc.load_kernel
            row={'ms':round(_time_step(stack),4)}
            stack.load=partial(_load_unless,('tree_attention','fused_ops')); row['linears only']=round(_time_step(stack),4)
            stack.load=partial(_load_unless,('linear',)); row['no linears']=round(_time_step(stack),4)
            stack.load=partial(_load_unless,('tree_attention',)); row['no attention']=round(_time_step(stack),4)
            print(name,n,row,flush=True)
    return stack, report


if __name__=='__main__':
    Q=w(1,4,2,8,1,2,2,1)
    R=w(1,12,1,8,1,4,4,1)
    run({'o,down 4/2': {**T32['base'], (4096,4096): Q, (4096,11008): Q}, 'o,down 12x4': {**T32['base'], (4096,4096): R, (4096,11008): R},
     'gu x2': {**T32['base'], (22016,4096): w(1,12,1,8,1,2,4,1)}})
