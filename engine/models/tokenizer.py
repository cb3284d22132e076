"""From messages to token ids by the model's own chat template, and from token ids back to text as they stream.

A stream holds back the bytes of an unfinished character until the token that completes it, so half a character is
never shown.
"""

import codecs
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer
from tokenizers.pre_tokenizers import Sequence as PreTokenizerSequence

from engine.errors import InvalidParameterError, ModelNotFoundError
from engine.models.gguf_file import TokenizerFields
from engine.models.hf_folder import TokenizerPieces

__all__ = ["ChatTokenizer", "StreamDecoder", "from_folder", "from_gguf", "pieces_from_gguf"]

_CONTROL, _USER_DEFINED = 3, 4  # GGUF token types
_BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")
_ALSO_ENDS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "</s>")  # tokens that end a turn in one model or another


class ChatTokenizer:
    """A tokenizer with its chat template and the tokens that end an answer."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        chat_template: str,
        end_token_ids: Iterable[int],
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._special_tokens = dict(special_tokens or {})  # names such as "bos_token", which templates may write
        self._is_byte_level = tokenizer.token_to_id("Ġ") is not None
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _raise_template_error
        environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
        self._template = environment.from_string(chat_template)
        self._byte_of_char = {char: byte for byte, char in enumerate(_byte_level_alphabet())}
        known = (tokenizer.token_to_id(token) for token in _ALSO_ENDS)
        self.end_token_ids = frozenset(end_token_ids) | {token for token in known if token is not None}

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Return the prompt that asks for the next assistant message."""
        return self.encode(self.render_chat(messages))

    def render_chat(self, messages: Sequence[dict[str, str]]) -> str:
        """Return the prompt as text; a last message of the assistant's is one to be continued."""
        if messages and messages[-1]["role"] == "assistant":
            return self.render_chat(messages[:-1]) + messages[-1]["content"]
        try:
            return self._template.render(messages=list(messages), add_generation_prompt=True, **self._special_tokens)
        except TemplateError as error:
            raise InvalidParameterError(f"The model's chat template refuses these messages: {error}.") from error

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`; special tokens written in it count as such."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of `tokens` without special tokens; broken characters become U+FFFD."""
        decoder = StreamDecoder(self)
        return "".join(decoder.feed(token) for token in tokens) + decoder.finish()

    def token_bytes(self, token: int) -> bytes:
        """Return a token's bytes; nothing for a special token."""
        if token in self._special_ids:
            return b""
        piece = self._tokenizer.id_to_token(token)
        if piece is None:
            return b""
        if self._is_byte_level and all(char in self._byte_of_char for char in piece):
            return bytes(self._byte_of_char[char] for char in piece)
        if byte := _BYTE_PIECE.fullmatch(piece):  # SentencePiece writes bytes outside its vocabulary as <0x0A>
            return bytes([int(byte[1], 16)])
        return piece.replace("▁", " ").encode()

    def token_text(self, token: int) -> str:
        """Return one token as a label; an unfinished character shows as U+FFFD, a special token by its name."""
        if token in self._special_ids:
            return self._tokenizer.id_to_token(token) or ""
        return self.token_bytes(token).decode("utf-8", "replace")

    @cached_property
    def _special_ids(self) -> set[int]:
        added = self._tokenizer.get_added_tokens_decoder()
        return {token for token, entry in added.items() if entry.special}


class StreamDecoder:
    """Text of a growing token sequence, whole characters only."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        """Return the characters that `token` completes."""
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def finish(self) -> str:
        """Return what is left when no token follows; an unfinished character becomes U+FFFD."""
        return self._decoder.decode(b"", final=True)


def from_folder(pieces: TokenizerPieces) -> ChatTokenizer:
    """Build the tokenizer that a model folder describes."""
    tokenizer = Tokenizer.from_file(str(pieces.tokenizer_json))
    return ChatTokenizer(tokenizer, pieces.chat_template, pieces.end_token_ids, pieces.special_tokens)


def from_gguf(fields: TokenizerFields) -> ChatTokenizer:
    """Build the byte-level BPE tokenizer that a GGUF file describes.

    Raises ModelNotFoundError for a pre-tokenizer or a template that is not known.
    """
    if not fields.chat_template:
        raise ModelNotFoundError("This GGUF file has no chat template; use an instruction-tuned model.")
    return ChatTokenizer(_gguf_tokenizer(fields), fields.chat_template, [fields.end_token_id])


def pieces_from_gguf(fields: TokenizerFields, folder: Path) -> TokenizerPieces:
    """Write the tokenizer that a GGUF file describes as tokenizer.json into `folder`; return what goes with it."""
    path = folder / "tokenizer.json"
    _gguf_tokenizer(fields).save(str(path))
    return TokenizerPieces(path, fields.chat_template, (fields.end_token_id,))


def _gguf_tokenizer(fields: TokenizerFields) -> Tokenizer:
    vocabulary = {token: index for index, token in enumerate(fields.tokens)}
    merges = [(left, right) for left, right in (merge.split(" ", 1) for merge in fields.merges)]
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges, fuse_unk=False))
    tokenizer.pre_tokenizer = _pre_tokenizer(fields.pre_tokenizer)
    tokenizer.decoder = ByteLevelDecoder()
    for token, kind in zip(fields.tokens, fields.token_types, strict=True):
        if kind in (_CONTROL, _USER_DEFINED):
            tokenizer.add_special_tokens([AddedToken(token, special=kind == _CONTROL, normalized=False)])
    return tokenizer


def _pre_tokenizer(name: str) -> PreTokenizer:
    byte_level = ByteLevel(add_prefix_space=False, use_regex=True)
    if name == "smollm":
        return PreTokenizerSequence([Digits(individual_digits=True), byte_level])
    if name in ("gpt-2", "default"):
        return byte_level
    raise ModelNotFoundError(f"The GGUF file's pre-tokenizer {name!r} is not known; use the model's folder instead.")


def _byte_level_alphabet() -> list[str]:
    """Return the printable character that byte-level BPE writes for each byte (GPT-2's table)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _raise_template_error(message: str) -> Any:
    raise TemplateError(message)
