"""`sparing.generate`: prompts in, events out."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sparing.config.generation import CANVAS, WARPERS, GenerationConfig, check_setting, parse_generation_config
from sparing.config.numbers import flag, token_ids, whole
from sparing.config.policy import parse_policy, policy_options, same_policy, settled
from sparing.decoding.autoregressive import AutoregressiveStepper
from sparing.decoding.block_diffusion import BlockDiffusionStepper
from sparing.decoding.canvas import BlockDiffusion
from sparing.decoding.chat_prompt import chat_ids, is_chat, template_variables
from sparing.decoding.drafters import make_drafter
from sparing.decoding.engine import run
from sparing.decoding.events import Event
from sparing.decoding.row import ActiveRow
from sparing.decoding.sampling import SMALLEST_TEMPERATURE, row_generator
from sparing.decoding.settings import SAMPLING_OPTIONS, canvas_rules, is_neutral, resolve_sampling, warn_of_settings
from sparing.decoding.speculative import Speculation, SpeculativeStepper
from sparing.decoding.stops import stop_entries
from sparing.decoding.transcript import Transcript
from sparing.errors import shown
from sparing.memory.sequence import Memory
from sparing.models.base import LanguageModel
from sparing.models.diffusion_gemma import DiffusionGemma

__all__ = ["generate", "prompt_ids"]

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]

DECODERS = ("autoregressive", "speculative", "block_diffusion")
AUTOREGRESSIVE_OPTIONS = {*SAMPLING_OPTIONS, "logprobs"}
SPECULATIVE_OPTIONS = AUTOREGRESSIVE_OPTIONS | {"draft_tokens", "adaptive"}
BLOCK_DIFFUSION_OPTIONS = {*CANVAS, *SAMPLING_OPTIONS}  # of which those that are not defined there are refused by name
CANVAS_OPTIONS = {"canvas", "fixed", "max_denoising_steps"}


def generate(
    model: LanguageModel,
    prompt: Prompt | Sequence[Prompt],
    *,
    decoder: str = "auto",
    kv: str = "dense",
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    draft: str | LanguageModel | None = None,
    stop: str | int | Sequence[str | int] | None = None,
    memory: Memory | None = None,
    context: Sequence[int] = (),
    tools: Sequence[Mapping[str, Any]] | None = None,
    enable_thinking: bool | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> Iterator[Event]:
    """Generate text: an iterator of `Draft`, `Commit` and `Done` events, whose `.row` says which prompt they are for.

    prompt: text, a list of chat messages ({"role", "content"}), ids (a list, array or tensor [n]), or a list of such
    prompts. decoder: "autoregressive", "speculative", "block_diffusion", or "auto" (speculative with a draft, else what
    the model was made for). kv: memory policy.
    max_new_tokens: limit per row (None: the checkpoint's generation_config, else 256). temperature, top_k, top_p:
    sampling (None: the generation_config; temperature 0: most likely token). seed: same seed, same output.
    draft: who guesses for the speculative decoder: "ngram" (also None; looks for the newest tokens earlier in the
    row), "mtp" (Nemotron 3's own head), a Gemma 4 drafter, or a smaller model of the same tokenizer.
    stop: strings or ids that end a row (None: the generation_config's stop_strings). memory: continue after what it
    holds (one prompt only), under its own policy; context: the ids it holds, for drafters and penalties to see.
    tools (JSON schemas), enable_thinking, chat_template_kwargs (whatever else it reads, such as reasoning_effort,
    documents, continue_final_message): for the template of a chat prompt; refused where it does not read them.
    Further options: those of the memory policy; logprobs=True (autoregressive, speculative); draft_tokens=3 (most
    drafts a round), adaptive=False (always that many; speculative); entropy_bound, t_min, t_max,
    max_denoising_steps, stability_threshold, confidence_threshold, canvas (text or ids the first canvas starts from;
    None entries are noise), fixed (canvas positions that keep their given id) (block diffusion).
    Settings that change logits, over those of the generation_config: `Sampling` and `Rules` list them
    (repetition_penalty, presence_penalty, frequency_penalty, min_p, suppress_tokens, bad_words_ids, min_new_tokens,
    no_repeat_ngram_size ...), and logit_bias={id or text of one token: what is added to its logit}. None leaves a
    setting to the file, its neutral value (0 for top_k, 1.0 for top_p, an empty list) switches it off. On a canvas
    those that look at what was generated before are refused.
    Ids that stand for an image, sound or video are never chosen. What a generation_config asks for and is not obeyed is
    named in a warning.
    Raises ValueError naming the argument for an empty or too long prompt, a bad value or an unknown option; and, while
    events are taken, for logits that are not finite, naming the row and where they arose: no token is chosen from them,
    and the memory is as before the pass. Of several prompts the others are answered first.
    """
    if decoder == "auto" and draft is not None:
        decoder = "speculative"
    elif decoder == "auto":
        decoder = "autoregressive" if model.config.canvas_length is None else "block_diffusion"
    if decoder not in DECODERS:
        known = ", ".join(map(repr, ("auto", *DECODERS)))
        raise ValueError(f"decoder={decoder!r} is not known, use one of {known}")
    if decoder == "block_diffusion" and not isinstance(model, DiffusionGemma):
        raise ValueError(f"{model.config.model_type} has no canvas: use decoder='autoregressive'")
    if draft is not None and decoder != "speculative":
        raise ValueError(f"draft={draft!r}: decoder={decoder!r} takes no drafter, use decoder='speculative'")
    if max_new_tokens is not None:
        max_new_tokens = whole("max_new_tokens", max_new_tokens, 1)
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
    draft_tokens = whole("draft_tokens", options.pop("draft_tokens", 3), 1)
    adaptive = flag("adaptive", options.pop("adaptive", True))
    logprobs = flag("logprobs", options.pop("logprobs", False))
    drafter = make_drafter(model, "ngram" if draft is None else draft) if decoder == "speculative" else None
    prompts = _prompt_list(prompt)
    if memory is not None:
        _check_memory(model, memory, kv, of_memory, prompts)
    context = token_ids("context", context, model.config.vocab_size)
    if context and (memory is None or len(context) != memory.length):
        held = 0 if memory is None else memory.length
        raise ValueError(f"context names {len(context)} ids, the memory holds {held}: give all of them or none")

    variables = template_variables(tools, enable_thinking, chat_template_kwargs)
    seed = secrets.randbits(63) if seed is None else whole("seed", seed, 0, 2**63 - 1)
    config = parse_generation_config(model.generation_config)
    options |= {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    without_effect = dict(config.not_obeyed)
    stops = stop_entries(config.stop_strings if stop is None else stop)
    if stop is None and stops and model.tokenizer is None:
        without_effect["stop_strings"], stops = stops, []
    eos_ids = model.end_ids
    empty = model.memory_plan(kv, **of_memory).memory if memory is None else lambda: memory
    rows = []
    for i, one in enumerate(prompts):
        row_memory = empty()
        ids = model.check_tokens(prompt_ids(model, one, variables), row_memory)
        row_memory.check_prompt(len(ids))
        limit = config.limit(row_memory.length + len(ids)) if max_new_tokens is None else max_new_tokens
        before = [] if is_chat(one) else [*context, *ids.tolist()]
        transcript = Transcript(model.tokenizer, eos_ids, stops, limit, after=before)
        rows.append(ActiveRow(i, ids, row_memory, transcript, row_generator(seed, i), context=context))

    if decoder == "block_diffusion" and isinstance(model, DiffusionGemma):
        return _block_diffusion(model, rows, config, without_effect, options)
    sampling = resolve_sampling(model, config, eos_ids, options)
    idle = {} if temperature is not None or sampling.temperature else WARPERS
    given = {name: options[name] for name in idle if options.get(name) is not None}
    warn_of_settings(without_effect, {name: value for name, value in given.items() if not is_neutral(name, value)})
    if drafter is None:
        return run(model, (AutoregressiveStepper(model, row, sampling, logprobs=logprobs) for row in rows))
    options = {"draft_tokens": draft_tokens, "adaptive": adaptive, "logprobs": logprobs}
    team = Speculation(model, drafter, sampling, **options)
    return run(model, (SpeculativeStepper(team, row) for row in rows))


def prompt_ids(model: LanguageModel, prompt: Any, variables: Mapping[str, Any] | None = None) -> list[int]:
    """Token ids of one prompt. variables: for the template of a chat prompt, from `template_variables`.

    Raises ValueError if it is empty, no prompt, text that makes no token, or text for a model without tokenizer.
    """
    if not isinstance(prompt, str | list | tuple | range) and not _is_array(prompt):
        way_out = "use text, a list of ids or a list of messages"
        raise ValueError(f"the prompt is {shown(prompt)}, a {type(prompt).__name__}: {way_out}")
    if len(prompt) == 0:
        raise ValueError("the prompt is empty: give at least one token of text")
    if variables and not is_chat(prompt):
        raise ValueError(f"{next(iter(variables))} is for the chat template: give the prompt as a list of messages")
    if not isinstance(prompt, str) and not is_chat(prompt):
        return list(_ids_of(prompt))
    if model.tokenizer is None:
        raise ValueError("the model has no tokenizer: give the prompt as a list of token ids")
    ids = (
        model.tokenizer.encode(prompt)
        if isinstance(prompt, str)
        else chat_ids(model.tokenizer, prompt, variables or {})
    )
    if not ids:
        raise ValueError(f"the prompt {shown(prompt)} makes no token: the tokenizer knows nothing in it")
    return ids


def _ids_of(prompt: Any) -> list[int]:
    """Ids as they were given; which of them there are is for the model to say."""
    if getattr(prompt, "ndim", 1) != 1:
        raise ValueError(f"the prompt has shape {list(prompt.shape)}: give the ids of one text, [n]")
    values = prompt.tolist() if _is_array(prompt) else prompt
    return [whole("a token of the prompt", value) for value in values]


def _prompt_list(prompt: Any) -> list[Any]:
    """One prompt or many: a list whose entries are texts, lists or arrays is many."""
    first = prompt[0] if isinstance(prompt, list | tuple) and prompt else None
    return list(prompt) if isinstance(first, str | list | tuple | range) or _is_array(first) else [prompt]


def _is_array(value: Any) -> bool:
    """Of NumPy or PyTorch, with entries; ids of their types are not arrays."""
    return getattr(value, "ndim", 0) > 0


def _check_memory(
    model: LanguageModel, memory: object, kv: str, options: Mapping[str, Any], prompts: Sequence[Any]
) -> None:
    """Raises ValueError where a memory to continue does not go with the prompts, or with a policy that was named."""
    if not isinstance(memory, Memory):
        raise ValueError(f"memory is {shown(memory)}: use what model.memory() returned")
    if len(prompts) != 1:
        raise ValueError(f"memory continues one sequence, but there are {len(prompts)} prompts")
    policy = settled(parse_policy(kv, options), model.config.memory_specs())
    if (kv != "dense" or options) and not same_policy(policy, memory.policy):
        named = f"kv={kv!r}" + (f" with {', '.join(sorted(options))}" if options else "")
        raise ValueError(
            f"{named}: the memory was made with kv={memory.policy.kv!r} and its own options, which it keeps;"
            " leave out what differs"
        )


def _block_diffusion(
    model: DiffusionGemma,
    rows: list[ActiveRow],
    config: GenerationConfig,
    without_effect: dict[str, Any],
    options: dict[str, Any],
) -> Iterator[Event]:
    length, vocab_size = model.config.canvas_length, model.config.vocab_size
    greedy = False
    if (temperature := options.pop("temperature")) is not None:
        greedy = check_setting("temperature", temperature) < SMALLEST_TEMPERATURE
        if not greedy:
            raise ValueError(
                f"temperature is {temperature}: block diffusion follows a schedule, use t_min and t_max (or 0)"
            )
    for name in ("top_k", "top_p"):
        if (value := options.pop(name)) is not None and not is_neutral(name, value):
            raise ValueError(f"{name} is {value}: block diffusion draws from the whole vocabulary, leave it out")
    for row in rows:
        total = row.memory.length + len(row.pending) + length
        if total > model.config.max_position_embeddings:
            raise ValueError(
                f"prompt and one canvas make {total} tokens, the model's context is"
                f" {model.config.max_position_embeddings}: shorten the prompt"
            )
    rules, undefined = canvas_rules(model, config, options)
    canvas, fixed = _given_canvas(model, options.pop("canvas", None), options.pop("fixed", ()))
    of_canvas = {name: options[name] for name in CANVAS if name in options}
    settings = BlockDiffusion(**{**config.canvas, **of_canvas}, greedy=greedy)
    warn_of_settings({**without_effect, **undefined}, {})
    bias = rules.of_ids(vocab_size, model.device)
    if bias is not None and not bias.amax().isfinite():
        raise ValueError("no token is left to choose: suppress_tokens, bad_words_ids and logit_bias forbid them all")
    first = {"given": canvas, "fixed": fixed}
    return run(model, (BlockDiffusionStepper(model, row, settings, bias=bias, **first) for row in rows))


def _given_canvas(model: DiffusionGemma, canvas: Any, fixed: Any) -> tuple[list[int | None] | None, tuple[int, ...]]:
    """Ids the first canvas starts from, None for noise, and the positions that keep theirs.

    Raises ValueError for a canvas that is too long, ids out of range and positions without an id that text may hold.
    """
    length = model.config.canvas_length
    ids: list[int | None] | None = None
    if isinstance(canvas, str):
        if model.tokenizer is None:
            raise ValueError("canvas is text, but the model has no tokenizer: use token ids")
        ids = list(model.tokenizer.encode(canvas, add_special_tokens=False))
    elif canvas is not None:
        if not isinstance(canvas, list | tuple) and not _is_array(canvas):
            raise ValueError(f"canvas is {shown(canvas)}: use text or a list of token ids, None for noise")
        ids = [None if token is None else whole("a token of the canvas", token) for token in canvas]
    if ids is not None:
        if len(ids) > length:
            raise ValueError(f"canvas holds {len(ids)} tokens, the model's canvas has {length}: shorten it")
        model.check_tokens([token for token in ids if token is not None] or [0], is_canvas=True)
    positions = token_ids("fixed", fixed)
    for i in positions:
        if ids is None or i >= len(ids) or ids[i] is None:
            raise ValueError(f"fixed names canvas position {i}, which has no given token")
        if ids[i] in model.config.refused_token_ids:
            raise ValueError(f"fixed names canvas position {i}: token id {ids[i]} stands for an image, sound or video")
    return ids, positions
