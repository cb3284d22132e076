"""Tokens per step of heads on the model's own greedy answers to given prompts."""

from collections.abc import Sequence
from pathlib import Path
from random import Random

from engine.training.batch_decoder import BatchDecoder
from engine.training.chat_format import ChatFormat
from engine.training.dataset import TextSet, text_of
from engine.training.dense import TrainingModel
from engine.training.dialogues import DialoguePlan, GivenPrompt, Script
from engine.training.distill import answer_all
from engine.training.filters import QueryFilter

__all__ = ["calibration_prompts", "evaluation_prompts", "greedy_answers", "kept_out_prompts"]

_PROMPTS = Path(__file__).resolve().parents[1] / "bench" / "prompts"


def evaluation_prompts() -> list[str]:
    """Return the prompts that heads are judged by; data and calibration keep clear of them."""
    return (_PROMPTS / "eval.txt").read_text(encoding="utf-8").splitlines()


def calibration_prompts() -> list[str]:
    """Return prompts that trees are chosen by: as people write them, not as distillation invents them.

    To what is like their training text heads guess far better than to anything else, so a tree chosen by that is too
    large.
    """
    return (_PROMPTS / "calibrate.txt").read_text(encoding="utf-8").splitlines()


def kept_out_prompts() -> list[str]:
    """Return the prompts that no training text may come near."""
    return [*evaluation_prompts(), *calibration_prompts()]


def greedy_answers(
    model: TrainingModel, chat: ChatFormat, prompts: Sequence[str], max_answer: int, slots: int = 128
) -> TextSet:
    """Return the model's greedy answers to `prompts` under the default system line, as documents with labels."""
    openings = [chat.prompt(chat.default_opening, model.tokenizer.encode(prompt)) for prompt in prompts]
    capacity = max(len(opening) for opening in openings) + max_answer + 1
    decoder = BatchDecoder(model.backbone, min(slots, len(prompts)), capacity, sorted(model.tokenizer.end_token_ids))
    plan = DialoguePlan(greedy_share=1.0, max_answer=max_answer, max_repetition=1.0)
    given = iter([GivenPrompt(opening, number) for number, opening in enumerate(openings)])
    script = Script(model.tokenizer, chat, plan, QueryFilter(), capacity, Random(0), given)
    documents = sorted(answer_all(decoder, script), key=lambda document: document.source)
    return text_of(documents)
