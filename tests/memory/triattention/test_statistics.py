"""Files of query statistics: ours, the authors', TRIA; and what is refused."""

import hashlib
import os
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import sparing
from sparing.checkpoint.safetensors import SafetensorsFile
from sparing.checkpoint.write import save_safetensors
from sparing.config import parse_config
from sparing.config.policy import parse_policy
from sparing.config.released import RELEASED
from sparing.errors import CheckpointError
from sparing.memory.triattention.layer_statistics import LayerStatistics
from sparing.memory.triattention.pruner import make_pruner
from sparing.memory.triattention.statistics import Statistics, scored_layers
from tests.tiny import model, random_ids

DATA = Path(os.environ.get("SPARING_DATA", Path(__file__).parents[3].parent / "shared"))
PUBLISHED = DATA / "data" / "triattention" / "qwen3_8b.pt"


@pytest.fixture(scope="module")
def found() -> Statistics:
    return sparing.calibrate(model("dense"), random_ids(60))


def same(left: Statistics, right: Statistics) -> bool:
    return left.digest == right.digest and (left.tokens, left.geometry, left.weights) == (
        right.tokens,
        right.geometry,
        right.weights,
    )


@pytest.mark.parametrize("name", ["dense", "shared", "hybrid", "denoiser"])
def test_a_file_holds_everything(name, tmp_path):
    found = sparing.calibrate(model(name), random_ids(60))
    found.save(tmp_path / "queries")
    loaded = Statistics.load(tmp_path / "queries")
    assert same(loaded, found) and loaded.source == found.source
    for i, layer in found.layers.items():
        assert torch.equal(loaded.layers[i].inv_freq, layer.inv_freq) and loaded.layers[i].scaling == layer.scaling
    assert model(name).memory("triattention:9", statistics=loaded, allow_nope=True) if name != "hybrid" else True


def test_layers_of_different_shapes_lie_in_different_tensors(found, tmp_path):
    other = LayerStatistics(torch.zeros(3, 2, dtype=torch.complex64), torch.ones(3, 2))
    scaled = replace(found.layers[0], scaling=1.5)
    mixed = replace(found, layers={**found.layers, 5: other, 7: scaled})
    mixed.save(tmp_path / "queries")
    loaded = Statistics.load(tmp_path / "queries")
    assert same(loaded, mixed) and loaded.layers[5].inv_freq is None and loaded.layers[7].scaling == 1.5
    names = SafetensorsFile(tmp_path / "queries").names()
    assert {"q_mean_real", "q_mean_imag", "q_abs_mean", "layer_index", "token_count", "inv_freq"} <= set(names)
    assert "q_mean_real.1" in names and "q_mean_real.2" in names


def test_size_of_the_tensors(found, tmp_path):
    """12 bytes a layer, head and band."""
    found.save(tmp_path / "queries")
    file = SafetensorsFile(tmp_path / "queries")
    assert sum(file.read(f"q_{part}").nbytes for part in ("mean_real", "mean_imag", "abs_mean")) == 12 * 2 * 4 * 4


@pytest.mark.parametrize(("kept", "digest"), [("stored", "32e3f10edeb5c10a"), ("nvfp4", "9565e297937634e3")])
def test_the_digest_of_query_weights_is_that_which_files_hold(kept, digest):
    loaded = sparing.load("tales", weights=kept)
    samples = b""
    for name, tensor in [*loaded.named_parameters(), *loaded.named_buffers()]:
        _, found, part = name.partition(".q_proj.weight")
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, len(flat) // 64)]
        sample = sample if part else sample.bfloat16()
        samples += part[1:].encode() + sample.contiguous().view(torch.uint8).numpy().tobytes() if found else b""
    assert hashlib.sha256(samples).hexdigest()[:16] == loaded.query_weights() == digest


def test_concentration():
    """R of the two strongest bands: the third, however concentrated, does not count."""
    center = torch.tensor([[3.0 + 4.0j, 0.0, 0.1]]).to(torch.complex64)
    one = Statistics({0: LayerStatistics(center, torch.tensor([[5.0, 4.0, 0.1]]))})
    assert one.concentration().tolist() == [[0.5]]


def official(found: Statistics, skip: tuple[int, int] | None = None, **metadata: object) -> dict:
    stats = {
        f"layer{i:02d}_head{h:02d}": {
            "q_mean_real": layer.center[h].real.clone(),
            "q_mean_imag": layer.center[h].imag.clone(),
            "q_abs_mean": layer.norm[h].clone(),
        }
        for i, layer in found.layers.items()
        for h in range(len(layer.norm))
        if (i, h) != skip
    }
    return {"metadata": {"rope_style": "half", "head_dim": 8, **metadata}, "stats": stats}


def test_the_authors_file(found, tmp_path):
    path = tmp_path / "aime24.pt"
    torch.save(official(found), path)
    with pytest.raises(CheckpointError, match=r"a pickled file; Statistics\.load\(path, allow_pickle=True\)"):
        Statistics.load(path)
    loaded = Statistics.load(path, allow_pickle=True)
    assert loaded.digest == found.digest and loaded.geometry is None and loaded.layers[0].inv_freq is None
    assert model("dense").memory("triattention:9", statistics=loaded)
    torch.save(official(found, skip=(1, 2)), path)
    loaded = Statistics.load(path, allow_pickle=True)
    assert loaded.layers[1].norm[2].tolist() == [0] * 4 and loaded.layers[1].norm[3].all()


@pytest.mark.skipif(not PUBLISHED.exists(), reason=f"the published statistics are not at {PUBLISHED}")
def test_the_published_statistics_of_qwen3_8b(tmp_path):
    """Their figures: R above 0.95 in 89.8 % of heads (two strongest bands), 98.8 % (the strongest); 0.64 on average."""
    published = Statistics.load(PUBLISHED, allow_pickle=True)
    assert sorted(published.layers) == list(range(36))
    norm = torch.stack([layer.norm for layer in published.layers.values()])  # [36, 32, 64]
    center = torch.stack([layer.center for layer in published.layers.values()])
    assert norm.shape == (36, 32, 64) and center.nbytes + norm.nbytes == 884_736
    assert (published.concentration() > 0.95).float().mean().item() == pytest.approx(0.898, abs=5e-4)
    r = center.abs() / norm
    strongest = r.gather(-1, norm.argmax(-1, keepdim=True))
    assert (strongest > 0.95).float().mean().item() == pytest.approx(0.988, abs=5e-4)
    assert r.mean().item() == pytest.approx(0.64, abs=5e-3)
    policy = parse_policy("triattention:2048", {"statistics": published, "mode": "per_head"})
    pruner = make_pruner(parse_config(RELEASED["qwen3-8b"]), policy, weights="", device=torch.device("cpu"))
    assert len(pruner.voters) == 36 and pruner.voters[0].inv_freq[1].item() == pytest.approx(1e6 ** (-2 / 128))
    config = parse_config(RELEASED["qwen3-8b"] | {"num_attention_heads": 16})
    with pytest.raises(ValueError, match="32 heads of 64 bands"):
        make_pruner(config, policy, weights="", device=torch.device("cpu"))
    published.save(tmp_path / "ours")
    assert Statistics.load(tmp_path / "ours").digest == published.digest


def test_a_bad_authors_file(found, tmp_path):
    path = tmp_path / "stats.pt"
    for content, message in (
        (official(found, rope_style="interleaved"), "rope_style is 'interleaved'"),
        ({"stats": {}}, "not query statistics"),
        ({"metadata": {}, "stats": {"layer1": {}}}, "not query statistics"),
    ):
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=message):
            Statistics.load(path, allow_pickle=True)
    path.write_bytes(b"PK\x03\x04 and then nothing")
    with pytest.raises(CheckpointError, match="not query statistics"):
        Statistics.load(path, allow_pickle=True)


def test_code_in_a_pickle_does_not_run(tmp_path):
    class Hostile:
        def __reduce__(self):
            return (open, (str(tmp_path / "was here"), "w"))

    torch.save({"metadata": {}, "stats": Hostile()}, tmp_path / "stats.pt")
    with pytest.raises(CheckpointError, match="not query statistics"):
        Statistics.load(tmp_path / "stats.pt", allow_pickle=True)
    assert not (tmp_path / "was here").exists()


def tria(found: Statistics, version: int = 1) -> bytes:
    layers, (heads, bands) = len(found.layers), found.layers[0].norm.shape
    header = struct.pack("<7I2f", 0x54524941, version, layers, heads, 2, 2 * bands, bands, 10000.0, 1.0).ljust(
        64, b"\0"
    )
    body = struct.pack(f"<{layers}f", *[1.0] * layers) if version == 2 else b""
    for _, layer in sorted(found.layers.items()):
        parts = torch.stack([layer.center.real, layer.center.imag, layer.norm, torch.full_like(layer.norm, 7.0)], 1)
        body += parts.numpy().tobytes()
    return header + body


@pytest.mark.parametrize("version", [1, 2])
def test_a_tria_file(found, tmp_path, version):
    path = tmp_path / "stats.tria"
    path.write_bytes(tria(found, version))
    loaded = Statistics.load(path)
    assert loaded.digest == found.digest and loaded.layers[0].inv_freq is None
    assert len(tria(found, 1)) == 64 + 16 * 2 * 4 * 4
    assert model("dense").memory("triattention:9", statistics=loaded)


def test_a_bad_tria_file(found, tmp_path):
    path, good = tmp_path / "stats.tria", tria(found)
    for content, message in (
        (good[:40], "40 bytes, a TRIA header has 64"),
        (good[:-4], "its header promises"),
        (good + b"\0", "its header promises"),
        (good[:4] + struct.pack("<I", 3) + good[8:], "TRIA version 3"),
        (good[:8] + struct.pack("<I", 2**31) + good[12:], "TRIA version 1 with 2147483648 layers"),
        (good[:20] + struct.pack("<I", 6) + good[24:], "4 bands of 6 dimensions"),
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            Statistics.load(path)


def test_other_files(found, tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere: cannot be read"):
        Statistics.load(tmp_path / "nowhere")
    path = tmp_path / "queries"
    save_safetensors(path, {"weight": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"format is 'pt', expected 'sparing-triattention-1'"):
        Statistics.load(path)
    found.save(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="queries"):
        Statistics.load(path)
    save_safetensors(path, {"token_count": torch.tensor([1])}, metadata={
        "format": "sparing-triattention-1", "pairing": "interleaved", "passthrough": "pairs"})  # fmt: skip
    with pytest.raises(CheckpointError, match="pairing is 'interleaved'"):
        Statistics.load(path)


def test_entries_that_stand_for_several_tokens_are_not_scored():
    with pytest.raises(ValueError, match=r"layer 0 keeps entries that stand for several tokens .* use kv='dense' or"):
        scored_layers(parse_config(RELEASED["deepseek-v4-pro"]))
