"""Settings of wrong types and shapes: the documented errors, before a memory is made."""

import pytest
import torch

import sparing
from sparing.errors import CheckpointError
from sparing.memory.digest import weights_digest
from sparing.memory.triattention.statistics import Statistics
from sparing.weights.weight import empty_packed
from tests.tiny import model, random_ids

EYES = [torch.eye(8)] * 2


@pytest.mark.parametrize(
    ("kv", "options"),
    [
        *[(kv, {}) for kv in (None, 4, 2.5, b"dense", ["dense"], "turboquant:0", "turboquant:9", "window:0")],
        *[("turboquant:4", {"skip_layers": value}) for value in (None, 1, "01", [0.0],
          [True], ["0"], [None], [2], [-3])],
        *[("turboquant:4", {name: value}) for name in ("window", "sink_tokens", "seed", "block") for value in
          (-1, 2.5, "7", None, True, [1], torch.tensor(3), float("nan"))],
        *[("turboquant:4", {"block": value}) for value in (0, 8, 17)],
        *[("turboquant:4", {name: value}) for name in ("scale", "variant", "prefill", "scale_dtype") for value in
          ("other", None, 1, [], torch.float16, torch.ones(2))],
        *[("turboquant:4", {"rotation": value}) for value in (
            "other", None, 3, torch.eye(8), (EYES,), (EYES, EYES, EYES), (EYES, EYES[:1]), ([torch.eye(7)] * 2, EYES),
            ([torch.ones(8, 8)] * 2, EYES), ([torch.eye(8) * torch.nan] * 2, EYES), ([torch.eye(8).bool()] * 2, EYES),
            ([torch.eye(8) + 0j] * 2, EYES), (EYES, 3), (EYES, ["a", "b"]), (EYES, None), ({}, EYES),
            ([torch.eye(8)[None]] * 2, EYES),
        )],
        *[("triattention:9", {"statistics": value}) for value in (None, 3, {}, [], torch.ones(2), b"x")],
        *[("triattention:9", {name: value}) for name in ("interval", "max_offset", "protect_recent", "protect_sinks")
          for value in (-1, 2.5, "7", None, True, [1], torch.tensor(3))],
        *[("triattention:9", {"interval": 0}), ("triattention:9", {"max_offset": 0})],
        *[("triattention:9", {name: value}) for name in ("mode", "trigger", "aggregation", "group") for value in
          ("other", 1, [], torch.ones(2))],
        *[("triattention:9", {name: value}) for name in ("protect_prompt", "count_prompt", "trig", "norm_weighting",
          "allow_nope") for value in ("no", 0, None)],
        *[("dense", {name: value}) for name in ("ssm_dtype", "ssm_rounding") for value in ("other", 3, torch.half, [])],
        *[("dense", {"ssm_seed": value}) for value in (-1, "7", 2.5, None)],
    ],
)  # fmt: skip
def test_refused(kv, options):
    with pytest.raises(ValueError):
        model("dense").memory(kv, **options)


def test_explicit_rotations():
    assert model("dense").memory("turboquant:4", rotation=(EYES, torch.eye(8).expand(2, 8, 8))).length == 0


@pytest.mark.parametrize("n", [None, 1.0, "1", True, torch.tensor(1), -1, 4])
def test_a_commit_of_what_is_no_number(n):
    from sparing.models.batch import Row

    memory = model("dense").memory()
    model("dense").run([Row(random_ids(3), memory)])
    with pytest.raises(ValueError, match="cannot commit"):
        memory.commit(n)
    memory.commit(3)
    assert memory.length == 3


@pytest.mark.parametrize(
    "given", [None, 3, "", [], [[]], {"a": 1}, torch.zeros(0).long(), [1.5], object()], ids=lambda v: str(v)[:12]
)
def test_calibrating_on_nothing(given):
    with pytest.raises(ValueError):
        sparing.calibrate(model("dense"), given)


@pytest.mark.parametrize(
    "options", [{"length": "9"}, {"length": 2.5}, {"length": 0}, {"tokens": 2.5}, {"tokens": True}]
)
def test_calibrating_wrong_settings(options):
    with pytest.raises(ValueError):
        sparing.calibrate(model("dense"), random_ids(9), **options)


def test_calibrating_a_model_of_nan():
    import copy

    broken = copy.deepcopy(model("dense"))
    next(p for n, p in broken.named_parameters() if "q_proj" in n)[3] = torch.nan
    with pytest.raises(ValueError, match=r"not all finite|rotates"):
        sparing.calibrate(broken, random_ids(9))


@pytest.mark.parametrize("format", ["int8", "int4", "nvfp4", "mxfp4", "fp8"])
def test_the_digest_of_packed_queries(format):
    def parts(seed: int, scale: float = 1.0):
        w = torch.randn(64, 64, generator=torch.Generator().manual_seed(seed)) * scale
        weight = empty_packed(format, w.shape)
        weight.fill(lambda: iter([w]))
        return list(weight.named_buffers())

    digests = [weights_digest(p) for p in (parts(0), parts(1), parts(0, 2.0), [])]
    assert len(set(digests)) == 4
    assert weights_digest(parts(0)) == digests[0]


@pytest.mark.parametrize(
    "broken", ["no layers", "twice", "heads", "nan", "norm", "types", "tokens", "rotation", "huge"]
)
def test_statistics_that_are_damaged(broken, tmp_path):
    from sparing.checkpoint.safetensors import SafetensorsFile
    from sparing.checkpoint.write import save_safetensors

    path = tmp_path / "queries"
    sparing.calibrate(model("dense"), random_ids(30)).save(path)
    file = SafetensorsFile(path)
    found = {name: file.read(name).clone() for name in file.names()}
    if broken == "no layers":
        del found["layer_index"]
    elif broken == "twice":
        found["layer_index"] = torch.tensor([1, 1])
    elif broken == "heads":
        found["q_mean_imag"] = found["q_mean_imag"][:, :2].contiguous()
    elif broken == "nan":
        found["q_mean_real"][0, 1] = torch.nan
    elif broken == "norm":
        found["q_abs_mean"][0, 1] = -1
    elif broken == "types":
        found["q_abs_mean"] = found["q_abs_mean"].long()
    elif broken == "tokens":
        found["token_count"] = torch.tensor([-4])
    elif broken == "rotation":
        found["attention_scaling"] = torch.tensor([torch.inf])
    else:
        found["layer_index"] = torch.tensor([0, 10**12])
    save_safetensors(path, found, metadata=file.metadata)
    with pytest.raises(CheckpointError, match="damaged query statistics"):
        Statistics.load(path)


@pytest.mark.parametrize("name", ["layer00_head99999999", "layer00_head3000", "layer-1_head00", "layer99999_head00"])
def test_a_head_that_would_take_all_memory(name, tmp_path):
    part = {n: torch.ones(4) for n in ("q_mean_real", "q_mean_imag", "q_abs_mean")}
    torch.save({"metadata": {}, "stats": {"layer00_head00": part, name: part}}, tmp_path / "s.pt")
    with pytest.raises(CheckpointError, match="not query statistics"):
        Statistics.load(tmp_path / "s.pt", allow_pickle=True)


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_a_state_beyond_float16_is_named(rounding):
    from sparing.config.memory import RecurrentSpec
    from sparing.kernels import MambaWeights
    from sparing.memory.group import Share
    from sparing.memory.recurrent import RecurrentGroup

    spec = RecurrentSpec(2, 4, 8, 1, 4, state_dtype="float16", state_rounding=rounding)
    group = RecurrentGroup(spec, [5], torch.float32, torch.device("cpu"))
    weights = MambaWeights(torch.ones(spec.conv_size, 1, 4), None, -torch.rand(2), torch.rand(2))
    group.stage(1, 0, 1)
    rows = group.together([group], [Share(1, 1, True, 1)])
    rows.scan(5, torch.full((1, spec.conv_size), 300.0), torch.ones(1, 2), weights)
    with pytest.raises(
        ValueError, match=r"state of layer 5 reached 90000, float16 holds numbers up to 65504: use ssm_dt"
    ):
        group.commit(1, 1, 0)
