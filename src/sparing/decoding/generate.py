"""`sparing.generate`: prompts in, one stream of events out."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sparing.decoding.autoregressive import ActiveRow, autoregressive
from sparing.decoding.block_diffusion import BlockDiffusion, block_diffusion
from sparing.decoding.drafters import make_drafter
from sparing.decoding.events import Event
from sparing.decoding.sampling import Sampling, row_generator
from sparing.decoding.speculative import speculative
from sparing.decoding.transcript import Transcript
from sparing.memory.policy import policy_options
from sparing.memory.sequence import Memory
from sparing.models.base import LanguageModel

__all__ = ["generate", "prompt_ids"]

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]

DECODERS = ("autoregressive", "speculative", "block_diffusion")
AUTOREGRESSIVE_OPTIONS = {"min_p", "repetition_penalty", "logprobs"}
SPECULATIVE_OPTIONS = AUTOREGRESSIVE_OPTIONS | {"draft_tokens", "adaptive"}
BLOCK_DIFFUSION_OPTIONS = {"entropy_bound", "t_min", "t_max", "stability_threshold", "confidence_threshold"}
CANVAS_OPTIONS = {"canvas", "fixed", "max_denoising_steps"}


def generate(
    model: LanguageModel,
    prompt: Prompt | Sequence[Prompt],
    *,
    decoder: str = "auto",
    kv: str = "dense",
    max_new_tokens: int = 256,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    draft: Any = None,
    stop: str | int | Sequence[str | int] | None = None,
    memory: Memory | None = None,
    context: Sequence[int] = (),
    **options: Any,
) -> Iterator[Event]:
    """Generate text: an iterator of `Draft`, `Commit` and `Done` events, whose `.row` says which prompt they are for.

    prompt: text, a list of chat messages ({"role", "content"}), a list of ids, or a list of such prompts.
    decoder: "autoregressive", "speculative", "block_diffusion", or "auto" (speculative with a draft, else what the
    model was made for). kv: memory policy.
    max_new_tokens: limit per row. temperature, top_k, top_p and, as options, min_p, repetition_penalty: sampling
    (None: the checkpoint's generation_config; temperature 0: most likely token). seed: same seed, same output.
    draft: who guesses for the speculative decoder: "ngram" (also None; looks for the newest tokens earlier in the
    row), "mtp" (Nemotron 3's own head), a Gemma 4 drafter, or a smaller model of the same tokenizer.
    stop: strings or ids that end a row. memory: continue after what it holds (one prompt only); context: the
    ids it holds, for drafters and the repetition penalty to see.
    Further options: those of the memory policy; logprobs=True (autoregressive, speculative); draft_tokens=3 (most
    drafts a round), adaptive=False (always that many; speculative); entropy_bound, t_min, t_max,
    max_denoising_steps, stability_threshold, confidence_threshold, canvas (text or ids the first canvas starts from;
    None entries are noise), fixed (canvas positions that keep their given id) (block diffusion).
    Raises ValueError naming the argument for an empty or too long prompt, a bad value or an unknown option.
    """
    if decoder == "auto" and draft is not None:
        decoder = "speculative"
    elif decoder == "auto":
        decoder = "autoregressive" if model.config.canvas_length is None else "block_diffusion"
    if decoder not in DECODERS:
        known = ", ".join(map(repr, ("auto", *DECODERS)))
        raise ValueError(f"decoder={decoder!r} is not known, use one of {known}")
    if decoder == "block_diffusion" and model.config.canvas_length is None:
        raise ValueError(f"{model.config.model_type} has no canvas: use decoder='autoregressive'")
    if draft is not None and decoder != "speculative":
        raise ValueError(f"draft={draft!r}: decoder={decoder!r} takes no drafter, use decoder='speculative'")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}: use at least 1")
    of_memory = {name: options.pop(name) for name in policy_options(kv) if name in options}
    allowed = {
        "autoregressive": AUTOREGRESSIVE_OPTIONS,
        "speculative": SPECULATIVE_OPTIONS,
        "block_diffusion": BLOCK_DIFFUSION_OPTIONS | CANVAS_OPTIONS,
    }[decoder]
    if model.config.canvas_length is None and (of_canvas := sorted(set(options) & CANVAS_OPTIONS)):
        raise ValueError(f"{model.config.model_type} has no canvas: leave out {of_canvas[0]!r}")
    if unknown := sorted(set(options) - allowed):
        raise ValueError(f"{decoder} takes no option {unknown[0]!r}, it knows: {', '.join(sorted(allowed))}")
    draft_tokens = options.pop("draft_tokens", 3)
    if isinstance(draft_tokens, bool) or not isinstance(draft_tokens, int) or draft_tokens < 1:
        raise ValueError(f"draft_tokens is {draft_tokens!r}: use a whole number of at least 1")
    drafter = make_drafter(model, "ngram" if draft is None else draft) if decoder == "speculative" else None
    prompts = _prompt_list(prompt)
    if memory is not None and len(prompts) != 1:
        raise ValueError(f"memory continues one sequence, but there are {len(prompts)} prompts")

    if len(context) and (memory is None or len(context) != memory.length):
        held = 0 if memory is None else memory.length
        raise ValueError(f"context names {len(context)} ids, the memory holds {held}: give all of them or none")

    seed = secrets.randbits(63) if seed is None else seed
    stops = [] if stop is None else [stop] if isinstance(stop, str | int) else list(stop)
    defaults = model.generation_config
    eos_ids = model.end_ids
    rows = []
    for i, one in enumerate(prompts):
        row_memory = model.memory(kv, **of_memory) if memory is None else memory
        ids = model.check_tokens(prompt_ids(model, one), row_memory)
        row_memory.check_prompt(len(ids))
        before = [] if _is_chat(one) else [*context, *ids.tolist()]
        transcript = Transcript(model.tokenizer, eos_ids, stops, max_new_tokens, after=before)
        rows.append(ActiveRow(i, ids, row_memory, transcript, row_generator(seed, i), context=context))

    if decoder != "block_diffusion":
        sampling = _sampling(defaults, temperature, top_k, top_p, options)
        logprobs = options.get("logprobs", False)
        if drafter is None:
            return autoregressive(model, rows, sampling, logprobs=logprobs)
        adaptive = options.get("adaptive", True)
        return speculative(
            model, rows, sampling, drafter, draft_tokens=draft_tokens, adaptive=adaptive, logprobs=logprobs
        )
    return _block_diffusion(model, rows, defaults, temperature, top_k, top_p, options)


def prompt_ids(model: LanguageModel, prompt: Prompt) -> list[int]:
    """Token ids of one prompt. Raises ValueError if it is empty, or text for a model without tokenizer."""
    if len(prompt) == 0:
        raise ValueError("the prompt is empty: give at least one token of text")
    if not isinstance(prompt, str) and all(isinstance(token, int) for token in prompt):
        return list(prompt)  # type: ignore[arg-type]
    if model.tokenizer is None:
        raise ValueError("the model has no tokenizer: give the prompt as a list of token ids")
    if isinstance(prompt, str):
        return model.tokenizer.encode(prompt)
    if not all(isinstance(message, Mapping) and {"role", "content"} <= message.keys() for message in prompt):
        raise ValueError("a chat prompt is a list of messages, each with 'role' and 'content'")
    return model.tokenizer.encode_chat([dict(message) for message in prompt])  # type: ignore[call-overload]


def _is_chat(prompt: Prompt) -> bool:
    """Whether what follows a prompt is a message of its own rather than the continuation of a text."""
    return not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def _prompt_list(prompt: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many: a list whose entries are texts or lists is many."""
    if not isinstance(prompt, str) and len(prompt) and isinstance(prompt[0], str | list | tuple):
        return list(prompt)  # type: ignore[arg-type]
    return [prompt]  # type: ignore[list-item]


def _sampling(
    defaults: Mapping[str, Any],
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    options: Mapping[str, Any],
) -> Sampling:
    """The caller's settings over those of generation_config, which apply only where it asks for sampling."""
    recommended = {key: value for key, value in defaults.items() if value is not None and defaults.get("do_sample")}
    if temperature is None:
        temperature = float(recommended.get("temperature", 1.0 if recommended else 0.0))
    return Sampling(
        temperature=temperature,
        top_k=recommended.get("top_k") if top_k is None else top_k,
        top_p=recommended.get("top_p") if top_p is None else top_p,
        min_p=options.get("min_p", recommended.get("min_p")),
        repetition_penalty=options.get("repetition_penalty", defaults.get("repetition_penalty") or 1.0),
    )


def _block_diffusion(
    model: LanguageModel,
    rows: list[ActiveRow],
    defaults: Mapping[str, Any],
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    options: dict[str, Any],
) -> Iterator[Event]:
    length = model.config.canvas_length
    if temperature is not None and temperature < 0:
        raise ValueError(f"temperature is {temperature}: use 0 for the most likely token, or t_min and t_max")
    if temperature:
        raise ValueError(
            f"temperature is {temperature}: block diffusion follows a schedule, use t_min and t_max (or 0)"
        )
    for name, value in (("top_k", top_k), ("top_p", top_p)):
        if value is not None:
            raise ValueError(f"{name} is {value}: block diffusion draws from the whole vocabulary, leave it out")
    for row in rows:
        total = row.memory.length + len(row.pending) + length
        if total > model.config.max_position_embeddings:
            raise ValueError(
                f"prompt and one canvas make {total} tokens, the model's context is"
                f" {model.config.max_position_embeddings}: shorten the prompt"
            )
    canvas, fixed = options.pop("canvas", None), options.pop("fixed", ())
    if canvas is not None:
        canvas = model.tokenizer.encode(canvas, add_special_tokens=False) if isinstance(canvas, str) else list(canvas)  # type: ignore[union-attr]
        if len(canvas) > length:
            raise ValueError(f"canvas holds {len(canvas)} tokens, the model's canvas has {length}: shorten it")
        model.check_tokens([token for token in canvas if token is not None] or [0], is_canvas=True)
    if bad := [i for i in fixed if not 0 <= i < length or canvas is None or i >= len(canvas) or canvas[i] is None]:
        raise ValueError(f"fixed names canvas position {bad[0]}, which has no given token")
    settings = BlockDiffusion.from_generation_config(defaults, greedy=temperature == 0, **options)
    return block_diffusion(model, rows, settings, given=canvas, fixed=fixed)
