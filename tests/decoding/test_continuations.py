"""What a tokenizer contributes to generation: the blank of a word that goes on, and its own end of text."""

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

import sparing
from sparing.checkpoint.chat.template import ChatTemplate
from sparing.checkpoint.tokenizer import Tokenizer
from sparing.cli.conversation import Conversation
from tests.conformance.reference import load, save_random
from tests.tiny import ENDLESS, LLAMA

VOCAB = 50


def tokenizer(**options) -> Tokenizer:
    """SentencePiece's scheme, every word with the blank before it."""
    backend = Backend(models.BPE({f"▁w{i}": i for i in range(VOCAB)}, [], ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    template = ChatTemplate("{% for m in messages %}w3 w{{ m.content | length }}{% endfor %}")
    return Tokenizer(backend, chat_template=template, **options)


@pytest.fixture
def model(tmp_path):
    config = LlamaConfig(**LLAMA | ENDLESS | {"vocab_size": VOCAB})
    save_random(LlamaForCausalLM, config, tmp_path, seed=3)
    loaded = load(tmp_path)
    loaded.tokenizer, loaded.generation_config = tokenizer(), {}
    return loaded


def answer(events) -> tuple[list[int], str, str]:
    ids, text, reason = [], "", ""
    for event in events:
        if isinstance(event, sparing.Commit):
            ids, text = ids + event.ids, text + event.text
        elif isinstance(event, sparing.Done):
            reason = event.reason
    return ids, text, reason


@pytest.mark.parametrize("decoder", ["autoregressive", "speculative"])
def test_a_text_goes_on_with_its_blank(model, decoder):
    for prompt in ([5, 9], "w5"):
        ids, text, _ = answer(sparing.generate(model, prompt, decoder=decoder, max_new_tokens=4))
        assert text == "".join(f" w{i}" for i in ids)
        before = prompt if isinstance(prompt, list) else model.tokenizer.encode(prompt)
        assert model.tokenizer.decode(before) + text == model.tokenizer.decode(before + ids)


def test_a_text_in_a_memory_goes_on_with_its_blank(model):
    memory = model.memory()
    model.logits([5, 9], memory)
    ids, text, _ = answer(sparing.generate(model, [7], memory=memory, context=[5, 9], max_new_tokens=3))
    assert text == "".join(f" w{i}" for i in ids)


def test_an_answer_is_a_text_of_its_own(model):
    ids, text, _ = answer(sparing.generate(model, [{"role": "user", "content": "abcd"}], max_new_tokens=3))
    assert text == model.tokenizer.decode(ids)
    conversation = Conversation(model, max_new_tokens=3)
    assert answer(conversation.answer("abcd"))[1] == text
    assert conversation.messages[-1]["content"] == text


def test_a_blank_of_its_own_stays_where_a_stop_text_held_it_back(model):
    backend = Backend(models.BPE({" ": 0} | {f"w{i}": i for i in range(1, VOCAB)}, [], ignore_merges=True))
    backend.decoder = decoders.Fuse()
    model.tokenizer = Tokenizer(backend, chat_template=ChatTemplate("w3"))
    question, script = [{"role": "user", "content": "a"}], {0: 1e6}
    for stop in (None, " x"):
        options = {"logit_bias": script, "max_new_tokens": 3, "no_repeat_ngram_size": 1, "stop": stop}
        _, text, _ = answer(sparing.generate(model, question, **options))
        assert text.startswith(" w")
        assert answer(Conversation(model, **options).answer("a"))[1] == text


@pytest.mark.parametrize(
    ("stated", "of_config"),
    [(None, ()), (0, ()), ([0, 1], ()), (-1, ()), ([-1], (0,)), (None, (0,))],
)
def test_the_tokenizers_own_end_ends_a_text_beside_those_of_the_model(model, stated, of_config):
    whole, _, _ = answer(sparing.generate(model, [5, 9], max_new_tokens=6))
    at = whole.index(whole[3])
    model.tokenizer = tokenizer(eos_id=whole[3])
    model.generation_config = {} if stated is None else {"eos_token_id": stated}
    object.__setattr__(model.config, "eos_token_ids", of_config)
    ids, _, reason = answer(sparing.generate(model, [5, 9], max_new_tokens=6))
    earlier = next((i for i, token in enumerate(whole[:at]) if token in model.end_ids), at)
    assert (ids, reason) == (whole[: earlier + 1], "eos")


def test_a_text_that_makes_no_token_is_named(model):
    for prompt in ("x", ["w1", "x"], [{"role": "user", "content": ""}]):
        model.tokenizer.chat_template = ChatTemplate("{{ messages[0].content }}")
        with pytest.raises(ValueError, match="makes no token: the tokenizer knows nothing in it"):
            sparing.generate(model, prompt)
