"""Newton-Schulz against worked values, its symmetries and singular values; Muon against its formula and torch's own."""

from __future__ import annotations

import io
import math

import pytest
import torch
from torch import Tensor

from sparing.config import parse_config, planned_config
from sparing.config.released import RELEASED
from sparing.config.roles import Stacked
from sparing.models.loading import build
from sparing.training import RECIPES
from sparing.training.muon import Muon, independent_matrices, muon_update, newton_schulz
from sparing.training.optimizers import make_optimizer
from sparing.training.run import new_state
from tests.tiny import CONFIGS, DRAFTER

FAST, SETTLING = (3.4445, -4.7750, 2.0315), (2.0, -1.5, 0.5)
SHAPES = [(1, 1), (1, 7), (5, 5), (6, 11), (8, 64), (64, 8), (40, 33)]


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def orthogonal(n: int, seed: int) -> Tensor:
    return torch.linalg.qr(gaussian(n, n, seed=seed)).Q


def with_singular_values(values: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """(matrix [n, columns], left vectors, right vectors), float64."""
    U, V = orthogonal(len(values), 1), orthogonal(columns, 2)[:, : len(values)]
    return (U * values) @ V.T, U, V


def mapped(values: Tensor) -> Tensor:
    """What the scalar polynomials make of singular values relative to the norm."""
    x = values / values.norm()
    for c0, c1, c2 in [FAST] * 8 + [SETTLING] * 2:
        x = c0 * x + c1 * x**3 + c2 * x**5
    return x


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        ([[3, 0], [0, 1]], [[1.0001895, 0], [0, 1.0005378]]),
        ([[1, 2], [3, 4]], [[-0.5148853, 0.8577768], [0.8576772, 0.5143871]]),
        ([[1, 2, 3], [4, 5, 6]], [[-0.5780258, 0.1150883, 0.8082024], [0.7068541, 0.5657826, 0.4247112]]),
        ([[1, 2], [2, 4]], [[0.2000029, 0.4000057], [0.4000057, 0.8000114]]),
        ([[0, 0], [0, 0]], [[0, 0], [0, 0]]),
    ],
)
def test_worked_values(matrix: list, expected: list, dtype: torch.dtype) -> None:
    G = torch.tensor(matrix, dtype=dtype)
    torch.testing.assert_close(newton_schulz(G), torch.tensor(expected, dtype=dtype), rtol=0, atol=5e-7)
    torch.testing.assert_close(newton_schulz(G.T), torch.tensor(expected, dtype=dtype).T, rtol=0, atol=5e-7)


def test_worked_values_of_the_fast_steps_alone() -> None:
    found = newton_schulz(torch.diag(torch.tensor([3.0, 1.0])), [FAST] * 8)
    torch.testing.assert_close(found, torch.diag(torch.tensor([1.1343, 0.6819])), rtol=0, atol=5e-5)


@pytest.mark.parametrize("schedule", ["deepseek_v4", "quintic5", [(1.5, -0.5, 0.0)] * 7])
@pytest.mark.parametrize("shape", SHAPES)
def test_symmetries(shape: tuple[int, int], schedule) -> None:
    G = gaussian(*shape)
    U = newton_schulz(G, schedule)
    torch.testing.assert_close(newton_schulz(G.T, schedule), U.T)
    for scale in (1e-150, 1e-3, 7.0, 1e150):
        torch.testing.assert_close(newton_schulz(scale * G, schedule), U)
    Q, R = orthogonal(shape[0], 3), orthogonal(shape[1], 4)
    torch.testing.assert_close(newton_schulz(Q @ G @ R, schedule), Q @ U @ R, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scale_does_not_matter_to_the_ends_of_a_type(dtype: torch.dtype) -> None:
    G = gaussian(6, 20, dtype=torch.float32).to(dtype)
    for scale in (2.0**-10, 2.0**10) if dtype is torch.float16 else (2.0**-100, 2.0**100):
        torch.testing.assert_close(newton_schulz(G * scale), newton_schulz(G), rtol=0, atol=0.01)
        assert newton_schulz(G * scale).dtype == dtype


@pytest.mark.parametrize("shape", SHAPES)
def test_a_batch_is_its_matrices_one_by_one(shape: tuple[int, int]) -> None:
    G = gaussian(3, 2, *shape)
    G[1, 1] = 0
    U = newton_schulz(G)
    assert not U[1, 1].any()
    for i in range(3):
        for j in range(2):
            torch.testing.assert_close(U[i, j], newton_schulz(G[i, j]))
    many = gaussian(500, 20, 30, dtype=torch.float32)  # more than go through at once
    torch.testing.assert_close(newton_schulz(many)[[3, 400]], newton_schulz(many[[3, 400]]))
    assert newton_schulz(G[:0]).shape == (0, 2, *shape)
    assert newton_schulz(G[..., :0]).shape == (3, 2, shape[0], 0)


@pytest.mark.parametrize("columns", [32, 48, 64, 256])  # the last two: several steps on the small side
def test_singular_values_follow_the_polynomials(columns: int) -> None:
    values = torch.cat([torch.logspace(0, -6, 30, dtype=torch.float64), torch.zeros(2)])
    G, U, V = with_singular_values(values, columns)
    found = U.T @ newton_schulz(G) @ V
    torch.testing.assert_close(found, torch.diag(mapped(values)), rtol=0, atol=1e-7)
    relative, x = values / values.norm(), found.diagonal()
    settled = x[relative >= 2e-4]
    assert settled.min() >= 1 and settled.max() <= 1.00054
    nearly = x[relative >= 3e-5]
    assert nearly.min() >= 1 and nearly.max() <= 1.0021


def test_what_becomes_of_the_smallest_singular_values() -> None:
    values = torch.tensor([1.0, 1e-5, 1e-6, 0.0], dtype=torch.float64)
    G, U, V = with_singular_values(values, 4)
    found = (U.T @ newton_schulz(G) @ V).diagonal()
    expected = torch.tensor([1.0001, 0.686, 0.079, 0.0], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("columns", [64, 100, 128, 512])
def test_float32_products_lose_nothing_that_counts(columns: int) -> None:
    """Also where a matrix has no full rank, whose missing directions a Gram matrix holds as noise."""
    values = torch.cat([torch.logspace(0, -5, 50, dtype=torch.float64), torch.zeros(14)])
    G, _, _ = with_singular_values(values, columns)
    torch.testing.assert_close(newton_schulz(G.float()).double(), newton_schulz(G), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "schedule", [[(8.2872, -23.5959, 17.3004), (4.107, -2.9479, 0.5448), (3.9487, -2.9089, 0.5518)]]
)
def test_steeper_steps_are_as_stable_in_groups(schedule) -> None:
    """Steps of Polar Express, which raise the smallest values fastest."""
    schedule = [*schedule, *[(3.3184, -2.4885, 0.51)] * 2, (1.875, -1.25, 0.375)]
    values = torch.cat([torch.logspace(0, -3, 24, dtype=torch.float64), torch.zeros(8)])
    G, _, _ = with_singular_values(values, 128)
    torch.testing.assert_close(
        newton_schulz(G.float(), schedule).double(), newton_schulz(G, schedule), rtol=0, atol=2e-3
    )


def test_products_in_bfloat16() -> None:
    G = gaussian(48, 96, dtype=torch.float32)
    U = newton_schulz(G, dtype=torch.bfloat16)
    assert U.dtype == torch.float32
    values = torch.linalg.svdvals(U)
    assert values.min() > 0.98 and values.max() < 1.02
    quintic = torch.linalg.svdvals(newton_schulz(gaussian(64, 64), "quintic5"))
    assert 0.05 < quintic.min() < 0.9 and quintic.max() < 1.21


def test_not_a_number_is_not_hidden() -> None:
    G = gaussian(2, 4, 5)
    G[0, 1, 1] = math.nan
    U = newton_schulz(G)
    assert U[0].isnan().all() and U[1].isfinite().all()


@pytest.mark.parametrize(
    ("G", "schedule", "message"),
    [
        (torch.zeros(3), "deepseek_v4", r"G is torch.float32 \[3\], must be floating-point"),
        (torch.zeros(2, 3, dtype=torch.int64), "deepseek_v4", r"G is torch.int64 \[2, 3\], must be floating-point"),
        (torch.zeros(2, 3), "quintic", "schedule is 'quintic', use deepseek_v4, quintic5 or a list"),
        (torch.zeros(2, 3), [], "must be a list of three finite coefficients a step"),
        (torch.zeros(2, 3), [(1.0, 2.0)], "must be a list of three finite coefficients a step"),
        (torch.zeros(2, 3), [(1.0, math.inf, 0.0)], "must be a list of three finite coefficients a step"),
    ],
)
def test_what_cannot_be_iterated_is_refused(G: Tensor, schedule, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        newton_schulz(G, schedule)


def test_a_step_has_the_promised_size() -> None:
    for shape in ((30, 30), (16, 64), (64, 16)):
        W, M = muon_update(torch.zeros(shape), gaussian(*shape, dtype=torch.float32), torch.zeros(shape), lr=0.01)
        # of n singular values near one: sqrt(max(a, b)) |U| / sqrt(a b) = 1
        torch.testing.assert_close(W.square().mean().sqrt().item(), 0.18 * 0.01, rtol=1e-3, atol=0)
        assert M.any()
    W, _ = muon_update(torch.ones(2, 3), torch.zeros(2, 3), torch.zeros(2, 3), lr=0.1, weight_decay=0.5)
    torch.testing.assert_close(W, torch.full((2, 3), 0.95))


def parameters(seed: int = 0) -> dict[str, torch.nn.Parameter]:
    shapes = {
        "wide": (6, 20),
        "tall": (20, 6),
        "another": (6, 20),
        "square": (8, 8),
        "experts": (3, 6, 20),
        "gated": (3, 12, 20),
        "mixed": (2 + 6 + 25, 20),
        "table": (30, 4),
        "vector": (7,),
    }
    return {
        name: torch.nn.Parameter(gaussian(*shape, seed=seed + i, dtype=torch.float32))
        for i, (name, shape) in enumerate(shapes.items())
    }


ROWS = {"gated": (6, 6), "mixed": (2, 6, 25)}


def muon(named: dict[str, torch.nn.Parameter], **options) -> Muon:
    plain = [p for name, p in named.items() if name not in (*ROWS, "table", "vector")]
    groups = [{"params": [named[name]], "rows": rows} for name, rows in ROWS.items()]
    elements = {"params": [named["table"], named["vector"]], "algorithm": "adamw"}
    return Muon([{"params": plain}, *groups, elements], **({"lr": 0.02} | options))


def set_gradients(named: dict[str, torch.nn.Parameter], step: int) -> None:
    for i, p in enumerate(named.values()):
        p.grad = gaussian(*p.shape, seed=100 * step + i, dtype=torch.float32)


def test_muon_is_its_formula_for_every_matrix_alone_and_adamw_for_the_rest() -> None:
    named, others = parameters(), parameters()
    optimizer = muon(named)
    elements = [others["table"], others["vector"]]
    adamw = torch.optim.AdamW(elements, 0.02, (0.9, 0.95), eps=1e-20, weight_decay=0.1, fused=True)
    momenta = {name: torch.zeros_like(p) for name, p in others.items()}
    for step in range(4):
        optimizer.param_groups[0]["lr"] = 0.02 * (step + 1)  # as schedules do
        set_gradients(named, step)
        set_gradients(others, step)
        optimizer.step()
        adamw.step()
        with torch.no_grad():
            for name, p in others.items():
                if name not in ("table", "vector"):
                    lr = 0.02 if name in ROWS else 0.02 * (step + 1)
                    parts = (t.split(ROWS.get(name, p.shape[-2]), -2) for t in (p, p.grad, momenta[name]))
                    for W, G, M in zip(*parts, strict=True):
                        new_W, new_M = muon_update(W, G, M, lr)
                        W.copy_(new_W)
                        M.copy_(new_M)
    for name, p in others.items():
        torch.testing.assert_close(named[name], p, rtol=1e-5, atol=1e-5)
    assert torch.equal(named["table"], others["table"]) and torch.equal(named["vector"], others["vector"])


def test_it_is_what_torch_calls_muon_with_its_settings() -> None:
    """torch averages gradients, ours sums them: one direction. Its products are bfloat16, one matrix at a time."""
    names = ("wide", "tall", "square")
    ours, theirs = ({name: parameters()[name] for name in names} for _ in range(2))
    a = Muon(ours.values(), 0.02, rms=0.2, schedule="quintic5", dtype=torch.bfloat16)
    b = torch.optim.Muon(theirs.values(), 0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(5):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        a.step()
        b.step()
    for name in names:
        start = parameters()[name]
        moved, expected = ours[name] - start, theirs[name] - start
        assert (moved - expected).norm() < 0.02 * expected.norm(), name


def test_a_saved_state_goes_on_to_the_bit() -> None:
    whole, first, second = parameters(), parameters(), parameters()
    a, b = muon(whole), muon(first)
    for step in range(3):
        set_gradients(whole, step)
        set_gradients(first, step)
        a.step()
        b.step()
    file = io.BytesIO()
    torch.save(b.state_dict(), file)
    file.seek(0)
    c = muon(second, lr=0.5, momentum=0.1)  # of other settings, which the state replaces
    c.load_state_dict(torch.load(file))
    with torch.no_grad():
        for name, p in second.items():
            p.copy_(first[name])
    for step in range(3, 6):
        set_gradients(whole, step)
        set_gradients(second, step)
        a.step()
        c.step()
    assert all(torch.equal(whole[name], p) for name, p in second.items())


def test_the_state_of_another_optimizer_is_refused() -> None:
    named = parameters()
    wide = [named["wide"]]
    with pytest.raises(ValueError, match="the state of another optimizer, not of Muon: its groups say lr, betas"):
        Muon(wide, 0.1).load_state_dict(torch.optim.AdamW(wide).state_dict())
    with pytest.raises(
        ValueError, match="the state of another optimizer, not of Muon: its groups say lr, weight_decay"
    ):
        Muon(wide, 0.1).load_state_dict(torch.optim.Muon(wide).state_dict())
    with pytest.raises(ValueError, match=r"the state of another Muon: rows is \(3, 3\), here None"):
        Muon(wide, 0.1).load_state_dict(Muon([{"params": wide, "rows": (3, 3)}], 0.1).state_dict())


@pytest.mark.parametrize(
    ("groups", "options", "message"),
    [
        (
            [torch.zeros(3)],
            {},
            r'a parameter is torch.float32 \[3\], not matrices .*: put it in a group of {"algorithm"',
        ),
        (
            [{"params": [torch.zeros(4, 2)], "rows": (2, 3)}],
            {},
            r"rows are \(2, 3\), 5 in all: a parameter has \[4, 2\]",
        ),
        ([{"params": [torch.zeros(4, 2)], "algorithm": "sgd"}], {}, "algorithm is 'sgd', use muon or adamw"),
        ([torch.zeros(4, 2)], {"lr": -1.0}, "lr is -1.0, must be at least 0"),
        ([torch.zeros(4, 2)], {"lr": math.nan}, "lr is nan, must be at least 0"),
        ([torch.zeros(4, 2)], {"momentum": 1.0}, "momentum is 1.0, must be at least 0 and below 1.0"),
        ([torch.zeros(4, 2)], {"betas": (0.9, 1.0)}, r"betas is \(0.9, 1.0\), must be two numbers"),
        ([torch.zeros(4, 2)], {"schedule": "fast"}, "schedule is 'fast', use deepseek_v4, quintic5"),
    ],
)
def test_groups_that_make_no_sense_are_refused(groups, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Muon(groups, **({"lr": 0.1} | options))


def test_a_parameter_without_a_gradient_stays_and_a_loss_is_handed_back() -> None:
    a, b = (torch.nn.Parameter(gaussian(3, 4, dtype=torch.float32)) for _ in range(2))
    optimizer = Muon([a, b], 0.1)
    before = b.clone()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = a.square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first
    assert torch.equal(b, before)


def named_parameters(model: torch.nn.Module) -> dict[int, str]:
    return {id(p): name for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", [*CONFIGS, "drafter", *RECIPES, "nvfp4"])
def test_every_parameter_of_every_family_is_trained_once(name: str) -> None:
    """Matrices by Muon; embeddings, heads, norms, biases, states and filters by AdamW."""
    if name in RECIPES or name == "nvfp4":
        recipe = RECIPES["recipes/hybrid"].with_settings({"products": "nvfp4"}) if name == "nvfp4" else RECIPES[name]
        model = new_state(recipe, 0).model
    else:
        raw = DRAFTER | {"use_ordered_embeddings": True, "num_centroids": 61} if name == "drafter" else CONFIGS[name]
        model = build(parse_config(raw)).to_empty(device="cpu")
    names = named_parameters(model)
    optimizer = make_optimizer("muon", model, betas=(0.9, 0.95), weight_decay=0.1)
    assert sorted(id(p) for g in optimizer.param_groups for p in g["params"]) == sorted(names)
    roles = model.roles()
    for group in optimizer.param_groups:
        for p in group["params"]:
            role = roles[names[id(p)].removesuffix(".master")]
            is_table = role.is_head or role.is_looked_up or role.name in ("convolution", "position bias")
            assert (group["algorithm"] == "muon") == (p.ndim > 1 and not is_table), names[id(p)]
            assert group["weight_decay"] == (0.1 if p.ndim > 1 else 0.0)
            if group["algorithm"] == "muon":
                with torch.no_grad():
                    p.zero_()
                    for matrix in independent_matrices(p, group["rows"]):
                        assert matrix.ndim == 2
                        matrix.add_(1.0)
                assert p.eq(1).all(), "each number belongs to one matrix"


DEEPSEEK_V4 = {
    "model_type": "deepseek_v4",
    "num_hidden_layers": 3,
    "compress_ratios": [0, 4, 128],
    "num_hash_layers": 1,
}


def test_fused_projections_are_split_into_what_is_independent() -> None:
    split: dict[str, set[int]] = {}
    for raw in (*RELEASED.values(), DEEPSEEK_V4):
        for name, (shape, role) in planned_config(raw).tensors().items():
            if isinstance(shape, Stacked):
                assert role.is_orthogonalised and sum(shape.rows) == shape[-2]
                split.setdefault(name.removesuffix(".weight").rpartition(".")[2], set()).add(len(shape.rows))
    compressor = {"kv_proj": {1, 2}, "gate_proj": {1, 2}}  # halves where windows overlap
    fixed = {"in_proj": {5}, "gate_up_proj": {2}, "fn": {3}}  # z, x, B, C, dt; gate, up; read, write, mix
    assert {name: split.pop(name) for name in compressor | fixed} == compressor | fixed
    assert split.keys() == {"per_layer_model_projection", "o_a_proj"}  # by layer, by group


def test_what_of_deepseek_v4_muon_takes() -> None:
    """Functions of hyper-connections and routers too; not what they start from, sinks, tables and position biases."""
    left = {
        name.removesuffix(".weight").rpartition(".")[2]
        for name, (_, role) in parse_config(DEEPSEEK_V4).tensors().items()
        if not role.is_orthogonalised
    }
    norms = {"norm", "q_a_norm", "kv_norm", "input_layernorm", "post_attention_layernorm"}
    gates = {"base", "scale", "hc_base", "hc_scale", "e_score_correction_bias"}
    assert left == norms | gates | {"embed_tokens", "lm_head", "sinks", "position_bias", "tid2eid"}
