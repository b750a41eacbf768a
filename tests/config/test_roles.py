"""The role of every tensor: one for each, and what follows from them for a model as a whole."""

import re

import pytest
import torch

from sparing.config import parse_config, planned_config
from sparing.config.formats import FORMATS, format_loaded, stays_packed
from sparing.config.released import RELEASED
from sparing.config.roles import COMPRESSOR, KINDS, POSITION_BIAS, QK_NORM, QUERY, ROLES
from sparing.models.loading import build
from tests.tiny import CONFIGS, DRAFTER

SMALL = CONFIGS | {"drafter": DRAFTER | {"use_ordered_embeddings": True, "num_centroids": 61}}


def tensors(raw):
    """Of a model and of the head that drafts for it."""
    config = planned_config(raw)
    return config.tensors() | (config.mtp.tensors() if getattr(config, "mtp_layers", ()) else {})


@pytest.mark.parametrize("raw", [pytest.param(raw, id=name) for name, raw in (RELEASED | SMALL).items()])
def test_every_tensor_has_a_role_that_fits_it(raw):
    found = tensors(raw)
    assert {role for _, role in found.values()} <= set(ROLES)
    assert sum(role.is_head for _, role in found.values()) == 1
    for name, (shape, role) in found.items():
        is_table = role.is_looked_up or role.kind == "embedding" or role is POSITION_BIAS
        assert (len(shape) > 1) == (role.is_packable or role.kind == "matrices" or is_table), name
        assert (len(shape) == 3) == (role.kind == "experts" or role.name == "convolution"), name
        assert role.is_tied == (role.is_head and not name.startswith("lm_head.")), name


@pytest.mark.parametrize("raw", [pytest.param(raw, id=name) for name, raw in (RELEASED | SMALL).items()])
def test_roles_are_those_that_the_names_of_released_tensors_suggest(raw):
    """What was once decided by these words in a name, for every tensor that a family has today."""
    streams = r"\.(attn_hc|ffn_hc|hc_head)\."
    compressor = re.compile(r"\bcompressor\.(indexer\.)?(kv|gate)_proj\.weight$|\bweights_proj\.")
    dense = re.compile(
        rf"embed|^lm_head\.|\.router\.|\.gate\.(weight|tid2eid)$|\.conv1d\.|{streams}|position_bias|{compressor.pattern}"
    )
    kept = re.compile(rf"\.(A_log|D|dt_bias|e_score_correction_bias|sinks|position_bias)$|{streams}")
    constants = "layer_scalar", "e_score_correction_bias", "token_ordering", "tid2eid"
    for name, (shape, role) in tensors(raw).items():
        assert role.is_matrix == (len(shape) > 1 and not dense.search(name)), name
        assert role.is_float32 == bool(kept.search(name)), name
        assert (role.kind is None) == name.endswith(constants), name
        assert (role is COMPRESSOR) == bool(compressor.search(name)), name
        assert stays_packed(role, "int4", "float32") == (role.is_matrix or name == "lm_head.weight"), name
        assert (role.kind == "self_conditioning") == ("self_conditioning." in name), name
        assert (role.kind == "lookup") == ("embed_tokens_per_layer." in name), name
        assert (role is QUERY) == name.endswith("q_proj.weight"), name
        assert (role is QK_NORM) == name.endswith(("q_norm.weight", "k_norm.weight")), name
        fused = re.search(r"\.(q|k|v|gate|up)_proj\.weight$", name) and role is not COMPRESSOR
        assert role.is_fused == bool(fused), name
        residual = r"(?<!self_conditioning\.)\b(o_proj|o_b_proj|out_proj|down_proj|fc2_latent_proj)\.weight$"
        assert role.is_residual == bool(re.search(residual, name)), name


def test_roles_are_told_apart_and_counted_where_a_plan_counts():
    assert len({role.name for role in ROLES}) == len(ROLES)
    assert {role.kind for role in ROLES} == {*KINDS, None}
    for role in ROLES:
        assert not (role.is_float32 and role.is_packable)
        assert role.is_packable or all(format_loaded(role, (64, 64), format) is None for format in FORMATS)


@pytest.mark.parametrize("name", SMALL)
def test_models_hold_what_their_config_lists_and_cast_by_role(name):
    config = parse_config(SMALL[name])
    model = build(config)
    held = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert held == {name: shape for name, (shape, _) in config.tensors().items()}
    roles = model.roles()
    for name, tensor in model.bfloat16().state_dict().items():
        kept = torch.float32 if roles[name].is_float32 else torch.bfloat16
        assert tensor.dtype == (kept if tensor.is_floating_point() else torch.int64), name
