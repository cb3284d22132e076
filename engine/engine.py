"""The engine: a model loaded once, and answers streamed from it.

Messages and settings in, `GenerationChunk`s out. One answer at a time. What the cache holds is remembered as tokens, so
the next prompt prefills only what follows the common beginning.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from engine.answer import AnswerRecord
from engine.build import Built, build_drafter, build_runner, choose_device, return_freed_memory, use_all_cores
from engine.captured_decode import CapturedLoop, make_loop
from engine.cuda_runner import CudaRunner
from engine.draft import Drafter
from engine.errors import ContextLengthError, EngineError
from engine.models.head_formats import Target, read_heads
from engine.models.loader import LoadedModel, open_model
from engine.models.tokenizer import ChatTokenizer
from engine.nested_tree import NestedTree, tree_file
from engine.pruned_tree import Tree
from engine.records import DecodeStep, EngineInfo, GenerationChunk
from engine.runner import Runner
from engine.sampling import SamplingParams, draw_seed
from engine.step_times import StepTimer, StepTimes, measure_step_times
from engine.tuning import Tuner, device_name, engine_version, load_or_measure

__all__ = ["Engine"]

Messages = Sequence[dict[str, str]]

_MEASURED_CONTEXT = 256  # committed rows behind which steps are timed
_MEASURING_S = {"cpu": 4.0, "cuda": 8.0}  # on a GPU this includes capturing each size once
_WARM_STEPS = {True: 4, False: 1}  # captured: load, capture, and fill the queue of steps under way


class Engine:
    """A loaded model that answers; see `load`. The parts are injected so that tests can bring their own."""

    def __init__(
        self,
        *,
        name: str,
        runner: Runner,
        tokenizer: ChatTokenizer,
        drafter: Drafter | None,
        trees: NestedTree,
        heads_reason: str = "",
        notes: tuple[str, ...] = (),
    ) -> None:
        self._name, self._runner, self._tokenizer = name, runner, tokenizer
        self._drafter, self._trees, self._heads_reason = drafter, trees, heads_reason
        self._notes = notes
        self._tuner: Tuner | None = None
        self.learns = True  # whether answers tell the tuner what was accepted
        self._cached: list[int] = []  # the tokens behind the committed rows
        self._lock = threading.Lock()

    @classmethod
    def load(
        cls,
        model: str = "bundled",
        *,
        device: str = "auto",
        quantize: str = "auto",
        heads: str | None = "auto",
        progress: Callable[[str], None] | None = None,
    ) -> "Engine":
        """Load a model and its heads.

        Heads that do not load leave Medusa off, with the reason in `info.heads_reason`, unless a file was named.
        Raises EngineError with the remedy.
        """
        say = progress or (lambda message: None)
        chosen = choose_device(device)
        use_all_cores()
        say(f"Reading {model}")
        source = open_model(model)
        say(f"Preparing the weights for {chosen}")
        built = build_runner(
            source.config, source.weights, device=chosen, quantize=quantize, source_format=source.weight_format, say=say
        )
        say("Loading the draft heads")
        loaded = _load_heads(heads, source, built)
        engine = cls(
            name=source.name,
            runner=built.runner,
            tokenizer=source.tokenizer,
            drafter=loaded.drafter,
            trees=loaded.trees,
            heads_reason=loaded.reason,
            notes=(*built.notes, *loaded.notes),
        )
        engine.tune(loaded.identity, say)
        del source, built, loaded
        return_freed_memory()
        return engine

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(
            model=self._name,
            device=self._runner.device,
            weights=self._runner.weights,
            max_context=self._runner.config.max_positions,
            has_heads=self._drafter is not None,
            heads_reason=self._heads_reason,
            num_heads=self._drafter.max_depth if self._drafter else 0,
            memory_bytes=self._runner.memory_bytes() + (self._drafter.memory_bytes() if self._drafter else 0),
            notes=self._notes,
            tuning=self._tuner.report() if self._tuner else None,
        )

    def memory_table(self) -> dict[str, int]:
        """Return the bytes of each part that the engine holds on its device."""
        table = getattr(self._runner, "memory_table", None)
        parts = table() if table else {"weights and cache": self._runner.memory_bytes()}
        return {**parts, "heads": self._drafter.memory_bytes() if self._drafter else 0}

    def tune(self, heads: str, say: Callable[[str], None]) -> None:
        """Choose the tree: from what is kept for this machine, model and `heads` (any name of theirs), or
        by measuring step times now."""
        if self._drafter is None:
            return
        runner = self._runner
        identity = (device_name(runner.device), runner.weights, self._name, str(runner.config), heads, engine_version())
        self._tuner = load_or_measure(
            self._trees,
            identity=identity,
            measure=lambda: self._measure_steps(say),
            default_nodes=self._trees.default_nodes[runner.device],
        )

    def _measure_steps(self, say: Callable[[str], None]) -> StepTimes:
        """Measure this machine's step times; the cache is empty afterwards."""
        runner, greedy = self._runner, SamplingParams()
        context = min(_MEASURED_CONTEXT, runner.config.max_positions // 2)
        text = "The sea is never quite still, and those who live beside it know its moods. " * 40
        timer = StepTimer(
            loop=lambda drafts: make_loop(runner, self._drafter if drafts else None, greedy, 0),
            truncate=runner.truncate,
            prompt=self._tokenizer.encode_chat([{"role": "user", "content": text}])[:context],
            warm_steps=_WARM_STEPS[isinstance(make_loop(runner, self._drafter, greedy, 0), CapturedLoop)],
        )
        budget = _MEASURING_S[runner.device]
        try:
            return measure_step_times(timer, self._trees, runner.max_tree_nodes, budget_s=budget, say=say)
        finally:
            runner.truncate(0)
            if isinstance(runner, CudaRunner):
                runner.forget_steps()  # most of these trees were only measured

    def count_tokens(self, messages: Messages) -> int:
        """Count the prompt that `messages` make."""
        return len(self._tokenizer.encode_chat(messages))

    def token_texts(self, tokens: Sequence[int]) -> list[str]:
        """Return each token as a label for people."""
        return [self._tokenizer.token_text(token) for token in tokens]

    def stream(
        self, messages: Messages, params: SamplingParams, stop: threading.Event | None = None
    ) -> Iterator[GenerationChunk]:
        """Answer `messages`; the last chunk carries the result. Setting `stop` ends the answer after the current step.

        Raises ContextLengthError where the prompt leaves no room for an answer.
        """
        with self._lock:
            yield from self._answer(messages, params, stop or threading.Event())

    def _answer(self, messages: Messages, params: SamplingParams, stop: threading.Event) -> Iterator[GenerationChunk]:
        started = time.perf_counter()
        prompt = self._tokenizer.encode_chat(messages)
        limit = self._room(len(prompt), params.max_tokens)
        record = AnswerRecord(self._tokenizer, limit, started, params.stop)
        tree = self._tree(params)
        drafter = self._drafter if tree.num_drafted else None
        seed = draw_seed() if params.seed is None else params.seed
        loop = make_loop(self._runner, drafter, params, seed)
        taken: list[DecodeStep] = []
        cached = self._reuse(prompt, for_heads=drafter is not None)
        try:
            yield record.first(loop.prefill(prompt[cached:], prompt[:cached]))
            steps = loop.steps(tree)
            while record.finish_reason is None and not stop.is_set():
                step = next(steps)
                if step.tree_nodes == tree.num_drafted:  # a smaller one was all that fitted the context
                    taken.append(step)
                yield record.add(step)
        finally:
            self._remember(prompt, record.tokens)
            self._learn(tree, taken, params)
        yield record.finish(
            prompt_tokens=len(prompt),
            cached_tokens=cached,
            medusa=drafter is not None,
            tree_nodes=tree.num_drafted,
            runner=self._runner,
            seed=seed,
        )

    def _learn(self, tree: Tree, taken: Sequence[DecodeStep], params: SamplingParams) -> None:
        """Let the tuner see an answer's steps: of exact acceptance what was accepted, of greedy ones the times too."""
        if self._tuner is None or not self.learns:
            return
        if tree.num_drafted and not params.is_typical:
            self._tuner.learn(tree, taken)
        if params.is_argmax:
            self._tuner.check_times(tree, [step.duration_ms for step in taken])

    def _tree(self, params: SamplingParams) -> Tree:
        """Return the tree to draft: the root alone for plain decoding."""
        if not params.medusa or self._drafter is None:
            return self._trees.first(0)
        if params.tree_nodes is None and self._tuner:
            return self._tuner.tree
        wanted = params.tree_nodes or self._trees.default_nodes[self._runner.device]
        return self._trees.pruned(min(wanted, self._runner.max_tree_nodes))

    def _room(self, prompt_tokens: int, max_tokens: int) -> int:
        room = self._runner.config.max_positions - prompt_tokens
        if room < 1:
            raise ContextLengthError(
                f"The conversation is {prompt_tokens} tokens long and the model holds "
                f"{self._runner.config.max_positions}; start a new chat or shorten it."
            )
        return min(room, max_tokens)

    def _reuse(self, prompt: list[int], *, for_heads: bool) -> int:
        """Keep the cached rows that the prompt begins with; at least its last token is always run again.

        What was decoded plainly is run again too where heads are to look back at it.
        """
        common = 0
        for ours, theirs in zip(self._cached, prompt[:-1], strict=False):
            if ours != theirs:
                break
            common += 1
        common = min(common, self._runner.num_prefixed) if for_heads else common
        self._runner.truncate(common)
        self._cached = prompt[:common]
        return common

    def _remember(self, prompt: list[int], answer: Sequence[int]) -> None:
        """Drop cached rows past the answer's end and note what the others hold.

        The last token's row goes too: whether it is there already differs with the trees, and a row that the next turn
        runs in another way may have other bits.
        """
        text = [*prompt, *answer]
        self._runner.truncate(min(len(text) - 1, self._runner.num_committed))
        self._cached = text[: self._runner.num_committed]


class _Heads(NamedTuple):
    """What came of loading the heads: a drafter, or the reason why there is none."""

    drafter: Drafter | None
    trees: NestedTree
    reason: str = ""
    notes: tuple[str, ...] = ()
    identity: str = ""


def _load_heads(heads: str | None, source: LoadedModel, built: Built) -> _Heads:
    path = source.heads_path if heads == "auto" else Path(heads) if heads and heads != "none" else None
    if path is None:
        reason = "heads were switched off" if heads in (None, "none") else f"no heads are known for {source.name}"
        return _Heads(None, NestedTree.default(), reason)
    config, lm_head = source.config, source.weights.lm_head
    try:
        loaded = read_heads(path, Target(config.hidden_size, config.vocab_size, source.name, lm_head.dequantize))
        drafter, notes = build_drafter(loaded.heads, built, lm_head)
        trees = NestedTree.beside(path, drafter.num_scored).limited(loaded.heads.config.num_heads)
    except EngineError as error:
        if heads != "auto":
            raise
        return _Heads(None, NestedTree.default(), str(error))
    return _Heads(drafter, trees, notes=(*loaded.notes, *notes), identity=_identity(path))


def _identity(path: Path) -> str:
    """Name a heads file or folder and its calibration so that a change of either is another name."""
    parts = sorted(path.iterdir()) if path.is_dir() else [part for part in (path, tree_file(path)) if part.is_file()]
    return "|".join(f"{part.resolve()} {part.stat().st_size} {part.stat().st_mtime_ns}" for part in parts)
