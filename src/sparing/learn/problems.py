"""The practice problems of the seven systems by number, and the functions that answer them.

`PROBLEMS[182].functions["rms_norm"]` is the function the library itself runs; of those that it does not run,
`PROBLEMS[183].runs("apply_rope")` says what runs in their place. Importing this module imports none of them;
`python -m sparing.learn.problems` prints the table of `docs/problems.md`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

__all__ = ["PROBLEMS", "Functions", "Problem", "markdown"]


class Functions(Mapping[str, Callable[..., Any]]):
    """What answers a problem, by name, imported when asked for. Holds only what exists."""

    def __init__(self, problem: Problem):
        self._problem = problem

    def __getitem__(self, name: str) -> Callable[..., Any]:
        """The function. Raises KeyError saying whether it is not built yet or not of this problem."""
        problem = self._problem
        if name not in problem.names:
            raise KeyError(f"problem {problem.number} has no function {name!r}, it has {', '.join(problem.names)}")
        if (module := problem.home(name)) is None:
            raise KeyError(f"{name} (problem {problem.number}, {problem.system}: {problem.what}) is not built yet")
        return getattr(import_module(module), name)

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._problem.names if self._problem.home(name) is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)


@dataclass(frozen=True)
class Problem:
    """One practice problem.

    what: what it asks for; answers: the functions that answer it, as `module.name` below `sparing`, or as a bare name
    while the system they belong to is not built yet.
    """

    number: int
    system: str
    difficulty: str
    tags: str
    what: str
    answers: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the functions, whether they exist or not."""
        return tuple(answer.rpartition(".")[2] for answer in self.answers)

    @property
    def functions(self) -> Functions:
        return Functions(self)

    def home(self, name: str) -> str | None:
        """The module a function is in, or None while it is not built."""
        module = self.answers[self.names.index(name)].rpartition(".")[0]
        return f"sparing.{module}" if module else None

    def runs(self, name: str) -> tuple[str, ...]:
        """What the program runs, as `sparing.module.name`: the function itself, or what is held against it."""
        home = self.home(name)
        if instead := _INSTEAD.get(name):
            return tuple(f"sparing.{other}" for other in instead.split())
        return () if home is None else (f"{home}.{name}",)


# Functions that state a mechanism and that only tests call, and what runs in their place, separated by spaces.
_INSTEAD = {
    "hyper_connection": "kernels.hyper_connections.hc_pre kernels.hyper_connections.hc_post",
    "hc_static": "kernels.hyper_connections.hc_pre kernels.hyper_connections.hc_post",
    "tq_quantize": "memory.turboquant.quantisers.MseQuantiser",
    "tq_dequantize": "memory.turboquant.quantisers.MseQuantiser",
    "qjl_inner_product": "memory.turboquant.quantisers.ProdQuantiser",
    "tq_prod_quantize": "memory.turboquant.quantisers.ProdQuantiser",
    "tq_prod_inner_product": "memory.turboquant.quantisers.ProdQuantiser",
    "tq_attention": "kernels.codes.attention_over_codes",
    "qk_norm_attention": "kernels.rope.norm_rotate kernels.attention.attention",
    "apply_rope": "kernels.rope.rotate",
    "mean_resultant_length": "memory.triattention.statistics.Statistics",
    "rope_logit_series": "memory.triattention.scores.triattention_keep",
    "trig_score": "memory.triattention.scores.triattention_keep",
    "norm_score": "memory.triattention.scores.triattention_keep",
    "hybrid_cache_bytes": "planning.memory.memory_by_kind",
    "moe_layer_cost": "planning.roofline.decode_pass",
    "mtp_draft": "decoding.drafters.MTPDrafter",
    "hca_attention": "kernels.sparse_attention.attend_joint",
    "csa_attention": "kernels.sparse_attention.attend_joint",
    "muon_update": "training.muon.Muon",
    "generate_block_diffusion": "decoding.block_diffusion.BlockDiffusionStepper",
}

# Number, difficulty, tags, what it asks for, answers separated by spaces.
_TABLE: dict[str, list[tuple[int, str, str, str, str]]] = {
    "TurboQuant": [
        (173, "Medium", "linear algebra, QR", "random rotation", "memory.turboquant.rotation.random_rotation"),
        (174, "Medium", "optimisation", "Lloyd-Max codebook", "memory.turboquant.codebook.lloyd_max_codebook"),
        (
            175,
            "Medium",
            "linear algebra",
            "quantise and dequantise (MSE)",
            "memory.turboquant.definition.tq_quantize memory.turboquant.definition.tq_dequantize",
        ),
        (
            176,
            "Medium",
            "linear algebra",
            "one-bit residual sketch (QJL)",
            "memory.turboquant.definition.qjl_sketch memory.turboquant.definition.qjl_inner_product",
        ),
        (
            177,
            "Hard",
            "linear algebra",
            "inner-product quantiser",
            "memory.turboquant.definition.tq_prod_quantize memory.turboquant.definition.tq_prod_inner_product",
        ),
        (
            178,
            "Hard",
            "transformers",
            "attention over a quantised KV cache",
            "memory.turboquant.definition.tq_attention",
        ),
    ],
    "Gemma 4": [
        (181, "Hard", "attention, normalisation", "QK-norm attention", "kernels.attention.qk_norm_attention"),
        (182, "Easy", "normalisation", "RMSNorm", "kernels.norm.rms_norm"),
        (
            183,
            "Medium",
            "RoPE",
            "partial (proportional) RoPE",
            "kernels.rope.proportional_inv_freq kernels.rope.apply_rope",
        ),
        (
            184,
            "Medium",
            "normalisation",
            "per-layer input gating",
            "kernels.per_layer.per_layer_inputs kernels.per_layer.per_layer_gate",
        ),
        (185, "Hard", "attention, KV cache", "KV sharing", "config.gemma4.kv_share_map"),
    ],
    "TriAttention": [
        (
            284,
            "Easy",
            "RoPE, KV cache",
            "query concentration",
            "memory.triattention.scores.mean_resultant_length memory.triattention.scores.q_statistics",
        ),
        (
            285,
            "Medium",
            "RoPE",
            "the RoPE logit as a trigonometric series",
            "memory.triattention.scores.rope_logit_series",
        ),
        (286, "Medium", "RoPE, KV cache", "trigonometric score", "memory.triattention.scores.trig_score"),
        (287, "Medium", "RoPE, KV cache", "norm score", "memory.triattention.scores.norm_score"),
        (
            288,
            "Medium",
            "RoPE, KV cache",
            "future offsets and GQA aggregation",
            "memory.triattention.scores.geometric_offsets memory.triattention.scores.aggregate_gqa",
        ),
        (289, "Hard", "RoPE, KV cache", "pruned KV cache", "memory.triattention.scores.triattention_keep"),
    ],
    "DeepSeek-V4": [
        (360, "Medium", "doubly stochastic, mHC", "Sinkhorn projection", "kernels.hyper_connections.sinkhorn"),
        (
            361,
            "Medium",
            "Muon, orthogonalisation",
            "Newton-Schulz",
            "training.muon.newton_schulz training.muon.muon_update",
        ),
        (
            369,
            "Hard",
            "residual, hyper-connections",
            "hyper-connection",
            "kernels.hyper_connections.hyper_connection kernels.hyper_connections.hc_pre"
            " kernels.hyper_connections.hc_post kernels.hyper_connections.hc_head kernels.hyper_connections.hc_static",
        ),
        (
            370,
            "Medium",
            "sparse attention, top-k",
            "lightning indexer and top-k attention",
            "kernels.indexer.lightning_index kernels.indexer.select_topk kernels.sparse_attention.sparse_attention",
        ),
        (
            371,
            "Medium",
            "sparse attention, KV compression",
            "window compression (HCA)",
            "kernels.compressor.compress_windows kernels.sparse_attention.hca_attention",
        ),
        (
            372,
            "Hard",
            "sparse attention, KV compression",
            "overlapping compression (CSA)",
            "kernels.compressor.csa_compress kernels.sparse_attention.csa_attention",
        ),
    ],
    "DiffusionBlocks": [
        (
            400,
            "Easy",
            "PF-ODE, residual connection",
            "Euler step of the probability-flow ODE",
            "pf_ode_euler_step residual_coefficients",
        ),
        (401, "Medium", "log-normal, inverse CDF", "equal-mass block edges", "block_edges"),
        (402, "Medium", "LayerNorm, AdaLN", "adaptive layer norm", "adaln_modulate noise_embedding"),
        (403, "Medium", "log-normal, inverse CDF, sampling", "noise levels within a block", "sample_block_sigma"),
        (404, "Medium", "loss, EDM weighting", "EDM coefficients and loss", "edm_coefficients edm_weight edm_loss"),
        (405, "Medium", "inference, PF-ODE", "sampling through the blocks", "pf_ode_sample"),
    ],
    "Nemotron 3": [
        (406, "Easy", "KV cache, Mamba, GQA", "hybrid cache bytes", "planning.memory.hybrid_cache_bytes"),
        (407, "Easy", "MoE, roofline, LatentMoE", "MoE layer cost", "planning.experts.moe_layer_cost"),
        (408, "Easy", "MoE, LatentMoE", "LatentMoE forward", "kernels.experts.latent_moe"),
        (409, "Medium", "MoE, LatentMoE, routing", "router", "kernels.routing.route"),
        (410, "Hard", "MoE, LatentMoE, routing, transformers", "LatentMoE layer", "models.nemotron3.LatentMoELayer"),
        (
            411,
            "Medium",
            "quantisation, NVFP4",
            "NVFP4",
            "weights.nvfp4.nvfp4_quantize weights.nvfp4.nvfp4_dequantize",
        ),
        (
            412,
            "Hard",
            "MTP, speculative decoding, drafting",
            "draft and verify",
            "models.nemotron3_mtp.mtp_draft decoding.speculative.verify_greedy decoding.speculative.verify_sample",
        ),
        (419, "Medium", "Mamba, SSM, NumPy", "state-space scan", "kernels.ssm.ssd_scan"),
    ],
    "DiffusionGemma": [
        (413, "Medium", "diffusion, forward process", "uniform corruption", "decoding.canvas.uniform_corrupt"),
        (
            414,
            "Hard",
            "diffusion, sampling, entropy",
            "entropy-bound acceptance",
            "decoding.canvas.entropy_bound_accept",
        ),
        (
            415,
            "Medium",
            "diffusion, sampling, early stopping",
            "stable and confident",
            "decoding.canvas.StableAndConfident",
        ),
        (
            416,
            "Medium",
            "diffusion, sampling, temperature",
            "temperature schedule",
            "decoding.canvas.linear_temperature",
        ),
        (
            417,
            "Hard",
            "diffusion, attention masking",
            "encoder, canvas and training masks",
            "kernels.masks.encoder_mask kernels.masks.canvas_mask kernels.masks.block_diffusion_training_mask",
        ),
        (
            418,
            "Hard",
            "diffusion, sampling, inference",
            "block-diffusion generation",
            "decoding.block_diffusion.generate_block_diffusion",
        ),
    ],
}

PROBLEMS: dict[int, Problem] = {
    number: Problem(number, system, difficulty, tags, what, tuple(answers.split()))
    for number, system, (_, difficulty, tags, what, answers) in sorted(
        (row[0], system, row) for system, rows in _TABLE.items() for row in rows
    )
}


def markdown() -> str:
    """The text of `docs/problems.md`."""
    built = sum(len(problem.functions) == len(problem.names) for problem in PROBLEMS.values())
    lines = [
        "# Practice problems",
        "",
        f"{len(PROBLEMS)} problems about seven systems. {built} of them are answered by functions of this library.",
        '`sparing.learn.problems.PROBLEMS[182].functions["rms_norm"]` finds one by number and name.',
        "The program runs these functions themselves, except where `runs as` follows: those are the definitions that",
        "tests hold against what runs in their place. This page is written by `make docs`.",
        "",
        "| Number | System | Difficulty | What it asks for | Tags | Function |",
        "|---|---|---|---|---|---|",
    ]
    for problem in PROBLEMS.values():
        functions = "<br>".join(_entry(problem, name) for name in problem.names)
        lines.append(
            f"| {problem.number} | {problem.system} | {problem.difficulty} | {problem.what} | {problem.tags}"
            f" | {functions} |"
        )
    return "\n".join(lines) + "\n"


def _entry(problem: Problem, name: str) -> str:
    if (module := problem.home(name)) is None:
        return f"`{name}`: not yet"
    instead = "" if name not in _INSTEAD else f" (runs as {', '.join(f'`{other}`' for other in problem.runs(name))})"
    return f"`{module}.{name}`{instead}"


if __name__ == "__main__":
    print(markdown(), end="")
