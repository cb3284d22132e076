"""What typical acceptance gains and what it changes: `python -m engine.bench.typical --out DIR`.

The same prompts are answered by exact and by typical acceptance. Given the text before it, a draft that typical
acceptance takes was certain to come, while exact acceptance would have drawn it with the backbone's probability p; the
token at a step's end is drawn from the backbone in both. Along an answer, therefore, the divergence of what typical
acceptance emits from what the backbone says is, for each token, -log p in KL and 1 - p in total variation where it was
an accepted draft, and 0 elsewhere; their means over all tokens are reported (by the chain rule the KL is that of whole
texts, by token). Exact acceptance's are 0 by construction.
"""

import argparse
import json
import math
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from engine import Engine, GenerationResult, SamplingParams
from engine.bench.loading import load_engine
from engine.runner import Runner
from engine.sampler import Sampler
from engine.tree import CandidateTree

PROMPTS = Path(__file__).parent / "prompts" / "eval.txt"
TEMPERATURES = (0.3, 0.7, 1.0)
_CHAIN = 32  # tokens of an answer that are looked at in one forward


@dataclass(frozen=True)
class Answered:
    """One answer: its record, which of its tokens were accepted drafts, and the backbone's chance of every token."""

    result: GenerationResult
    is_draft: tuple[bool, ...]
    chances: tuple[float, ...]


def answer(engine: Engine, prompt: str, params: SamplingParams) -> Answered:
    """Answer and look the answer's chances up afterwards."""
    messages = [{"role": "user", "content": prompt}]
    is_draft: list[bool] = []
    result = None
    for chunk in engine.stream(messages, params):
        accepted = chunk.step.num_accepted if chunk.step else 0
        is_draft += [place < accepted for place in range(len(chunk.tokens))]
        result = chunk.result or result
    assert result is not None, "the last chunk carries the result"
    chances = chances_of(engine._runner, engine._tokenizer.encode_chat(messages), result.tokens, params)
    engine._cached = []  # the rows below the engine's feet were replaced
    return Answered(result, tuple(is_draft), tuple(chances))


def chances_of(runner: Runner, prompt: Sequence[int], answer: Sequence[int], params: SamplingParams) -> list[float]:
    """Return the probability, under the settings, that the backbone gives each token of an answer to `prompt`."""
    if not answer:
        return []
    sampler = Sampler(runner.config.vocab_size, runner.device)
    sampler.start(params, 0, prompt)
    runner.truncate(0)
    hidden = [runner.prefill(prompt).unsqueeze(0)]
    for start in range(0, len(answer) - 1, _CHAIN):
        piece = answer[start : min(start + _CHAIN, len(answer) - 1)]
        hidden.append(runner.verify(piece, CandidateTree.chain(len(piece) - 1)))
        runner.commit(range(len(piece)))
    tokens = torch.tensor(answer, device=runner.device)
    chances: list[float] = []
    for row in torch.cat(hidden):
        before = tokens[: len(chances)]
        is_above = torch.ones(1, len(before), dtype=torch.bool, device=runner.device)
        row_chances = sampler.probabilities(runner.logits(row.unsqueeze(0)), before, is_above)
        chances.append(float(row_chances[0, tokens[len(chances)]]))
    return chances


def figures(answers: Sequence[Answered]) -> dict[str, float]:
    """Return the means over all tokens of several answers."""
    chances = [chance for one in answers for chance in one.chances]
    drafts = [chance for one in answers for chance, is_draft in zip(one.chances, one.is_draft, strict=True) if is_draft]
    return {
        "tokens": len(chances),
        "tokens_per_step": round(mean(one.result.tokens_per_step for one in answers), 3),
        "tokens_per_second": round(median(one.result.tokens_per_second for one in answers), 1),
        "share_of_drafts": round(len(drafts) / len(chances), 4),
        "mean_log_chance": round(mean(math.log(max(chance, 1e-12)) for chance in chances), 4),
        "distinct_tokens": round(mean(len(set(one.result.tokens)) / len(one.result.tokens) for one in answers), 4),
    }


def divergence(answers: Sequence[Answered]) -> dict[str, float]:
    """Return how far typical acceptance is from the backbone, by emitted token; see the module's text."""
    total = sum(len(one.chances) for one in answers)
    drafts = [chance for one in answers for chance, is_draft in zip(one.chances, one.is_draft, strict=True) if is_draft]
    return {
        "kl_nats_by_token": round(sum(-math.log(chance) for chance in drafts) / total, 4),
        "total_variation_by_token": round(sum(1 - chance for chance in drafts) / total, 4),
    }


def measure(engine: Engine, prompts: Sequence[str], temperature: float, nodes: int, max_tokens: int) -> dict[str, Any]:
    """Compare both rules at one temperature with one size of tree."""
    answers: dict[str, list[Answered]] = {"exact": [], "typical": []}
    for seed, prompt in enumerate(prompts):
        for rule, collected in answers.items():
            params = SamplingParams(
                temperature=temperature, seed=seed, max_tokens=max_tokens, tree_nodes=nodes, acceptance=rule
            )
            given = answer(engine, prompt, params)
            if given.chances:
                collected.append(given)
    return {
        "temperature": temperature,
        "tree_nodes": nodes,
        "exact": {**figures(answers["exact"]), "kl_nats_by_token": 0.0, "total_variation_by_token": 0.0},
        "typical": {**figures(answers["typical"]), **divergence(answers["typical"])},
    }


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    engine = load_engine(args.model, device=args.device, progress=lambda text: print(text, file=sys.stderr))
    if not engine.info.has_heads:
        print(engine.info.heads_reason, file=sys.stderr)
        return 1
    prompts = PROMPTS.read_text().splitlines()[args.skip : args.skip + args.prompts]
    rows = [
        measure(engine, prompts, temperature, nodes, args.max_tokens)
        for temperature in TEMPERATURES
        for nodes in args.nodes
    ]
    result = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {engine.info.device}, {engine.info.weights}",
        "model": engine.info.model,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "epsilon": SamplingParams().epsilon,
        "delta": SamplingParams().delta,
        "prompts": len(prompts),
        "max_tokens": args.max_tokens,
        "rows": rows,
    }
    text = json.dumps(result, indent=1)
    (args.out / f"typical_{engine.info.device}.json").write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the result")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--skip", type=int, default=20, help="prompts to leave out at the start")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--nodes", type=int, nargs="+", default=[4, 16], help="sizes of tree, without the root")
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
