"""The sampler against transformers' `generate`: its recorded runs, replayed step by step and from end to end."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
    DiffusionGemmaGenerationConfig,
    EntropyBoundSamplerConfig,
)

from sparing.decoding import canvas
from sparing.decoding.block_diffusion import generate_block_diffusion
from sparing.decoding.canvas import StableAndConfident, entropy_bound_accept, linear_temperature
from sparing.models.batch import Row
from tests.conformance.reference import assert_same
from tests.conformance.test_diffusion_gemma import CANVAS, TEXT_IDS, TOLERANCE, encode, pair
from tests.tiny import random_ids

BATCH = 3
LENGTHS = (9, 4, 7)


@dataclass
class Step:
    """One denoising step of the reference, all rows."""

    canvas: Tensor  # [B, L] what was denoised
    soft: Tensor | None  # [B, L, V] self-conditioning logits
    frozen: Tensor  # [B] rows that had finished before
    proposal: Tensor  # [B, L] y, the sampled ids
    accepted: Tensor  # [B, L]
    noise: Tensor  # [B, L] r, the uniform ids
    logits: Tensor  # [B, L, V] tempered
    argmax: Tensor  # [B, L]
    finished: Tensor  # [B]


@dataclass
class Recording:
    """A run of the reference: per canvas its first ids and its steps, then what it returned."""

    settings: dict
    prompts: list[Tensor]
    mask: Tensor
    padded: Tensor
    canvases: list[tuple[Tensor, list[Step]]] = field(default_factory=list)
    sequences: Tensor = field(default_factory=lambda: torch.empty(0))
    tokens_per_forward: Tensor = field(default_factory=lambda: torch.empty(0))


def record(seed: int, **settings) -> Recording:
    """Run `generate` on a left-padded batch and write down everything random and everything decided."""
    theirs, _ = pair()
    theirs.set_attn_implementation("sdpa")  # its eager attention fails on padded batches in `generate`
    prompts = [random_ids(length, vocab_size=TEXT_IDS, seed=length) for length in LENGTHS]
    padded, mask = torch.zeros(BATCH, 9, dtype=torch.long), torch.zeros(BATCH, 9, dtype=torch.long)
    for i, prompt in enumerate(prompts):
        padded[i, 9 - len(prompt) :], mask[i, 9 - len(prompt) :] = prompt, 1
    recording = Recording(settings, prompts, mask, padded)
    samplers, draws, proposals = [], [], []

    make_sampler, step = theirs._prepare_sampler, theirs._denoising_step

    def prepare(config):
        sampler = make_sampler(config)
        draw, accept = sampler.initialize_canvas, sampler.accept_canvas

        def recorded_draw(*arguments, **keywords):
            draws.append(draw(*arguments, **keywords))
            return draws[-1]

        def recorded_accept(current, proposal, logits, cur_step):
            proposals.append(proposal)
            return accept(current, proposal, logits, cur_step)

        sampler.initialize_canvas, sampler.accept_canvas = recorded_draw, recorded_accept
        samplers.append(sampler)
        return sampler

    def recorded_step(**arguments):
        frozen = arguments["finished_denoising"].clone()
        if arguments["self_conditioning_logits"] is None:
            recording.canvases.append((draws[-1], []))
        output = step(**arguments)
        _, argmax, logits, finished = output
        recording.canvases[-1][1].append(
            Step(
                arguments["current_canvas"],
                arguments["self_conditioning_logits"],
                frozen,
                proposals[-1],
                samplers[-1].accepted_token_mask,
                draws[-1],
                logits,
                argmax,
                finished.clone(),
            )
        )
        return output

    theirs._prepare_sampler, theirs._denoising_step = prepare, recorded_step
    try:
        torch.manual_seed(seed)
        bound = settings["entropy_bound"]
        config = DiffusionGemmaGenerationConfig(
            sampler_config=EntropyBoundSamplerConfig(entropy_bound=bound),
            **{key: value for key, value in settings.items() if key != "entropy_bound"},
        )
        # Only keywords can say None: the defaults fill what a config leaves unset.
        output = theirs.generate(padded, generation_config=config, attention_mask=mask)
    finally:
        del theirs._prepare_sampler, theirs._denoising_step
        theirs.set_attn_implementation("eager")
    recording.sequences, recording.tokens_per_forward = output.sequences, output.tokens_per_forward
    return recording


RELEASED = {"max_denoising_steps": 6, "entropy_bound": 0.1, "t_min": 0.4, "t_max": 0.8, "max_new_tokens": 2 * CANVAS}
# Cold enough for canvases to settle, so that rows finish at different steps.
COLD = RELEASED | {"t_min": 0.02, "t_max": 0.2, "max_denoising_steps": 16, "entropy_bound": 1.0}
END = {"eos_token_id": [3, 17, 40, 60, 71, 88], "pad_token_id": 0}
RUNS = {
    "released settings": RELEASED,
    "one step of history": COLD | {"stability_threshold": 1, "confidence_threshold": 0.5},
    "two steps of history": COLD | {"stability_threshold": 2, "confidence_threshold": 0.5},
    "no history": COLD | {"stability_threshold": 0, "confidence_threshold": 0.2},
    "end ids and padding": COLD | END | {"confidence_threshold": 0.5, "max_new_tokens": 4 * CANVAS - 3},
    "end ids without padding": COLD | {"eos_token_id": [56], "confidence_threshold": 0.5},
    "one end id": COLD | {"eos_token_id": 17, "pad_token_id": 1, "max_new_tokens": 3},
}


@pytest.fixture(scope="module", params=RUNS)
def recording(request) -> Recording:
    return record(7, **RUNS[request.param])


def test_teacher_forced_steps(recording):
    """From each recorded canvas and signal: the same logits, proposals accepted, most likely ids and stops."""
    _, ours = pair()
    settings = recording.settings
    maximum, bound = settings["max_denoising_steps"], settings["entropy_bound"]
    confidence = settings.get("confidence_threshold", 0.005)
    for row, prompt in enumerate(recording.prompts):
        memory = ours.memory()
        ours.logits(prompt, memory)
        for number, (_, steps) in enumerate(recording.canvases):
            stop = StableAndConfident(settings.get("stability_threshold", 1), confidence)
            for i, step in enumerate(steps):
                if step.frozen[row]:
                    break
                temperature = linear_temperature(maximum - i, maximum, settings["t_min"], settings["t_max"])
                logits = ours.denoise(step.canvas[row], memory, None if step.soft is None else step.soft[row])
                assert_same(logits, step.logits[row] * temperature, TOLERANCE)
                # Decisions are compared on the recorded logits: at a near-tie rounding may decide otherwise.
                z = step.logits[row][None]
                assert torch.equal(z.argmax(-1), step.argmax[row][None])
                assert torch.equal(entropy_bound_accept(z, bound)[0], step.accepted[row])
                assert bool(stop(z.argmax(-1), z)) == bool(step.finished[row])
                assert torch.equal((logits / temperature).argmax(-1), step.argmax[row])
                following = torch.where(step.accepted, step.proposal, step.noise)[row]
                if i + 1 < len(steps):
                    assert torch.equal(steps[i + 1].canvas[row], following)
            emitted = recording.sequences[row, 9 + number * CANVAS :][:CANVAS]
            pad = settings.get("pad_token_id")
            final = steps[-1].argmax[row]
            kept = CANVAS if pad is None else int((emitted == final).long().cumprod(0).sum())
            assert pad is None or (emitted[kept:] == pad).all()
            ours.run([Row(emitted, memory, wanted=0)])  # the clean canvas is what the next one is conditioned on
            memory.commit(CANVAS)


class Replay:
    """Stands in for all random numbers of our run: each row gets those that the reference's row drew."""

    def __init__(self, recording: Recording):
        self.recording = recording
        self.generators = [torch.Generator() for _ in recording.prompts]
        self.rows = {id(generator): row for row, generator in enumerate(self.generators)}
        self.canvas, self.step = [-1] * BATCH, [0] * BATCH
        self.mid_step = [False] * BATCH

    def gumbel(self, generators, sizes, device):
        """Noise so large at the recorded proposals that they are what is sampled."""
        proposals = []
        for generator in generators:
            row = self.rows[id(generator)]
            self.mid_step[row] = True
            proposals.append(self.recording.canvases[self.canvas[row]][1][self.step[row]].proposal[row])
        return lambda width: torch.nn.functional.one_hot(torch.cat(proposals), width).float() * 1e6

    def randint(self, high, size, generator):
        """The ids of a step's noise, or where no step was begun the ids of a new canvas."""
        row = self.rows[id(generator)]
        if not self.mid_step[row]:
            self.canvas[row], self.step[row] = self.canvas[row] + 1, 0
            return self.recording.canvases[self.canvas[row]][0][row]
        noise = self.recording.canvases[self.canvas[row]][1][self.step[row]].noise[row]
        self.mid_step[row], self.step[row] = False, self.step[row] + 1
        return noise


def test_whole_run_with_the_same_random_numbers(recording, monkeypatch):
    """Rows of ours leave when they are done; what they hold is what the reference's padded batch returned."""
    _, ours = pair()
    replay = Replay(recording)
    settings = recording.settings
    with monkeypatch.context() as patched:
        patched.setattr(canvas, "gumbel", replay.gumbel)
        patched.setattr(torch, "randint", replay.randint)
        sequences, tokens_per_forward, memories = generate_block_diffusion(
            ours,
            recording.padded,
            settings | {"sampler_config": {"entropy_bound": settings["entropy_bound"]}},
            attention_mask=recording.mask,
            generator=replay.generators,
        )
    if settings.get("pad_token_id") is None and settings.get("eos_token_id") is not None:
        # Without a pad id the reference goes on filling rows that have ended; ours end.
        for row in range(BATCH):
            ends = torch.isin(sequences[row, 9:], torch.tensor(settings["eos_token_id"])).nonzero()
            kept = 9 + (int(ends[0]) // CANVAS + 1) * CANVAS if len(ends) else sequences.shape[1]
            assert torch.equal(sequences[row, :kept], recording.sequences[row, :kept])
        return
    assert torch.equal(sequences, recording.sequences)
    assert_same(tokens_per_forward, recording.tokens_per_forward, 1e-6)
    for row, memory in enumerate(memories):  # the last canvas is not encoded
        generated = replay.canvas[row] + 1
        assert memory.length == LENGTHS[row] + (generated - 1) * CANVAS


def test_cached_state_equals_the_references_prefix():
    """What a run leaves behind denoises like the text it stands for."""
    theirs, ours = pair()
    recording = record(3, **COLD)
    memory = ours.memory()
    text = torch.cat([recording.prompts[0], recording.sequences[0, 9 : 9 + CANVAS]])
    ours.run([Row(text, memory, wanted=0)])
    memory.commit(len(text))
    past, _ = encode(theirs, text)
    with torch.no_grad():
        canvas = random_ids(CANVAS, seed=5)
        expected = theirs(decoder_input_ids=canvas[None], past_key_values=past).logits[0]
    assert_same(ours.denoise(canvas, memory), expected, TOLERANCE)
