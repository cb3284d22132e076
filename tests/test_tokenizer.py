"""The bundled model's tokenizer and chat template against transformers' reading of the same file; streaming text."""

import pytest

from engine.models.loader import LoadedModel, bundled_path
from engine.models.tokenizer import ChatTokenizer, StreamDecoder

TEXTS = [
    "Hello world 12345, don't  stop\n\n\tx",
    "日本語 émoji 🎉👩‍👩‍👧 ok",
    "<|im_start|>user\nhi<|im_end|>",
    "  leading, trailing  ",
    "print('x')\n    return 3.14  # half",
]


@pytest.fixture(scope="module")
def tokenizer(bundled: LoadedModel) -> ChatTokenizer:
    return bundled.tokenizer


@pytest.mark.slow
def test_ids_and_template_are_those_of_transformers(tokenizer: ChatTokenizer) -> None:
    """Without fractions like ½: transformers drops the file's rule that every numeral stands alone."""
    from transformers import AutoTokenizer

    path = bundled_path()
    reference = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in TEXTS:
        assert tokenizer.encode(text) == reference(text, add_special_tokens=False)["input_ids"]
    for messages in (
        [{"role": "user", "content": "Hi"}],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        [{"role": role, "content": role} for role in ("user", "assistant", "user")],
    ):
        expected = reference.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert tokenizer.encode_chat(messages) == expected


@pytest.mark.parametrize("text", [text for text in TEXTS if "<|" not in text])
def test_a_stream_shows_whole_characters_and_loses_none(tokenizer: ChatTokenizer, text: str) -> None:
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.feed(token) for token in tokenizer.encode(text)]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) + decoder.finish() == text


def test_an_unfinished_character_is_held_back_and_then_marked(tokenizer: ChatTokenizer) -> None:
    tokens = tokenizer.encode("🎉")
    assert len(tokens) > 1
    decoder = StreamDecoder(tokenizer)
    assert "".join(decoder.feed(token) for token in tokens[:-1]) == ""
    assert decoder.finish() == "\ufffd"


def test_special_tokens_are_no_text_but_have_a_label(tokenizer: ChatTokenizer) -> None:
    (end,) = tokenizer.encode("<|im_end|>")
    assert tokenizer.decode([end]) == ""
    assert tokenizer.token_text(end) == "<|im_end|>"
    assert end in tokenizer.end_token_ids


def test_a_last_message_of_the_assistant_is_continued(tokenizer: ChatTokenizer) -> None:
    question = [{"role": "user", "content": "Count."}]
    begun = tokenizer.render_chat([*question, {"role": "assistant", "content": "One, two"}])
    assert begun == tokenizer.render_chat(question) + "One, two"
