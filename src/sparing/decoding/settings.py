"""From a checkpoint's generation_config and the caller's options to how tokens are chosen."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sparing.config.generation import RULES, WARPERS, GenerationConfig, check_setting, named_ends
from sparing.config.numbers import number, token_ids, whole
from sparing.decoding.rules import Rules
from sparing.decoding.sampling import Sampling
from sparing.decoding.tokenizer import Tokenizer
from sparing.errors import shown
from sparing.models.base import LanguageModel

__all__ = ["CANVAS_RULES", "SAMPLING_OPTIONS", "canvas_rules", "is_neutral", "resolve_sampling", "warn_of_settings"]

SAMPLING_OPTIONS = {*RULES, *WARPERS, "logit_bias"}
CANVAS_RULES = {"logit_bias", "sequence_bias", "suppress_tokens", "bad_words_ids"}  # which look at the id alone
ABOUT_ENDS = {"min_new_tokens", "min_length", "exponential_decay_length_penalty", "bad_words_ids"}
# Of draws, where a setting changes nothing.
NEUTRAL = {"top_k": 0, "top_p": 1, "min_p": 0, "top_h": 0, "typical_p": 1, "epsilon_cutoff": 0, "eta_cutoff": 0}


def resolve_sampling(
    model: LanguageModel, config: GenerationConfig, eos_ids: tuple[int, ...], options: Mapping[str, Any]
) -> Sampling:
    """The caller's settings over those of the file. An option of None is left to the file.

    Raises ValueError naming the option for a value of another type, out of range, or beyond the vocabulary.
    """
    given = {name: value for name, value in options.items() if value is not None and name in SAMPLING_OPTIONS}
    stated: dict[str, Any] = {**config.warpers, **config.rules}
    if "min_new_tokens" in given or "min_new_tokens" in stated:
        stated.pop("min_length", None)
    elif "min_length" in given:
        stated.pop("min_new_tokens", None)
    logit_bias = _logit_bias(given.pop("logit_bias", {}), model.tokenizer, model.config.vocab_size)
    if model.generation_config and not given.keys() & ABOUT_ENDS:
        # The file's own settings speak of the ends that it names itself, as in transformers; others end the text too.
        eos_ids = named_ends(model.generation_config) or ()
    sampling = Sampling(**{**stated, **given}, refused=_refused(model), eos_ids=eos_ids)
    sampling = replace(sampling, sequence_bias=_joined(sampling, logit_bias))
    sampling.check_ids(model.config.vocab_size)
    return sampling


def canvas_rules(
    model: LanguageModel, config: GenerationConfig, options: Mapping[str, Any]
) -> tuple[Rules, dict[str, Any]]:
    """What holds at every place of a canvas, and what of the file has no meaning there.

    Raises ValueError naming the option for one that the caller gave and that looks at what was generated before;
    those that switch such a setting off are as good as none.
    """
    for name in (*WARPERS, *RULES):
        if name not in CANVAS_RULES and options.get(name) is not None and not is_neutral(name, options[name]):
            raise ValueError(
                f"{name} is {shown(options[name])}: a canvas settles everywhere at once, where that is not defined;"
                " use logit_bias or suppress_tokens"
            )
    given = {name: value for name, value in options.items() if value is not None and name in CANVAS_RULES}
    logit_bias = _logit_bias(given.pop("logit_bias", {}), model.tokenizer, model.config.vocab_size)
    if undefined := Rules(**given).of_history:
        raise ValueError(f"{undefined[0]} names sequences of several ids: on a canvas only single ids can be changed")
    stated = Rules(**config.rules)
    of_file = {name: getattr(stated, name) for name in CANVAS_RULES & config.rules.keys()}
    if "bad_words_ids" in of_file:
        of_file["bad_words_ids"] = [word for word in of_file["bad_words_ids"] if len(word) == 1]
    if "sequence_bias" in of_file:
        of_file["sequence_bias"] = [pair for pair in of_file["sequence_bias"] if len(pair[0]) == 1]
    rules = Rules(**{**of_file, **given}, refused=_refused(model))
    rules = replace(rules, sequence_bias=_joined(rules, logit_bias))
    rules.check_ids(model.config.vocab_size)
    return rules, {name: config.rules[name] for name in stated.of_history if options.get(name) is None}


def is_neutral(name: str, value: Any) -> bool:
    """Whether a setting changes nothing. Raises ValueError for a value of another type or out of range."""
    checked = check_setting(name, value)
    return checked == NEUTRAL.get(name) if name in WARPERS else checked == Rules.__dataclass_fields__[name].default


def warn_of_settings(file: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """One warning that names what has no effect: of a generation_config.json, and of what the caller gave."""
    parts = []
    if file:
        parts.append(f"not obeyed here, though the generation_config asks for it: {_listed(file)}")
    if given:
        parts.append(f"without effect where temperature is 0, give a temperature: {_listed(given)}")
    if parts:
        warnings.warn("; ".join(parts), UserWarning, stacklevel=1)


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={shown(value)}" for name, value in settings.items())


def _refused(model: LanguageModel) -> tuple[int, ...]:
    """Ids that stand for an image, sound or video, which no text holds."""
    return tuple(i for i in model.config.refused_token_ids if 0 <= i < model.config.vocab_size)


def _joined(rules: Rules, biases: Mapping[int, float]) -> list[tuple[tuple[int, ...], float]]:
    """Biases of sequences with those of single ids added."""
    found = dict(rules.sequence_bias)
    for token, bias in biases.items():
        found[(token,)] = found.get((token,), 0.0) + bias
    return list(found.items())


def _logit_bias(biases: Any, tokenizer: Tokenizer | None, vocab_size: int) -> dict[int, float]:
    """{id or text of one token: bias} by id. Digits are an id, as where JSON has to write it as text."""
    if not isinstance(biases, Mapping):
        raise ValueError(f"logit_bias is {shown(biases)}: use a dict of token ids, or texts of one token, and biases")
    found: dict[int, float] = {}
    for key, value in biases.items():
        bias = number(f"logit_bias of {shown(key)}", value, "a number, or -inf to forbid the token", high=1e30)
        token = _token(key, tokenizer) if isinstance(key, str) else whole("a key of logit_bias", key, 0)
        (token,) = token_ids("logit_bias", [token], vocab_size)
        found[token] = found.get(token, 0.0) + bias
    return found


def _token(text: str, tokenizer: Tokenizer | None) -> int:
    if text.isascii() and text.isdigit():
        return int(text)
    if tokenizer is None:
        raise ValueError(f"logit_bias names {shown(text)}: the model has no tokenizer, use a token id")
    ids = [token] if (token := tokenizer.token_to_id(text)) is not None else []
    ids = ids or tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1:
        raise ValueError(f"logit_bias names {shown(text)}, which is {len(ids)} tokens ({ids[:8]}): name one of them")
    return ids[0]
