"""The decode loop over captured steps: the device drafts, verifies, accepts and commits; the host reads along.

A step's start needs nothing from the host, so the next one is queued before the last one is read, and the GPU never
waits for Python. A step queued past an answer's end is forgotten by the runner's `truncate`.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from weakref import WeakKeyDictionary

from engine.captured_sampler import StepChooser
from engine.cuda_drafter import CudaDrafter
from engine.cuda_runner import CudaRunner
from engine.decode import PLAIN, DecodeLoop
from engine.draft import Drafter
from engine.pruned_tree import Tree
from engine.records import DecodeStep
from engine.runner import Runner
from engine.sampling import SamplingParams
from engine.step_output import StepOutput

__all__ = ["CapturedLoop", "make_loop"]

_AHEAD = 2  # steps under way at a time
_choosers: WeakKeyDictionary[CudaRunner, StepChooser] = WeakKeyDictionary()


def make_loop(
    runner: Runner, drafter: Drafter | None, params: SamplingParams, seed: int
) -> "DecodeLoop | CapturedLoop":
    """Choose the loop for one answer: captured steps where the runner has them."""
    if isinstance(runner, CudaRunner) and (drafter is None or isinstance(drafter, CudaDrafter)):
        return CapturedLoop(runner, drafter, params, seed)
    return DecodeLoop(runner, drafter, params, seed)


class CapturedLoop:
    """One answer in the making; the same tokens as `DecodeLoop` gives on the same runner."""

    def __init__(
        self, runner: CudaRunner, drafter: CudaDrafter | None, params: SamplingParams | None = None, seed: int = 0
    ) -> None:
        self._runner, self._drafter = runner, drafter
        self._params, self._seed = params or SamplingParams(), seed
        self._chooser = None if self._params.is_argmax else _chooser_of(runner)

    def prefill(self, tokens: Sequence[int], cached: Sequence[int] = ()) -> int:
        """Run the prompt's new tokens, after those that are cached, and return the answer's first token."""
        if self._chooser:
            self._chooser.start(self._params, self._seed, [*cached, *tokens])
        hidden = self._runner.prefill(tokens).unsqueeze(0)
        if self._chooser:
            root = self._chooser.first(self._runner.logits(hidden), self._runner.num_committed)
        else:
            root = self._runner.greedy(hidden)[0]
        self._runner.set_root(root)
        return root

    def steps(self, tree: Tree) -> Iterator[DecodeStep]:
        """Yield one record a step, without end; the caller decides when the answer is over."""
        drafter = self._drafter if tree.num_drafted else None
        limit = self._runner.config.max_positions
        under_way: deque[tuple[Tree, StepOutput]] = deque()
        read_at = time.perf_counter()
        while True:
            while len(under_way) < _AHEAD:
                longest = self._runner.num_committed + sum(flying.max_depth + 1 for flying, _ in under_way)
                fits = longest + tree.max_depth < limit
                if under_way and not fits:  # which tree fits is known when those under way have been read
                    break
                chosen = tree if fits else PLAIN
                output = self._runner.step(chosen, drafter if fits else None, longest=longest, chooser=self._chooser)
                under_way.append((chosen, output))
            _, output = under_way.popleft()
            record, verified, draft = output.wait()
            self._runner.arrived(record, for_heads=output.for_heads)
            before, read_at = read_at, time.perf_counter()
            yield DecodeStep(
                tokens=(*record.tokens[1:], record.bonus),
                num_accepted=record.num_accepted,
                path=tuple(record.path),
                node_tokens=tuple(draft.tokens),
                node_parents=verified.parents,
                node_probabilities=tuple(draft.probabilities),
                duration_ms=(read_at - before) * 1e3,
            )


def _chooser_of(runner: CudaRunner) -> StepChooser:
    """Return the runner's one chooser: captured steps hold its buffers."""
    if runner not in _choosers:
        _choosers[runner] = StepChooser(runner.memory)
    return _choosers[runner]
