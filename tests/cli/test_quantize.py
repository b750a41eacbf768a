"""`sparing quantize`: what it writes and shows."""

import json

import sparing
from sparing.weights.convert import quantize


def test_quantize(command, folders, tmp_path):
    result = command("quantize", "tales", tmp_path / "out", "--weights", "int8", "--threads", 1)
    assert result.code == 0
    assert f"written: {tmp_path / 'out'}" in result.out
    header, rule, *rows = result.out.splitlines()
    assert header.split()[:4] == ["weight", "count", "shape", "SQNR,"] and set(rule) == {"-", " "}
    assert any(row.startswith("model.decoder.layers.*.self_attn.q_proj.weight") for row in rows)
    assert "100 % of" in result.err
    model = sparing.load(tmp_path / "out")
    assert model.tokenizer is not None
    assert model.logits([3, 4, 5]).isfinite().all()
    again = command("quantize", "tales", tmp_path / "out", "--weights", "int8", "--json")
    errors = quantize(folders / "tales", tmp_path / "out", "int8")
    assert {n: e["sqnr_db"] for n, e in json.loads(again.out).items()} == {n: e.sqnr_db for n, e in errors.items()}
    assert command("generate", tmp_path / "out", "a", "--max-new-tokens", 2, "--seed", 0).code == 0


def test_quantize_takes_the_scales_of_a_format(command, refused, folders, tmp_path):
    for scales, weights in {"tensor": "fp8", "block": "fp8", "2d": "nvfp4"}.items():
        result = command("quantize", folders / "causal", tmp_path / scales, "--weights", weights, "--scales", scales)
        assert result.code == 0 and "transformers" not in result.err
        assert json.loads((tmp_path / scales / "quantization.json").read_text())["settings"]["scales"] == scales
    message = refused("quantize", "tales", tmp_path / "other", "--weights", "int4", "--scales", "row")
    assert "scales='row' is not for int4: nvfp4 takes max" in message and not (tmp_path / "other").exists()


def test_quantize_says_what_transformers_does_not_read(command, tmp_path):
    result = command("quantize", "sudoku", tmp_path / "out", "--weights", "fp8")
    assert "decoder.layers.*.experts.*.gate_up_proj.weight" in result.out
    assert result.err.endswith("sparing loads this; transformers 5.23 reads no packed experts with gates\n")
    assert sparing.load(tmp_path / "out").logits([3, 4, 5]).isfinite().all()


def test_weights_are_packed_while_loading(command, refused, folders):
    found = command("generate", "tales", "a", "--seed", 0, "--json", "--weights", "int8").out.splitlines()
    packed = sparing.load(folders / "tales", weights="int8")
    commits = [event for event in sparing.generate(packed, "a", seed=0) if isinstance(event, sparing.Commit)]
    told = [event for event in map(json.loads, found) if event["event"] == "commit"]
    assert [event["ids"] for event in told] == [event.ids for event in commits] != []
    assert "weights='int3' is not known, use stored, int8" in refused("generate", "tales", "a", "--weights", "int3")


def test_quantize_refuses(refused, tmp_path):
    assert "weights='int3' is not known" in refused("quantize", "tales", tmp_path / "out", "--weights", "int3")
    assert "Missing option '--weights'" in refused("quantize", "tales", tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").touch()
    assert "is not empty (x)" in refused("quantize", "tales", tmp_path / "out", "--weights", "int8")
