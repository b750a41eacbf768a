"""What a generation_config.json may say: every setting's type, range and neutral value, and which are obeyed here.

The same checks serve the options of `sparing.generate`. Meanings are those of transformers' `GenerationConfig`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparing.config.numbers import number, token_ids, whole
from sparing.errors import CheckpointError, shown

__all__ = [
    "CANVAS",
    "RULES",
    "WARPERS",
    "GenerationConfig",
    "check_setting",
    "named_ends",
    "parse_canvas",
    "parse_generation_config",
]

Check = Callable[[str, Any], Any]
Sequences = tuple[tuple[int, ...], ...]


def _number(wanted: str, low: float = -math.inf, high: float = math.inf) -> Check:
    return lambda name, value: number(name, value, wanted, low, high)


def _count(name: str, value: Any) -> int:
    return whole(name, value, 0)


LARGEST = 1e30  # a finite number by any measure, whose products with a logit are finite too
_positive = _number("a number above 0 (1 is neutral)", 1e-6, LARGEST)
_additive = _number("a finite number (0 is neutral)", -LARGEST, LARGEST)
_share = _number("a share between 0 and 1", 0.0, 1.0)


def _top_p(name: str, value: Any) -> float:
    return number(name, value, "a probability above 0 and up to 1 (1: no limit)", math.ulp(0.0), 1.0)


def _top_k(name: str, value: Any) -> int:
    return whole(name, value, 0, hint=" (0: no limit)")


def _temperature(name: str, value: Any) -> float:
    return number(name, value, "0 for the most likely token, or more", 0.0, LARGEST)


def _ids_or_one(name: str, value: Any) -> tuple[int, ...]:
    return _ids_or_none(name, value if isinstance(value, list | tuple) else [value])


def _ids_or_none(name: str, value: Any) -> tuple[int, ...]:
    """Ids; -1 stands for no token in old files."""
    return token_ids(name, [i for i in value if not (type(i) is int and i == -1)] if isinstance(value, list) else value)


def _words(name: str, value: Any) -> Sequences:
    if not isinstance(value, list | tuple) or not all(isinstance(word, list | tuple) and word for word in value):
        raise ValueError(f"{name} is {shown(value)}: use a list of lists of token ids")
    return tuple(token_ids(name, word) for word in value)


def _sequence_bias(name: str, value: Any) -> tuple[tuple[tuple[int, ...], float], ...]:
    """{(ids): bias}, or the pairs [[ids], bias] that JSON has."""
    pairs: Sequence[Any] = list(value.items()) if isinstance(value, Mapping) else value
    if not isinstance(pairs, list | tuple) or not all(isinstance(p, list | tuple) and len(p) == 2 for p in pairs):
        raise ValueError(f"{name} is {shown(value)}: use a list of pairs [ids, bias]")
    found = {}
    for ids, bias in pairs:
        if not (key := token_ids(name, ids)):
            raise ValueError(f"{name} holds {shown([ids, bias])}: a sequence needs at least one token id")
        found[key] = number(f"{name} of {list(key)}", bias, "a number, or -inf to forbid it", high=LARGEST)
    return tuple(found.items())


def _decay(name: str, value: Any) -> tuple[int, float] | None:
    if isinstance(value, list | tuple) and not value:
        return None
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError(f"{name} is {shown(value)}: use a pair, after how many tokens and by what factor")
    return whole(f"{name}, start", value[0], 0), number(f"{name}, factor", value[1], "a number above 0", 1e-6, LARGEST)


# Which tokens a draw may take; a file's apply only where it asks for drawing (`do_sample`).
WARPERS: dict[str, Check] = {
    "temperature": _temperature,
    "top_k": _top_k,
    "top_p": _top_p,
    "min_p": _share,
    "top_h": _number("a share above 0 and up to 1 (0: no limit)", 0.0, 1.0),
    "typical_p": _number("a share above 0 and up to 1 (1: no limit)", math.ulp(0.0), 1.0),
    "epsilon_cutoff": _share,
    "eta_cutoff": _share,
}
# What changes logits before that, greedy or not.
RULES: dict[str, Check] = {
    "repetition_penalty": _positive,
    "encoder_repetition_penalty": _positive,
    "presence_penalty": _additive,
    "frequency_penalty": _additive,
    "no_repeat_ngram_size": _count,
    "encoder_no_repeat_ngram_size": _count,
    "sequence_bias": _sequence_bias,
    "bad_words_ids": _words,
    "suppress_tokens": _ids_or_none,
    "begin_suppress_tokens": _ids_or_none,
    "min_new_tokens": _count,
    "min_length": _count,
    "forced_bos_token_id": _ids_or_one,
    "forced_eos_token_id": _ids_or_one,
    "exponential_decay_length_penalty": _decay,
}
# A block-diffusion sampler's; what combines them checks their ranges.
CANVAS: dict[str, Check] = {
    "max_denoising_steps": lambda name, value: whole(name, value, 1),
    "entropy_bound": _number("a number of nats above 0", math.ulp(0.0), LARGEST),
    "t_min": _number("0 <= t_min < t_max", 0.0, LARGEST),
    "t_max": _number("0 <= t_min < t_max", 0.0, LARGEST),
    "stability_threshold": _count,
    "confidence_threshold": _number("nats above 0, or None", math.ulp(0.0), LARGEST),
}
OURS = {"presence_penalty", "frequency_penalty"}  # no setting of transformers
SAMPLER = "EntropyBoundSamplerConfig"
# Of a file, with the value at which the text is the same without them.
NOT_OBEYED: dict[str, Any] = {
    "constraints": None,
    "dola_layers": None,
    "force_words_ids": None,
    "guidance_scale": 1,
    "logit_bias": None,
    "max_time": None,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "penalty_alpha": 0,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "remove_invalid_values": False,
    "token_healing": False,
    "watermarking_config": None,
    # Of llama.cpp, in the metadata of a GGUF file.
    "general.sampling.mirostat": 0,
    "general.sampling.penalty_repeat": 1,
    "general.sampling.xtc_probability": 0,
}


@dataclass(frozen=True)
class GenerationConfig:
    """A generation_config.json, checked. Settings that it leaves out are left out here.

    warpers: how a draw is made, empty where the file asks for the most likely token; rules: what changes logits;
    canvas: of a block-diffusion sampler; max_new_tokens, max_length (prompt included): limits; stop_strings: texts that
    end an answer; not_obeyed: what would change the text and has no effect here.
    """

    warpers: Mapping[str, Any]
    rules: Mapping[str, Any]
    canvas: Mapping[str, Any]
    max_new_tokens: int | None
    max_length: int | None
    stop_strings: tuple[str, ...]
    not_obeyed: Mapping[str, Any]

    def limit(self, prompt_tokens: int) -> int:
        """How many new tokens follow a prompt at most: 256 where the file does not say.

        Raises ValueError for a prompt that leaves no room below `max_length`.
        """
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        if self.max_length is None:
            return 256
        if prompt_tokens >= self.max_length:
            raise ValueError(
                f"the prompt makes {prompt_tokens} tokens, and generation_config.json has max_length"
                f" {self.max_length}: give max_new_tokens"
            )
        return self.max_length - prompt_tokens


def named_ends(raw: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The ids that end a text as a generation_config.json names them, one or a list; None where it is silent.

    Files may spell that there is none as -1.
    """
    ids = raw.get("eos_token_id")
    if ids is None:
        return None
    return tuple(i for i in (ids if isinstance(ids, list | tuple) else (ids,)) if i >= 0)


def check_setting(name: str, value: Any) -> Any:
    """A setting's value in one form. Raises ValueError naming the setting, the value and what to use."""
    return (WARPERS | RULES | CANVAS)[name](name, value)


def parse_generation_config(raw: Mapping[str, Any], file: str = "generation_config.json") -> GenerationConfig:
    """Check what a generation_config.json says; null means unset.

    raw: its keys and values. Raises CheckpointError naming the file, the key and the value.
    """
    values = {key: value for key, value in raw.items() if value is not None}
    try:
        do_sample = values.get("do_sample", False)
        if not isinstance(do_sample, bool):
            raise ValueError(f"do_sample is {shown(do_sample)}: use true or false")
        return GenerationConfig(
            warpers=_warpers(values, do_sample),
            rules={name: check_setting(name, values[name]) for name in RULES if name in values and name not in OURS},
            canvas=parse_canvas(values),
            max_new_tokens=whole("max_new_tokens", values["max_new_tokens"], 1) if "max_new_tokens" in values else None,
            max_length=whole("max_length", values["max_length"], 1) if "max_length" in values else None,
            stop_strings=_texts("stop_strings", values.get("stop_strings", ())),
            not_obeyed=_not_obeyed(values),
        )
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from None


def _warpers(values: Mapping[str, Any], do_sample: bool) -> dict[str, Any]:
    """Where a file may say 0 or -1 for "no limit", that is left out."""
    off = {"top_k": (0, -1), "top_p": (0,)}
    found = {
        name: check_setting(name, values[name])
        for name in WARPERS
        if name in values and (isinstance(values[name], bool) or values[name] not in off.get(name, ()))
    }
    return {"temperature": 1.0, **found} if do_sample else {}


def parse_canvas(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a block-diffusion sampler among those of a generation_config.json; null means unset.

    Raises ValueError naming the key and the value.
    """
    sampler = values.get("sampler_config") or {}
    if not isinstance(sampler, Mapping):
        raise ValueError(f"sampler_config is {shown(sampler)}: use an object that holds entropy_bound")
    found = {name: check_setting(name, values[name]) for name in CANVAS if values.get(name) is not None}
    if (bound := sampler.get("entropy_bound")) is not None:
        found["entropy_bound"] = CANVAS["entropy_bound"]("sampler_config: entropy_bound", bound)
    return found


def _texts(name: str, value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"{name} is {shown(value)}: use a text or a list of texts, none of them empty")
    return tuple(texts)


def _not_obeyed(values: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: values[name] for name, off in NOT_OBEYED.items() if name in values and values[name] != off}
    if found.get("penalty_alpha") and (values.get("do_sample") or _small(values.get("top_k", 50))):
        del found["penalty_alpha"]  # contrastive search is greedy, among more than one token
    sampler = (values.get("sampler_config") or {}).get("_cls_name", SAMPLER)
    if sampler != SAMPLER:
        found["sampler_config"] = sampler
    if values.get("cache_implementation") == "quantized":
        found["cache_implementation"] = "quantized"
    return found


def _small(top_k: Any) -> bool:
    return isinstance(top_k, int) and top_k <= 1
