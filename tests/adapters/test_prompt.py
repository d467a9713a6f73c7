"""From requests to tokens, with the real tokenizer and with awkward chat templates."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sparse_attention_hub import Request
from sparse_attention_hub.adapters.prompt import RequestOptions, tokenize_request

OPTIONS = RequestOptions()
CONTEXT, QUESTION = "Paris is the capital of France.", " What is the capital?"


@pytest.fixture
def tokenizer(model_path: str):
    return AutoTokenizer.from_pretrained(model_path)


def text_of(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids)


def test_prompt_is_the_rendered_template_around_context_and_question(tokenizer) -> None:
    request = Request(CONTEXT, [QUESTION, " And of Spain?"], answer_prefix="Answer:")
    tokens = tokenize_request(tokenizer, request, OPTIONS)
    for question, ids in zip(request.questions, tokens.question_ids, strict=True):
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": CONTEXT + question}],
            tokenize=False,
            add_generation_prompt=True,
        )
        assert text_of(tokenizer, tokens.context_ids + ids) == rendered + "Answer:"


def test_without_a_template_there_is_one_bos(tokenizer) -> None:
    tokenizer.chat_template = None
    tokens = tokenize_request(tokenizer, Request(CONTEXT, QUESTION), OPTIONS)
    assert text_of(tokenizer, tokens.context_ids) == CONTEXT
    assert text_of(tokenizer, tokens.question_ids[0]) == QUESTION


@pytest.fixture(scope="session")
def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """Like those of Llama 2 and Phi-3: it adds a beginning-of-sequence token and a space."""
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    inner.decoder = decoders.Replace("\N{LOWER ONE EIGHTH BLOCK}", " ")
    inner.train_from_iterator(
        [CONTEXT + QUESTION + "\n[U][A]A:it?"] * 20,
        trainers.BpeTrainer(vocab_size=150, special_tokens=["<unk>", "<s>", "</s>"]),
    )
    inner.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.mark.parametrize("question", ["What is it?", " What is it?", "\nWhat is it?"])
@pytest.mark.parametrize("template", [None, "<s>[U]{{ messages[0]['content'] }}[A]"])
def test_one_bos_and_no_space_of_the_tokenizers_own(
    sentencepiece_tokenizer, template: str | None, question: str
) -> None:
    sentencepiece_tokenizer.chat_template = template
    tokens = tokenize_request(sentencepiece_tokenizer, Request(CONTEXT, question, "A:"), OPTIONS)
    ids = tokens.context_ids + tokens.question_ids[0]
    assert ids[0] == sentencepiece_tokenizer.bos_token_id
    assert ids.count(sentencepiece_tokenizer.bos_token_id) == 1
    head, tail = ("[U]", "[A]") if template else ("", "")
    text = sentencepiece_tokenizer.decode(ids, skip_special_tokens=True)
    # The one space that is the tokenizer's own is that before the whole prompt.
    assert text == " " + head + CONTEXT + question + tail + "A:"


def test_template_that_trims_is_fine(tokenizer) -> None:
    tokenizer.chat_template = "U:{{ messages[0]['content'] | trim }}\nA:"
    tokens = tokenize_request(tokenizer, Request("  " + CONTEXT + " ", QUESTION), OPTIONS)
    assert text_of(tokenizer, tokens.context_ids) == "U:" + CONTEXT + " "
    assert text_of(tokenizer, tokens.question_ids[0]) == QUESTION + "\nA:"


def test_a_question_is_trimmed_where_the_template_trims(tokenizer) -> None:
    tokenizer.chat_template = "U:{{ messages[0]['content'] | trim }}\nA:"
    tokens = tokenize_request(tokenizer, Request(CONTEXT, [" What? \n", " "]), OPTIONS)
    assert [text_of(tokenizer, ids) for ids in tokens.question_ids] == [" What?\nA:", "\nA:"]
    # White space after white space: trimming would reach into the context.
    tokens = tokenize_request(tokenizer, Request(CONTEXT + " ", " "), OPTIONS)
    assert text_of(tokenizer, tokens.question_ids[0]) == " \nA:"


def test_a_template_that_changes_a_question_is_refused(tokenizer) -> None:
    tokenizer.chat_template = "U:{{ messages[0]['content'] | replace('capital', 'port') }}\nA:"
    request = Request("It is in France.", ["What is it?", "What is the capital?"])
    with pytest.raises(ValueError, match="changes the text of the question 'What is the capital"):
        tokenize_request(tokenizer, request, OPTIONS)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0]['content'] }}{{ messages[0]['content'] }}", "2 times"),
        ("hello", "0 times"),
        ("{{ messages[0]['content'] | upper }}", "times"),
        ("{{ messages[0]['content'] | replace('Paris', 'Lyon') }}", "changes the text"),
    ],
)
def test_other_templates_are_refused(tokenizer, template: str, message: str) -> None:
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=message):
        tokenize_request(tokenizer, Request(CONTEXT, QUESTION), OPTIONS)


def test_context_that_holds_the_separator(tokenizer) -> None:
    context = "<question-0> and <question-1> are separators"
    tokens = tokenize_request(tokenizer, Request(context, QUESTION), OPTIONS)
    assert text_of(tokenizer, tokens.context_ids).endswith(context)


def test_too_long_context(tokenizer) -> None:
    request = Request(CONTEXT * 20, QUESTION)
    whole = tokenize_request(tokenizer, request, OPTIONS)
    length = len(whole.context_ids)
    with pytest.raises(ValueError, match=rf"{length} tokens, max_context_length is 10"):
        tokenize_request(tokenizer, request, RequestOptions(max_context_length=10))
    cut = tokenize_request(
        tokenizer, request, RequestOptions(max_context_length=10, truncate_context=True)
    )
    assert cut.context_ids == whole.context_ids[:10]
    assert cut.question_ids == whole.question_ids


def test_empty_question_without_template(tokenizer) -> None:
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="gives no tokens"):
        tokenize_request(tokenizer, Request(CONTEXT, ""), OPTIONS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_context_length": 0}, "max_context_length.*>= 1, got 0"),
        ({"max_context_length": True}, "max_context_length"),
        ({"truncate_context": "yes"}, "truncate_context.*'yes'"),
        ({"max_context": 3}, "'max_context'.*not known"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RequestOptions.parse(options)
