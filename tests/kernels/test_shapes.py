"""What does not fit is refused where it is handed in, before it is asked which set of kernels runs."""

import re
from typing import Any

import pytest
import torch

from sparing import kernels
from sparing.config.rope import RopeParameters
from sparing.kernels import KeysFromValues, dispatch
from sparing.kernels.code_layout import lay_out
from sparing.kernels.codes import Codes, attention_over_codes
from sparing.weights.weight import empty_packed
from tests.kernel_sets import using

M, H, E, F, L, K = 2, 8, 4, 6, 5, 2  # of experts
T, HEADS, P, N, G = 5, 4, 8, 16, 2  # of the scan
KV, S, D = 2, 7, 16  # of attention


def r(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


def drawn(*shape: int) -> torch.Tensor:
    return torch.randint(0, E, shape)


def codes(n: int, role: str, heads: int = KV, bits: int = 4) -> Codes:
    laid_out = lay_out(torch.randint(0, 1 << bits, (heads, n, D)).to(torch.uint8), bits, role)
    return Codes(laid_out, torch.rand(heads, laid_out.shape[1], 64).half(), torch.linspace(-1, 1, 1 << bits), D)


def packed(out: int, size: int):
    weight = empty_packed("int8", (out, size))
    weight.fill(lambda: iter([r(out, size)]))
    return weight


def coded(q: Any, k: Codes, v: Codes, n: int, bias: Any = None) -> torch.Tensor:
    return attention_over_codes([q], [k], [v], n, bias=bias)[0][0]


def over_values(q: Any, v: Any, where: Any, **options: Any) -> torch.Tensor:
    keys = KeysFromValues(torch.ones(D), RopeParameters("proportional", 1e4, 0.5))
    return kernels.attention_over_values(q, v, keys, where, **options)


# operation, arguments that fit, and for each that does not: what it is, and what the error says
CASES: list[tuple[Any, dict[str, Any], list[tuple[dict[str, Any], str]]]] = [
    (
        lambda **given: kernels.route(**given)[1],
        {"x": r(M, H), "gate": r(E, H), "bias": r(E), "k": K},
        [
            ({"x": r(H)}, "x has shape [8], expected [M, H]"),
            ({"gate": r(E, H - 2)}, "gate has shape [4, 6], expected [4, 8]"),
            ({"bias": r(2)}, "bias has shape [2], expected [4]"),
            ({"bias": r(1)}, "bias has shape [1], expected [4]"),
            ({"n_group": 0}, "cannot choose 2 of 4 experts in 1 of 0 groups"),
            ({"n_group": -2}, "cannot choose 2 of 4 experts in 1 of -2 groups"),
            ({"topk_group": 2}, "cannot choose 2 of 4 experts in 2 of 1 groups"),
            ({"topk_group": 0}, "cannot choose 2 of 4 experts in 0 of 1 groups"),
            ({"k": 0}, "cannot choose 0 of 4 experts"),
            ({"k": -1}, "cannot choose -1 of 4 experts"),
            ({"scoring": "tanh"}, "scoring is 'tanh', expected one of sigmoid, sqrtsoftplus, softmax"),
        ],
    ),
    (
        lambda **given: kernels.route(**given)[1],
        {"x": r(M, H), "gate": r(E, H), "bias": None, "k": K, "ids": drawn(M, K)},
        [
            ({"ids": drawn(M, K + 1)}, "ids has shape [2, 3], expected [2, 2]"),
            ({"ids": drawn(M + 1, K)}, "ids has shape [3, 2], expected [2, 2]"),
            ({"ids": drawn(M, K) + E}, "ids holds"),
            ({"ids": drawn(M, K) - E}, "ids holds"),
            ({"ids": drawn(M, K).float()}, "ids has dtype float32, expected int64"),
        ],
    ),
    (
        kernels.grouped_experts,
        {"x": r(M, H), "weights": r(M, K), "ids": drawn(M, K), "up": r(E, 2 * F, H), "down": r(E, H, F)},
        [
            ({"ids": drawn(M + 1, K)}, "ids has shape [3, 2], expected [2, 2]"),
            ({"ids": drawn(M)}, "ids has shape [2], expected [M, k]"),
            ({"weights": r(M, K + 1)}, "weights has shape [2, 3], expected [2, 2]"),
            ({"up": r(E, 2 * F, H + 1)}, "up has shape [4, 12, 9], expected [4, 12, 8]"),
            ({"up": r(E, 2 * F + 1, H)}, "up has shape [4, 13, 8], expected [4, 12, 8]"),
            ({"down": r(E - 1, H, F)}, "down has shape [3, 8, 6], expected [4, 8, 6]"),
            ({"down": r(E, H + 1, F)}, "down has shape [4, 9, 6], expected [4, 8, 6]"),
            ({"down": r(E, H, 2 * F)}, "down has shape [4, 8, 12], expected [4, 8, 6]"),
            ({"ids": drawn(M, K).float()}, "ids has dtype float32, expected int64"),
            ({"ids": drawn(M, K) > 1}, "ids has dtype bool, expected int64"),
            ({"ids": torch.tensor([[0, 1], [3, 4]])}, "ids holds 4, expected numbers from 0 to 3"),
            ({"ids": torch.tensor([[0, 1], [3, 3_000_000_000]])}, "ids holds 3000000000, expected numbers from 0 to 3"),
            ({"ids": torch.tensor([[0, -1], [3, 3]])}, "ids holds -1, expected numbers from 0 to 3"),
        ],
    ),
    (
        kernels.latent_moe,
        {
            "x": r(M, H),
            "fc1": r(L, H),
            "fc2": r(H, L),
            "up": r(E, F, L),
            "down": r(E, L, F),
            "idx": drawn(M, K),
            "w": r(M, K),
        },
        [
            ({"x": r(H)}, "x has shape [8], expected [M, H]"),
            ({"fc1": r(L, H + 1)}, "fc1 has shape [5, 9], expected [5, 8]"),
            ({"fc2": r(H, L + 1)}, "fc2 has shape [8, 6], expected [8, 5]"),
            ({"fc1": None, "fc2": None}, "up has shape [4, 6, 5], expected [4, 6, 8]"),
            ({"down": r(E, L, 2 * F)}, "down has shape [4, 5, 12], expected [4, 5, 6]"),
            ({"down": r(E - 2, L, F)}, "down has shape [2, 5, 6], expected [4, 5, 6]"),
            ({"idx": drawn(M + 1, K)}, "idx has shape [3, 2], expected [2, 2]"),
            ({"w": r(M, K + 1)}, "w has shape [2, 3], expected [2, 2]"),
            ({"idx": drawn(M, K) + E}, "idx holds"),
            ({"idx": drawn(M, K) - E}, "idx holds"),
            ({"biases": (r(1), None)}, "bias has shape [1], expected [5]"),
        ],
    ),
    (
        kernels.squared_mlp,
        {"x": r(M, H), "up": r(F, H), "down": r(H, F)},
        [
            ({"up": r(F, H + 1)}, "up has shape [6, 9], expected [6, 8]"),
            ({"down": r(H - 1, F)}, "down has shape [7, 6], expected [8, 6]"),
            ({"down": r(H, F - 1)}, "down has shape [8, 5], expected [8, 6]"),
        ],
    ),
    (
        lambda **flow: kernels.ssd_scan(**flow)[0],
        {
            "x": r(T, HEADS, P),
            "dt": torch.rand(T, HEADS),
            "A": -torch.rand(HEADS),
            "B": r(T, G, N),
            "C": r(T, G, N),
            "D": r(HEADS),
            "state": r(HEADS, P, N),
        },
        [
            ({"x": r(T, HEADS)}, "x has shape [5, 4], expected [T, h, p]"),
            ({"dt": torch.rand(2, HEADS)}, "dt has shape [2, 4], expected [5, 4]"),
            ({"A": -torch.rand(1)}, "A has shape [1], expected [4]"),
            ({"B": r(2, G, N)}, "B has shape [2, 2, 16], expected [5, 2, 16]"),
            ({"C": r(T, 1, N)}, "C has shape [5, 1, 16], expected [5, 2, 16]"),
            ({"D": r(1)}, "D has shape [1], expected [4]"),
            ({"state": r(2, P, N)}, "state has shape [2, 8, 16], expected [4, 8, 16]"),
            ({"state": r(HEADS, P, 4)}, "state has shape [4, 8, 4], expected [4, 8, 16]"),
            ({"B": r(T, 0, N), "C": r(T, 0, N)}, "4 heads are not a multiple of 0 groups"),
            ({"chunk": -1}, "chunk is -1, expected at least 1"),
            ({"chunk": 0}, "chunk is 0, expected at least 1"),
            (
                {"pending": (r(2, HEADS, P), torch.rand(1, HEADS), r(2, G, N))},
                "dt of pending tokens has shape [1, 4]",
            ),
            (
                {"pending": (r(2, HEADS, P), torch.rand(2, HEADS), r(2, 1, N))},
                "B of pending tokens has shape [2, 1, 16]",
            ),
        ],
    ),
    (
        lambda state, **flow: kernels.advance_state_(state.clone(), **flow),
        {
            "state": r(HEADS, P, N),
            "x": r(T, HEADS, P),
            "dt": torch.rand(T, HEADS),
            "A": -torch.rand(HEADS),
            "B": r(T, G, N),
        },
        [
            ({"state": r(HEADS, P + 1, N)}, "state has shape [4, 9, 16], expected [4, 8, 16]"),
            ({"A": -torch.rand(2)}, "A has shape [2], expected [4]"),
            ({"dt": torch.rand(T + 1, HEADS)}, "dt has shape [6, 4], expected [5, 4]"),
        ],
    ),
    (
        kernels.causal_conv,
        {"x": r(7, 6), "weight": r(6, 1, 4), "bias": r(6)},
        [
            ({"x": r(7)}, "x has shape [7], expected [K - 1 + T, C]"),
            ({"x": r(2, 6)}, "x has shape [2, 6], expected [3, 6]"),
            ({"weight": r(1, 1, 4)}, "weight has shape [1, 1, 4], expected [6, 1, 4]"),
            ({"weight": r(6, 4)}, "weight has shape [6, 4], expected [C, 1, K]"),
            ({"bias": r(5)}, "bias has shape [5], expected [6]"),
        ],
    ),
    (
        kernels.gated_group_norm,
        {"y": r(3, 12), "gate": r(3, 12), "weight": r(12), "groups": 3},
        [
            ({"gate": r(1, 12)}, "gate has shape [1, 12], expected [3, 12]"),
            ({"weight": r(4)}, "weight has shape [4], expected [12]"),
            ({"groups": 5}, "12 channels are not a multiple of 5 groups"),
            ({"groups": 0}, "12 channels are not a multiple of 0 groups"),
        ],
    ),
    (
        kernels.linear,
        {"x": r(2, 3, 8), "weight": r(5, 8), "bias": r(5)},
        [
            ({"weight": r(5, 6)}, "weight has shape [5, 6], expected [5, 8]"),
            ({"weight": r(2, 5, 8)}, "weight has shape [2, 5, 8], expected [out, in]"),
            ({"weight": r(8)}, "weight has shape [8], expected [out, in]"),
            ({"bias": r(4)}, "bias has shape [4], expected [5]"),
            ({"bias": r(1)}, "bias has shape [1], expected [5]"),
        ],
    ),
    (
        kernels.linear,
        {"x": r(2, 32), "weight": packed(40, 32), "bias": r(40)},
        [
            ({"x": r(2, 64)}, "weight has shape [40, 32], expected [40, 64]"),
            ({"x": r(20, 64)}, "weight has shape [40, 32], expected [40, 64]"),
            ({"bias": r(41)}, "bias has shape [41], expected [40]"),
            ({"bias": r(41), "x": r(20, 32)}, "bias has shape [41], expected [40]"),
        ],
    ),
    (
        lambda **given: kernels.linear_pair(**given)[0],
        {"x": r(2, 8), "weight": r(5, 8), "other": r(5, 8), "bias": r(5), "other_bias": r(5)},
        [
            ({"weight": r(5, 7)}, "weight has shape [5, 7], expected [5, 8]"),
            ({"other": r(5, 7)}, "other has shape [5, 7], expected [5, 8]"),
            ({"other_bias": r(4)}, "other_bias has shape [4], expected [5]"),
        ],
    ),
    (
        kernels.gated,
        {"x": r(2, 8), "gate": r(5, 8), "up": r(5, 8), "activation": "silu", "gate_bias": r(5)},
        [
            ({"gate": r(5, 9)}, "gate has shape [5, 9], expected [5, 8]"),
            ({"up": r(1, 8)}, "up has shape [1, 8], expected [5, 8]"),
            ({"up_bias": r(6)}, "up_bias has shape [6], expected [5]"),
            ({"limit": 0.0}, "limit is 0.0, expected a positive number"),
        ],
    ),
    (
        kernels.gated_mlp,
        {"x": r(2, 8), "gate": r(5, 8), "up": r(5, 8), "down": r(8, 5), "activation": "silu"},
        [
            ({"gate": r(5, 9)}, "gate has shape [5, 9], expected [5, 8]"),
            ({"up": r(1, 8)}, "up has shape [1, 8], expected [5, 8]"),
            ({"down": r(8, 6)}, "down has shape [8, 6], expected [8, 5]"),
            ({"biases": (r(4), None, None)}, "gate_bias has shape [4], expected [5]"),
        ],
    ),
    (
        kernels.grouped_linear,
        {"x": r(2, 3, 8), "weight": r(3, 5, 8)},
        [
            ({"x": r(3, 8)}, "x has shape [3, 8], expected [tokens, G, in]"),
            ({"x": r(2, 4, 8)}, "weight has shape [3, 5, 8], expected [4, 5, 8]"),
            ({"weight": r(3, 5, 7)}, "weight has shape [3, 5, 7], expected [3, 5, 8]"),
            ({"weight": r(15, 8)}, "weight has shape [15, 8], expected [G, out, in]"),
        ],
    ),
    (
        kernels.rms_norm,
        {"x": r(3, 8), "weight": r(8)},
        [
            ({"weight": r(7)}, "weight has shape [7], expected [8]"),
            ({"weight": r(1)}, "weight has shape [1], expected [8]"),
            ({"weight": r(3, 8)}, "weight has shape [3, 8], expected [8]"),
        ],
    ),
    (
        kernels.residual,
        {"x": r(3, 8), "y": r(3, 8), "norm": r(8), "scale": r(1)},
        [
            ({"y": r(1, 8)}, "y has shape [1, 8], expected [3, 8]"),
            ({"norm": r(9)}, "norm has shape [9], expected [8]"),
            ({"scale": r(8)}, "scale has shape [8], expected [1]"),
        ],
    ),
    (
        lambda **given: kernels.residual_norm(**given)[0],
        {"x": r(3, 8), "y": r(3, 8), "weight": r(8), "norm": r(8)},
        [
            ({"y": r(2, 8)}, "y has shape [2, 8], expected [3, 8]"),
            ({"weight": r(6)}, "weight has shape [6], expected [8]"),
        ],
    ),
    (
        kernels.rotate,
        {"x": r(3, 2, 8), "cos": r(3, 1, 4), "sin": r(3, 1, 4)},
        [
            ({"sin": r(3, 1, 2)}, "sin has shape [3, 1, 2], expected [3, 1, 4]"),
            ({"sin": r(2, 1, 4)}, "sin has shape [2, 1, 4], expected [3, 1, 4]"),
            (
                {"cos": r(3, 1, 5), "sin": r(3, 1, 5)},
                "cos has shape [3, 1, 5], expected [3, 1, at most 4]",
            ),
            ({"layout": "thirds"}, "layout is 'thirds', expected one of halves, pairs"),
        ],
    ),
    (
        kernels.norm_rotate,
        {"x": r(3, 2, 8), "weight": r(8), "cos": r(3, 1, 4), "sin": r(3, 1, 4)},
        [
            ({"weight": r(4)}, "weight has shape [4], expected [8]"),
            ({"sin": r(1, 1, 4)}, "sin has shape [1, 1, 4], expected [3, 1, 4]"),
        ],
    ),
    (
        kernels.attention,
        {"q": r(2, 4, D), "k": r(KV, S, D), "v": r(KV, S, D)},
        [
            ({"k": r(3, S, D), "v": r(3, S, D)}, "4 heads are not a multiple of 3 kv heads"),
            ({"k": r(KV, S, 8)}, "k has shape [2, 7, 8], expected [2, 7, 16]"),
            ({"k": r(1, KV, S, D)}, "k has shape [1, 2, 7, 16], expected [kv_heads, S, d]"),
            ({"v": r(KV, S - 1, D)}, "v has shape [2, 6, 16], expected [2, 7, 16]"),
            ({"v": r(1, S, D)}, "v has shape [1, 7, 16], expected [2, 7, 16]"),
            ({"k": r(KV, 1, D), "v": r(KV, 1, D)}, "2 causal queries over 1 keys: one would see none"),
            ({"k": r(KV, 0, D), "v": r(KV, 0, D), "causal": False}, "2 queries over 0 keys: one would see none"),
            ({"window": 0}, "window is 0, expected at least 1"),
        ],
    ),
    (
        over_values,
        {"q": r(2, 4, D), "v": r(KV, S, D), "where": 3},
        [
            ({"v": r(3, S, D)}, "4 heads are not a multiple of 3 kv heads"),
            ({"v": r(KV, S, 8)}, "v has shape [2, 7, 8], expected [2, 7, 16]"),
            ({"q": r(2, 4, 8)}, "q has shape [2, 4, 8], expected [2, 4, 16]"),
            ({"where": -1}, "where is -1, expected a number from 0 to"),
            ({"where": torch.arange(S)}, "where has shape [7], expected [2, 7]"),
            ({"where": torch.arange(S).expand(KV, S) - 1}, "where holds -1, expected numbers from 0 to"),
            ({"where": torch.rand(KV, S)}, "where has dtype float32, expected int64"),
            ({"v": r(KV, 1, D)}, "2 causal queries over 1 keys: one would see none"),
        ],
    ),
    (
        coded,
        {"q": r(2, 4, D), "k": codes(70, "keys"), "v": codes(70, "values"), "n": 70, "bias": r(2, 4, 70)},
        [
            ({"n": 129, "bias": None}, "codes of keys has shape [2, 2, 512], expected [2, 3, 512]"),
            ({"n": 0, "bias": None}, "n is 0, expected at least 1"),
            ({"v": codes(64, "values")}, "codes of values has shape [2, 1, 512], expected [2, 2, 512]"),
            ({"v": codes(70, "values", heads=1)}, "codes of values has shape [1, 2, 512], expected [2, 2, 512]"),
            ({"k": codes(70, "keys", heads=3)}, "4 heads are not a multiple of 3 kv heads"),
            ({"q": r(2, 4, 8)}, "q has shape [2, 4, 8], expected [2, 4, 16]"),
            ({"bias": r(2, 4, 69)}, "bias has shape [2, 4, 69], expected [2, 4, 70]"),
        ],
    ),
]


OPERATIONS = pytest.mark.parametrize(("operation", "fitting"), [case[:2] for case in CASES])


class Dispatched(Exception):
    """A set of kernels was chosen."""


@pytest.fixture
def nothing_dispatched(monkeypatch):
    """Whoever asks which kernels run, or for one of them, gets `Dispatched`."""

    class Native:
        def __getattr__(self, name: str) -> Any:
            raise Dispatched(name)

    def ask(*_: Any) -> Any:
        raise Dispatched

    monkeypatch.setattr(dispatch, "takes", ask)
    monkeypatch.setattr(dispatch, "on_gpu", ask)
    monkeypatch.setattr(dispatch, "native", Native())


@pytest.mark.parametrize(
    ("operation", "fitting", "bad", "message"),
    [(operation, fitting, bad, message) for operation, fitting, cases in CASES for bad, message in cases],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.usefixtures("nothing_dispatched")
def test_what_does_not_fit_is_refused(operation, fitting, bad, message):
    """So no set of kernels gets to see it, whichever runs."""
    with pytest.raises(ValueError, match=re.escape(message)):
        operation(**(fitting | bad))


@OPERATIONS
def test_what_fits_is_computed_by_the_set_that_is_asked_for(operation, fitting, nothing_dispatched):
    with pytest.raises(Dispatched):
        operation(**fitting)


@OPERATIONS
@pytest.mark.usefixtures("each_kernel_set")
def test_what_fits_is_taken(operation, fitting):
    operation(**fitting)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@OPERATIONS
@pytest.mark.usefixtures("native_kernel_set")
def test_other_types_give_what_the_reference_gives(operation, fitting, dtype):
    """Whatever of the arguments is of a type that native kernels do not take."""
    for name, value in fitting.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            given = fitting | {name: value.to(dtype)}
            found = outcome(operation, given)
            with using("reference"):
                expected = outcome(operation, given)
            if isinstance(expected, torch.Tensor):
                tolerance = 1e-4 if dtype == torch.float64 else 3e-2
                torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
            else:
                assert found == expected


def outcome(operation: Any, given: dict[str, Any]) -> Any:
    """What comes out, or which error."""
    try:
        return operation(**given)
    except RuntimeError as error:
        return type(error)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
@pytest.mark.usefixtures("each_kernel_set")
def test_ids_of_any_integer_type(dtype):
    x, w, ids = r(M, H), r(M, K), drawn(M, K)
    up, down = r(E, F, H), r(E, H, F)
    expected = kernels.grouped_experts(x, w, ids, up, down, kernels.relu2)
    assert torch.equal(kernels.grouped_experts(x, w, ids.to(dtype), up, down, kernels.relu2), expected)
    assert torch.equal(kernels.latent_moe(x, None, None, up, down, ids.to(dtype), w), expected)
    q, v, where = r(2, 4, D), r(KV, S, D), torch.arange(3, 3 + S).expand(KV, S)
    assert torch.equal(over_values(q, v, where.to(dtype)), over_values(q, v, 3))


@pytest.mark.usefixtures("each_kernel_set")
def test_positions_in_any_order():
    q, v, where = r(1, 4, D), r(KV, S, D), torch.randperm(90)[: KV * S].view(KV, S)
    order = where.argsort(1)
    sorted_v = v.gather(1, order[..., None].expand_as(v))
    expected = over_values(q, sorted_v, where.gather(1, order), causal=False)
    torch.testing.assert_close(over_values(q, v, where, causal=False), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("each_kernel_set")
def test_no_choice_is_nothing_and_any_activation_is_taken():
    x, up, down = r(M, H), r(E, F, H), r(E, H, F)
    assert not kernels.grouped_experts(x, r(M, 0), drawn(M, 0), up, down, kernels.relu2).any()
    w, ids = r(M, K), drawn(M, K)
    found = kernels.grouped_experts(x, w, ids, up, down, torch.tanh)
    for m in range(M):
        expected = sum(w[m, j] * (down[e] @ torch.tanh(up[e] @ x[m])) for j, e in enumerate(ids[m]))
        torch.testing.assert_close(found[m], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("each_kernel_set")
def test_a_state_of_another_type_or_layout():
    flow = next(fitting for _, fitting, _ in CASES if "dt" in fitting and "C" in fitting)
    y, after = kernels.ssd_scan(**flow)
    for state in (flow["state"].double(), flow["state"].transpose(1, 2).contiguous().transpose(1, 2)):
        for final_state in (True, False):
            found, last = kernels.ssd_scan(**flow | {"state": state}, final_state=final_state)
            torch.testing.assert_close(found, y, rtol=1e-4, atol=1e-4)
            if final_state:
                torch.testing.assert_close(last, after, rtol=1e-4, atol=1e-4)
