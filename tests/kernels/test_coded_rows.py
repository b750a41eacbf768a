"""Attention over the codes of many rows in one call: that of each row alone, span by span, added up."""

import pytest
import torch

from sparing.kernels.code_layout import BLOCK, lay_out
from sparing.kernels.coded_rows import CodedRow, CodedSpan, CodesTable, attend_coded_rows
from sparing.kernels.codes import Codes, attention_over_codes
from sparing.kernels.partial import add_up, partial_attention
from sparing.kernels.rows import AttendedRow, RowTable, Span, attend_rows
from sparing.memory.turboquant.codebook import lloyd_max_codebook
from tests.kernel_sets import using
from tests.kernels.row_tables import Held, spans_of

LAYERS, KV_HEADS, HEADS = 2, 2, 6
DIMS = (48, 32)
SPANS = [[], [(0, 1)], [(1, 70), (0, 64)], [(0, 64), (2, 200), (0, 3)]]  # of each row: (blocks before it, tokens)
QUERIES = [2, 1, 3, 1]


def held(role: str, dims: int, bits: int, before: int, tokens: int, scale_dtype: torch.dtype) -> list[Span]:
    """Spans of codes and of scales, `before` blocks into their extents."""
    blocks = -(-tokens // BLOCK)
    codes = torch.randint(0, 1 << bits, (LAYERS * KV_HEADS, blocks * BLOCK, dims)).to(torch.uint8)
    laid_out = lay_out(codes, bits, role).unflatten(0, (LAYERS, 1, KV_HEADS))
    scales = (0.2 + torch.rand(LAYERS, 1, KV_HEADS, blocks, BLOCK)).to(scale_dtype)
    spans = []
    for entries in (laid_out, scales):
        room = torch.zeros(*entries.shape[:3], before + blocks + 1, entries.shape[-1], dtype=entries.dtype)
        room[..., before : before + blocks, :] = entries
        spans.append(Span(Held(room), before, before + blocks))
    return spans


def drawn(bits: tuple[int, int], scale_dtype: torch.dtype) -> tuple[CodesTable, tuple[torch.Tensor, torch.Tensor]]:
    rows = []
    for queries, spans in zip(QUERIES, SPANS, strict=True):
        places = [
            (
                n,
                *held("keys", DIMS[0], bits[0], at, n, scale_dtype),
                *held("values", DIMS[1], bits[1], at, n, scale_dtype),
            )
            for at, n in spans
        ]
        rows.append(CodedRow(queries, [CodedSpan(*place) for place in places]))
    centroids = [lloyd_max_codebook(d, b)[0].float() * d**0.5 for d, b in zip(DIMS, bits, strict=True)]
    return CodesTable(rows, DIMS, bits), (centroids[0], centroids[1])


@pytest.mark.parametrize("bits", [(4, 4), (2, 3), (8, 4), (1, 5)])
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.float32])
def test_each_row_is_answered_as_alone(each_kernel_set, bits, scale_dtype):
    table, centroids = drawn(bits, scale_dtype)
    q, layer, at = torch.randn(sum(QUERIES), HEADS, DIMS[0]), 1, 0
    out, lse = attend_coded_rows(q, table, layer, centroids, scale=0.2)
    for row in table.rows:
        own, mine = q[at : at + row.queries], slice(at, at + row.queries)
        at += row.queries
        if not row.spans:
            assert not out[mine].any() and (lse[mine] == -torch.inf).all()
            continue
        partials = []
        for span in row.spans:
            keys = Codes(span.keys.view(layer, 0), span.key_scales.view(layer, 0), centroids[0], DIMS[0])
            values = Codes(span.values.view(layer, 0), span.value_scales.view(layer, 0), centroids[1], DIMS[1])
            (found,), mass = attention_over_codes([own], [keys], [values], span.tokens, scale=0.2)
            partials.append((found, mass))
        expected, expected_lse = add_up(partials)
        torch.testing.assert_close(out[mine], expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse[mine], expected_lse, rtol=1e-5, atol=1e-5)
        alone = attend_coded_rows(own, CodesTable([row], DIMS, bits), layer, centroids, scale=0.2)
        assert torch.equal(alone[0], out[mine]) and torch.equal(alone[1], lse[mine])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_other_entries_gave_is_added_up(each_kernel_set, dtype):
    """Attention over two sets of entries, of which one was met before, is attention over both."""
    size, counts, queries = 24, [1, 70, 300], [1, 2, 1]
    entries = [torch.randn(LAYERS, 2, KV_HEADS, n, size).to(dtype) for n in counts]
    before = [torch.randn(2, KV_HEADS, 50, size).to(dtype) for _ in counts]
    q = torch.randn(sum(queries), HEADS, size).to(dtype)
    parts, outs, masses = q.split(queries), [], []
    for part, (k, v) in zip(parts, before, strict=True):
        out, lse = partial_attention(part.float(), k, v, scale=0.3, causal=False)
        outs.append(out)
        masses.append(lse)
    outs.append(torch.zeros(1, HEADS, size))  # a row that met nothing before
    masses.append(torch.full((1, HEADS), -torch.inf))
    entries.append(torch.randn(LAYERS, 2, KV_HEADS, 5, size).to(dtype))
    q = torch.cat([q, torch.randn(1, HEADS, size).to(dtype)])
    rows = [AttendedRow(spans_of(x, []), n, x.shape[3]) for x, n in zip(entries, [*queries, 1], strict=True)]
    found = attend_rows(q, RowTable(rows), 1, scale=0.3, more=(torch.cat(outs), torch.cat(masses)))
    at = 0
    for i, n in enumerate([*queries, 1]):
        k, v = entries[i][1].double()
        own = q[at : at + n].double()
        mine = partial_attention(own, k, v, scale=0.3, causal=True)
        pair = [mine]
        if i < len(before):
            pair.append(partial_attention(own, *before[i].double(), scale=0.3, causal=False))
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(found[at : at + n].double(), add_up(pair)[0], rtol=tolerance, atol=tolerance)
        at += n


def test_the_native_kernel_is_the_reference(native_kernel_set):
    table, centroids = drawn((3, 4), torch.float16)
    q = torch.randn(sum(QUERIES), HEADS, DIMS[0])
    found = attend_coded_rows(q, table, 0, centroids, scale=0.2)
    with using("reference"):
        expected = attend_coded_rows(q, table, 0, centroids, scale=0.2)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
