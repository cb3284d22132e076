"""The life of one invented conversation in a slot: query, answer, perhaps a follow-up, then a document.

It decides what is written next when the model's turn has ended; generating is the decoder's business, where the text is
stored the writer's.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random

from engine.models.tokenizer import ChatTokenizer
from engine.training.batch_decoder import Placement
from engine.training.chat_format import ChatFormat
from engine.training.filters import QueryFilter, repetition
from engine.training.shards import Document
from engine.training.topics import draw_request, draw_system_line

__all__ = ["Dialogue", "DialoguePlan", "GivenPrompt", "Script"]


@dataclass(frozen=True)
class DialoguePlan:
    """How conversations are made; shares are between 0 and 1."""

    greedy_share: float = 0.65
    template_share: float = 0.3  # queries put together from lists rather than written by the model
    default_system_share: float = 0.3  # of the queries the model writes
    follow_up_share: float = 0.3
    query_temperature: float = 1.0
    answer_temperature: float = 0.7
    max_query: int = 160
    max_answer: int = 320
    max_repetition: float = 0.75


@dataclass(frozen=True)
class GivenPrompt:
    """A prompt from outside as the ids before the answer; `source` is its number in its file."""

    tokens: Sequence[int]
    source: int


@dataclass
class Dialogue:
    """One slot's conversation."""

    is_greedy: bool
    answers_left: int
    turn_start: int  # where the model's present turn begins
    is_query: bool
    opening: tuple[int, ...] | None  # the helper system line's opening while its query is written, else None
    spans: list[tuple[int, int]] = field(default_factory=list)
    source: int = -1


class Script:
    """Starts conversations and decides, at the end of every turn, how each goes on."""

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        chat: ChatFormat,
        plan: DialoguePlan,
        queries: QueryFilter,
        capacity: int,
        random: Random,
        given: Iterator[GivenPrompt] | None = None,
        keep: Callable[[Document], None] = lambda document: None,
        reject: Callable[[int], None] = lambda source: None,
    ) -> None:
        self.tokenizer, self.chat, self.plan, self.queries = tokenizer, chat, plan, queries
        self.capacity, self.random, self.given, self.keep = capacity, random, given, keep
        self.reject = reject  # told of a given prompt whose answer is not kept
        self.num_rejected = 0

    def start(self, slot: int) -> tuple[Dialogue, Placement] | None:
        """Begin a conversation; None when the given prompts are used up."""
        if self.given is not None:
            prompt = next(self.given, None)
            return None if prompt is None else self._answer_first(slot, prompt.tokens, prompt.source, False)
        if self.random.random() < self.plan.template_share:
            query = self._fresh_request()
            tokens = self.chat.prompt(self.chat.default_opening, self.tokenizer.encode(query))
            return self._answer_first(slot, tokens, -1, True)
        line = None
        if self.random.random() >= self.plan.default_system_share:
            line = self.tokenizer.encode(draw_system_line(self.random))
        opening = self.chat.opening(line)
        dialogue = Dialogue(self._draw_greedy(), self._draw_answers(), len(opening), True, tuple(opening))
        if line is None:
            dialogue.opening = None
        limit = len(opening) + self.plan.max_query
        return dialogue, Placement(slot, opening, limit, self.plan.query_temperature)

    def go_on(self, slot: int, dialogue: Dialogue, text: Sequence[int]) -> Placement | None:
        """Return what follows the ended turn of `dialogue` (its whole text in ids), or None at its end."""
        if dialogue.is_query:
            return self._after_query(slot, dialogue, text)
        return self._after_answer(slot, dialogue, text)

    def cut_short(self, dialogue: Dialogue, text: Sequence[int]) -> None:
        """Keep what an unfinished conversation has of answers; `text` ends wherever generation stopped."""
        if not dialogue.is_query and len(text) - dialogue.turn_start >= 48:
            dialogue.spans.append((dialogue.turn_start, len(text)))
        self._finish(dialogue, text)

    def _after_query(self, slot: int, dialogue: Dialogue, text: Sequence[int]) -> Placement | None:
        query = list(text[dialogue.turn_start : -1])
        is_complete = text[-1] == self.chat.end_token
        if not is_complete or not self.queries.accept(self.tokenizer.decode(query)):
            self.num_rejected += 1
            self._finish(dialogue, text)
            return None
        dialogue.is_query = False
        if dialogue.opening is None:
            return self._extend(slot, dialogue, text, self.chat.to_answer)
        # The helper's system line has done its work: the answer is given under the ordinary one.
        dialogue.opening = None
        prompt = self.chat.prompt(self.chat.default_opening, query)
        dialogue.turn_start = len(prompt)
        return Placement(slot, prompt, len(prompt) + self.plan.max_answer, self._temperature(dialogue))

    def _after_answer(self, slot: int, dialogue: Dialogue, text: Sequence[int]) -> Placement | None:
        answer = text[dialogue.turn_start :]
        if repetition(answer, 4) > self.plan.max_repetition:
            self.num_rejected += 1
            if dialogue.source >= 0:
                self.reject(dialogue.source)
            self._finish(dialogue, text)
            return None
        dialogue.spans.append((dialogue.turn_start, len(text)))
        dialogue.answers_left -= 1
        room = self.plan.max_query + 64
        if dialogue.answers_left <= 0 or text[-1] != self.chat.end_token or len(text) + room >= self.capacity:
            self._finish(dialogue, text)
            return None
        dialogue.is_query = True
        return self._extend(slot, dialogue, text, self.chat.to_query)

    def _extend(self, slot: int, dialogue: Dialogue, text: Sequence[int], added: Sequence[int]) -> Placement:
        dialogue.turn_start = len(text) + len(added)
        longest = self.plan.max_query if dialogue.is_query else self.plan.max_answer
        temperature = self.plan.query_temperature if dialogue.is_query else self._temperature(dialogue)
        return Placement(slot, added, dialogue.turn_start + longest, temperature, start=len(text))

    def _answer_first(
        self, slot: int, tokens: Sequence[int], source: int, may_go_on: bool
    ) -> tuple[Dialogue, Placement]:
        answers = self._draw_answers() if may_go_on else 1
        dialogue = Dialogue(self._draw_greedy(), answers, len(tokens), False, None, source=source)
        return dialogue, Placement(slot, tokens, len(tokens) + self.plan.max_answer, self._temperature(dialogue))

    def _finish(self, dialogue: Dialogue, text: Sequence[int]) -> None:
        if dialogue.spans:
            end = dialogue.spans[-1][1]
            self.keep(Document(list(text[:end]), list(dialogue.spans), dialogue.is_greedy, dialogue.source))

    def _fresh_request(self) -> str:
        for _ in range(50):
            request = draw_request(self.random)
            if self.queries.accept(request):
                break
        return request

    def _draw_greedy(self) -> bool:
        return self.random.random() < self.plan.greedy_share

    def _draw_answers(self) -> int:
        return 2 if self.random.random() < self.plan.follow_up_share else 1

    def _temperature(self, dialogue: Dialogue) -> float:
        return 0.0 if dialogue.is_greedy else self.plan.answer_temperature
