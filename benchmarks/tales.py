"""What the bundled fairy-tale model can do: likelihood, real words, speed by sampler setting, repair.

    python benchmarks/tales.py [--words 10000]

Everything is measured on the held-out ends of the thirteen books. Writes benchmarks/results/tales.json.
"""

from __future__ import annotations

import argparse
from typing import Any

import sparing
from harness import write_result
from sparing.models.diffusion_gemma import DiffusionGemma
from sparing.training.data import TextData, corpus_file
from sparing.training.evaluate import repair, tell_tales, text_losses, words_of
from sparing.training.recipes.tales import RECIPE

PROMPTS = [
    "Once upon a time there was a king who had",
    "There was once a poor woodcutter who lived with his wife",
    "Long ago, in a far country, a young prince",
    "The old woman said to the girl",
    "When the morning came, the youngest son",
    "In the middle of the forest stood a castle",
    "A fox once met a wolf",
    "The princess looked out of the window and",
]
REPAIRS = 120  # canvases
SAMPLERS = {  # what trades quality for speed: more steps, more nats a step, lower temperatures
    "released": {},
    "96 steps": {"max_denoising_steps": 96},
    "bound 0.5": {"entropy_bound": 0.5},
    "bound 0.5, 96 steps": {"entropy_bound": 0.5, "max_denoising_steps": 96},
    "bound 1, 192 steps": {"entropy_bound": 1.0, "max_denoising_steps": 192},
    "bound 2": {"entropy_bound": 2.0},
    "cooler": {"t_min": 0.1, "t_max": 0.4},
    "cooler, bound 0.5": {"t_min": 0.1, "t_max": 0.4, "entropy_bound": 0.5},
    "cooler, bound 2": {"t_min": 0.1, "t_max": 0.4, "entropy_bound": 2.0},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tales")
    parser.add_argument("--words", type=int, default=10_000, help="words told per decoder")
    parser.add_argument("--sampler-words", type=int, default=1_500, help="words told per sampler setting")
    arguments = parser.parse_args()
    model = sparing.load(arguments.model, dtype="float32")
    data = RECIPE.data(RECIPE, 0)
    assert isinstance(model, DiffusionGemma)
    assert isinstance(data, TextData)
    vocabulary = set(words_of(corpus_file("fairy_tales.txt").read_text(encoding="ascii")))

    def tell(words: int, decoder: str, **options: Any) -> dict[str, float]:
        tales = max(1, words // 150)  # 256 tokens hold about this many words
        prompts = [PROMPTS[i % len(PROMPTS)] for i in range(tales)]
        found = tell_tales(model, prompts, vocabulary, decoder, **options)
        print(decoder, options, found, flush=True)
        return found

    garbled = [data.held_out_batch(i) for i in range(-(-REPAIRS // RECIPE.batch_size))]
    losses = text_losses(model, data)
    print(losses, flush=True)
    result = {
        "losses": losses,
        "block_diffusion": tell(arguments.words, "block_diffusion"),
        "autoregressive": tell(arguments.words, "autoregressive", temperature=0.8),
        "autoregressive, temperature 1": tell(arguments.sampler_words, "autoregressive", temperature=1.0),
        "samplers": {
            name: {"settings": options, **tell(arguments.sampler_words, "block_diffusion", **options)}
            for name, options in SAMPLERS.items()
        },
        "repair": {f"{share:.0%}": repair(model, garbled, share) for share in (0.1, 0.2, 0.3)},
    }
    print(result["repair"], flush=True)
    write_result("tales", result)


if __name__ == "__main__":
    main()
