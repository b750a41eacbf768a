"""What forgetting costs SmolLM2-135M: teacher-forced loss with half, a quarter and an eighth of its entries.

    python benchmarks/triattention_quality.py [ranking] [ablations] [attention]

Statistics come from fairy tales; the passages are other tales, Shakespeare's plays and Python source, 1,024 tokens
each. The first 32 tokens are a protected prompt; the rest is read 32 tokens at a time, after each of which a round is
due: the same rounds as one token after another. Every way of choosing keeps equally many entries. Losses are over the
tokens read after the first round, in nats above the full memory; the standard error is that, over passages, of the
difference to trig + norm. "attention" asks of a single round over the first half how much of the attention that the
queries of the second half pay to it goes to what each score would have kept, and how each score's order agrees with
that attention. Parts that are not named are kept from the last run.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from harness import RESULTS, write_result
from texts import GENRES, calibration, passage

if TYPE_CHECKING:
    import torch

    import sparing
    from sparing.models.base import LanguageModel

LENGTH, PROMPT, CHUNK = 1024, 32, 32
CALIBRATION = 10_000  # tokens
PARTS = ("ranking", "ablations", "attention")
PASSAGES = {"ranking": 4, "ablations": 3, "attention": 2}  # of each genre

# Options of the policy, what chooses (None: the last ones).
Way = tuple[dict[str, Any], Callable[..., Any] | None]


def at_random() -> Callable[..., torch.Tensor]:
    """As many entries, drawn evenly from those held each time: an old entry has survived many draws."""
    import torch

    generator = torch.Generator().manual_seed(0)

    def choose(k_rot: Iterable[Any], *rest: Any, keep: int, protect_recent: int = 0, **options: Any) -> torch.Tensor:
        n = next(iter(k_rot)).shape[1] - protect_recent
        drawn = torch.randperm(n, generator=generator)[: keep - protect_recent].sort().values
        return torch.cat([drawn, torch.arange(n, n + protect_recent)])

    return choose


def by_lot() -> Callable[..., torch.Tensor]:
    """Those with the largest of a number drawn once for each entry: like a norm, it does not change with time."""
    import torch

    def choose(k_rot: Iterable[Any], *rest: Any, keep: int, **options: Any) -> torch.Tensor:
        keys = next(iter(k_rot))[0].double()  # the first key head's, different for every entry
        lot = (keys @ torch.linspace(1, 2, keys.shape[-1], dtype=torch.float64) * 1e5) % 1
        return lot.argsort(descending=True)[:keep].sort().values

    return choose


def smallest_norms(k_rot: Iterable[Any], q_mean: Any, q_abs_mean: Any, *rest: Any, **options: Any) -> Any:
    """The norm term upside down, otherwise as the method: means over layers of the largest of a group."""
    import torch

    from sparing.memory.triattention.scores import aggregate_gqa, norm_score

    scores = []
    for keys, center, norm in zip(k_rot, q_mean, q_abs_mean, strict=True):
        grouped = zip(keys, center.unflatten(0, (len(keys), -1)), norm.unflatten(0, (len(keys), -1)), strict=True)
        heads = [torch.stack([norm_score(k, c, n) for c, n in zip(cs, ns, strict=True)]) for k, cs, ns in grouped]
        scores.append(aggregate_gqa(torch.stack(heads)))
    smallest = torch.stack(scores).sum(0).argsort(dim=-1)
    return smallest[:, : options["keep"]].sort(dim=-1).values


def ways() -> dict[str, dict[str, Way]]:
    """Of each part: the first is what the others are compared with."""
    from sparing.memory.triattention.scores import triattention_keep

    full = {"mode": "per_head"}
    linear = [1 + round(i * 65535 / 16) for i in range(17)]
    scored = triattention_keep
    return {
        "ranking": {
            "trig + norm": (full, scored),
            "norm only": (full | {"trig": False}, scored),
            "random": (full, at_random()),
            "random, one draw an entry": (full, by_lot()),
            "window": ({}, None),
        },
        "ablations": {
            "trig + norm": (full, scored),
            "norm only, the smallest": (full, smallest_norms),
            "norm only, last 32 protected": (full | {"trig": False, "protect_recent": 32}, scored),
            "random, last 32 protected": (full | {"protect_recent": 32}, at_random()),
            "trig + unweighted norm": (full | {"norm_weighting": False}, scored),
            "17 linear offsets to 65536": (full, functools.partial(triattention_keep, offsets=linear)),
            "offsets 1 to 17": (full, functools.partial(triattention_keep, offsets=list(range(1, 18)))),
            "largest over offsets": (full | {"aggregation": "max"}, scored),
            "global": ({"mode": "global"}, scored),
            "per layer and head": ({"mode": "per_layer_per_head"}, scored),
        },
    }


def losses(model: LanguageModel, ids: torch.Tensor, kv: str, **options: Any) -> torch.Tensor:
    """Nats of every token but the first of all passages [texts, LENGTH], read side by side: [texts, LENGTH - 1]."""
    import torch
    from torch.nn import functional as F

    from sparing.models.batch import Row

    memories = [model.memory(kv, **options) for _ in ids]
    parts = []
    for start in range(0, LENGTH, CHUNK):
        hidden = model.run([Row(chunk, m) for chunk, m in zip(ids[:, start : start + CHUNK], memories, strict=True)])
        target = ids[:, start + 1 : start + CHUNK + 1]
        for row, states, memory in zip(target, hidden.split(CHUNK), memories, strict=True):
            parts.append(F.cross_entropy(model.head(states[: len(row)]), row, reduction="none"))
            memory.commit(CHUNK, prompt=start < PROMPT)
    if kv != "dense":
        budget = int(kv.split(":")[1])
        assert all(len(memory.evictions) == (LENGTH - budget) // CHUNK for memory in memories)
    chunks = [torch.stack(parts[i : i + len(ids)]) for i in range(0, len(parts), len(ids))]
    return torch.cat(chunks, 1)


def excess(model: LanguageModel, statistics: sparing.Statistics, part: str) -> dict[str, Any]:
    """Nats above the full memory of each way of choosing, at each budget."""
    import torch

    from sparing.memory.triattention import pruner as triattention

    count = PASSAGES[part]
    ids = torch.stack([passage(model, genre, i, LENGTH) for genre in GENRES for i in range(count)])
    plain = triattention.triattention_keep
    rows = []
    with torch.inference_mode():
        dense = losses(model, ids, "dense")
        for share in (0.5, 0.25, 0.125) if part == "ranking" else (0.5, 0.25):
            budget, reference = int(share * LENGTH), None
            for way, (options, choose) in ways()[part].items():
                if choose is None:  # the prompt, and as many of the last entries
                    options = {"protect_recent": budget - PROMPT - 1}
                triattention.triattention_keep = choose or plain
                options = options | {"statistics": statistics, "interval": CHUNK}
                found = losses(model, ids, f"triattention:{budget}", **options)
                above = (found - dense)[:, budget:].mean(1)  # per passage
                reference = above if reference is None else reference
                worse = above - reference
                rows.append(
                    {
                        "share": share,
                        "way": way,
                        "nats_above_full": above.mean().item(),
                        **{genre: x.mean().item() for genre, x in zip(GENRES, above.split(count), strict=True)},
                        "above_trig_norm": worse.mean().item(),
                        "standard_error": (worse.std() / len(worse) ** 0.5).item(),
                        "passages_worse": int((worse > 0).sum()),
                    }
                )
                print(rows[-1], flush=True)
    triattention.triattention_keep = plain
    return {"passages": len(ids), "full_nats": dense.mean().item(), "rows": rows}


def attention(model: LanguageModel, statistics: sparing.Statistics) -> dict[str, Any]:
    """One round after half of a passage, against the attention that all later queries pay to what it chose from."""
    import torch

    from sparing.memory.triattention.scores import norm_score, triattention_keep, trig_score
    from sparing.models.batch import RaggedBatch, Row

    half, layers = LENGTH // 2, range(model.config.num_hidden_layers)
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    class Watched(RaggedBatch):
        def attend(self, layer: int, q: Any, k: Any, v: Any, scale: float = 1.0) -> torch.Tensor:
            seen[layer] = q * scale, k
            return super().attend(layer, q, k, v, scale)

    kept: dict[str, dict[str, list[float]]] = {}
    agreement: dict[str, list[float]] = {}
    lengths = {"first key": [], "other keys": []}
    for genre in GENRES:
        for number in range(PASSAGES["attention"]):
            batch = Watched([Row(passage(model, genre, number, LENGTH), model.memory())])
            with torch.inference_mode():
                model.forward(batch)
            batch.rollback()
            paid = []  # [kv_heads, half - PROMPT] of each layer
            offsets = [2**j for j in range(17)]
            for i in layers:
                q, k = seen[i]
                kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
                logits = torch.einsum("tkgd,skd->kgts", q[half:].unflatten(1, (kv_heads, group)), k)
                hidden = torch.arange(LENGTH) > torch.arange(half, LENGTH)[:, None]
                mass = logits.masked_fill(hidden, float("-inf")).softmax(-1)[..., PROMPT:half].sum(2)  # [kv, group, n]
                paid.append(mass.sum(1))
                found, keys = statistics.layers[i], k[PROMPT:half].transpose(0, 1)
                assert found.inv_freq is not None
                lengths["first key"].append(k[0].norm(dim=-1).mean().item())
                lengths["other keys"].append(k[PROMPT:half].norm(dim=-1).mean().item())
                for h in range(q.shape[1]):
                    center, norm, mine = found.center[h], found.norm[h], keys[h // group]
                    spread = norm_score(mine, center, norm)
                    expected = trig_score(mine, center, found.inv_freq, half, offsets)
                    for name, score in (
                        ("trig + norm", expected + spread),
                        ("trig only", expected),
                        ("norm only", spread),
                        ("norm only, unweighted", norm_score(mine, center, norm, norm_weighting=False)),
                        ("length of the key", mine.norm(dim=-1)),
                        ("position", torch.arange(len(mine)).float()),
                    ):
                        order = _rank_correlation(score, mass[h // group, h % group])
                        agreement.setdefault(name, []).append(order)
            total = torch.stack(paid)  # [layers, kv_heads, n]
            arguments = (
                [seen[i][1][PROMPT:half].transpose(0, 1) for i in layers],
                [statistics.layers[i].center for i in layers],
                [statistics.layers[i].norm for i in layers],
                [layer.inv_freq for i in layers if (layer := statistics.layers[i]).inv_freq is not None],
            )
            for share in (0.5, 0.25):
                keep = int(share * half)
                choices = {
                    "the most that any choice could": total.sum(0).topk(keep).indices,
                    "trig + norm": triattention_keep(*arguments, half, keep),
                    "norm only": triattention_keep(*arguments, half, keep, trig=False),
                    "norm only, the smallest": smallest_norms(*arguments[:3], keep=keep),
                    "the last": torch.arange(half - PROMPT - keep, half - PROMPT).expand(len(total[0]), -1),
                }
                for name, index in choices.items():
                    part = total.gather(2, index.expand(len(total), -1, -1)).sum(-1) / total.sum(-1)
                    kept.setdefault(name, {}).setdefault(str(share), []).append(part.mean().item())
                kept.setdefault("random", {}).setdefault(str(share), []).append(keep / (half - PROMPT))
            print(genre, number, flush=True)
    return {
        "passages": len(GENRES) * PASSAGES["attention"],
        "share_of_later_attention_kept": {
            name: {share: sum(values) / len(values) for share, values in by_share.items()}
            for name, by_share in kept.items()
        },
        "rank_correlation_with_later_attention": {
            name: {"mean": sum(x) / len(x), "heads_above_0": sum(v > 0 for v in x) / len(x)}
            for name, x in agreement.items()
        },
        "length": {name: sum(x) / len(x) for name, x in lengths.items()},
    }


def _rank_correlation(left: torch.Tensor, right: torch.Tensor) -> float:
    import torch

    ranks = torch.stack([left, right]).argsort(-1).argsort(-1).double()
    return torch.corrcoef(ranks)[0, 1].item()


def main() -> None:
    import sparing

    wanted = sys.argv[1:] or PARTS
    path = RESULTS / "triattention_quality.json"
    earlier: Mapping[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    result = {name: earlier[name] for name in PARTS if name in earlier}
    model = sparing.load("smollm2", dtype="bfloat16", device="cpu")
    statistics = sparing.calibrate(model, calibration(model, CALIBRATION), length=2048)
    for part in wanted:
        if part == "attention":
            exact = sparing.load("smollm2", dtype="float32", device="cpu")
            result[part] = attention(exact, sparing.calibrate(exact, calibration(exact, CALIBRATION), length=2048))
        else:
            result[part] = excess(model, statistics, part)
    write_result(
        "triattention_quality",
        {
            "model": "SmolLM2-135M-Instruct",
            "dtype": {"ranking": "bfloat16", "ablations": "bfloat16", "attention": "float32"},
            "length": LENGTH,
            "prompt": PROMPT,
            "interval": CHUNK,
            "calibration_tokens": statistics.tokens,
            "concentrated_heads": (statistics.concentration() > 0.95).float().mean().item(),
            **{name: result[name] for name in PARTS if name in result},
        },
    )


if __name__ == "__main__":
    main()
