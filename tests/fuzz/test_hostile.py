"""Inputs that once did harm, smallest first in their kind: what became of them stays as it should be."""

import pytest

HOSTILE: dict[str, tuple[str, str, str, list[str]]] = {
    # Templates: time and memory hold while one is compiled and while it runs.
    "a power": ("refused", "template", "plain", ["doc['pieces.json'] = '{{ 2 ** 9999999999 }}'"]),
    "powers of powers": ("refused", "template", "plain", ["doc['pieces.json'] = '{{ 9 ** (9 ** (9 ** 9)) }}'"]),
    "a shift": ("refused", "template", "plain", ["doc['pieces.json'] = '{{ (1).__lshift__(9**11) }}'"]),
    "folded constants": ("refused", "template", "plain", [
        "doc['pieces.json'] = \"{{ 'a'|center(3999999) }}\" * 600"]),
    "folded repetition": ("refused", "template", "plain", ["doc['pieces.json'] = \"{{ 'ab' * 500000000 }}\""]),
    "folded lists": ("refused", "template", "plain", ["doc['pieces.json'] = '{{ [0] * 500000000 }}'"]),
    "nested brackets": ("", "template", "plain", [
        "doc['pieces.json'] = '{{ ' + '(' * 20000 + '1' + ')' * 20000 + ' }}'"]),
    # Configs.
    "a long layer pattern": ("refused", "config", "nemotron_h", [
        "doc['config.json']['hybrid_override_pattern'] = 'M' * 100_000"]),
    "as many layers as may be": ("refused", "config", "llama", ["doc['config.json']['num_hidden_layers'] = 16_000"]),
    "as long a pattern as may be": ("refused", "config", "nemotron_h", [
        "doc['config.json']['hybrid_override_pattern'] = 'M' * 16_000"]),
    "many layers": ("refused", "config", "llama", ["doc['config.json']['num_hidden_layers'] = 10**6"]),
    "many layers of types": ("refused", "config", "gemma4_text", [
        "doc['config.json']['num_hidden_layers'] = 50_000",
        "doc['config.json']['layer_types'] = ['sliding_attention', 'full_attention'] * 25_000"]),
    "many experts": ("refused", "config", "gemma4_moe", ["doc['config.json']['num_experts'] = 10**9"]),
    "empty layer types": ("refused", "config", "gemma4_text", [
        "doc['config.json']['layer_types'] = ['' if t[0] == 's' else t for t in doc['config.json']['layer_types']]"]),
    "empty layer types of a llama": ("refused", "config", "llama", ["doc['config.json']['layer_types'] = ['', '']"]),
    "a negative epsilon of a hybrid": ("refused", "config", "nemotron_h", [
        "doc['config.json']['layer_norm_epsilon'] = -1.0"]),
    "a negative epsilon": ("refused", "config", "llama", ["doc['config.json']['rms_norm_eps'] = -1.0"]),
    "a negative theta": ("refused", "config", "llama", ["doc['config.json']['rope_theta'] = -1.0"]),
    "a theta that is no number": ("refused", "config", "llama", ["doc['config.json']['rope_theta'] = float('nan')"]),
    "a list of types": ("refused", "config", "llama", ["doc['config.json']['dtype'] = ['float32']"]),
    "an end beyond the vocabulary": ("", "config", "llama", ["doc['config.json']['eos_token_id'] = 10**9"]),
    # Generation settings.
    "a sampler that is a number": ("refused", "generation", "diffusion_gemma", [
        "doc['generation_config.json']['sampler_config'] = 3"]),
    "a penalty that is text": ("refused", "generation", "llama", [
        "doc['generation_config.json']['repetition_penalty'] = 'x'"]),
    "a share that is text": ("refused", "generation", "llama", ["doc['generation_config.json']['top_p'] = 'x'"]),
    "a number of tokens that is a list": ("refused", "generation", "llama", [
        "doc['generation_config.json']['top_k'] = [5]"]),
    # GGUF files.
    "a BOS with a colon": ("used", "gguf", "llama", ["entry('tokenizer.ggml.tokens')[2][1][2] = 'a:b'"]),
    "a BOS with a dollar": ("used", "gguf", "llama", ["entry('tokenizer.ggml.tokens')[2][1][2] = '$A'"]),
    "an end that is a list": ("refused", "gguf", "llama", ["entry('tokenizer.ggml.eos_token_id')[1:] = [9, [4, [1]]]"]),
    "an end that is a list of lists": ("refused", "gguf", "llama", [
        "entry('tokenizer.ggml.eos_token_id')[1:] = [9, [9, [[4, [1]]]]]"]),
    "tokens that are lists": ("refused", "gguf", "llama", [
        "entry('tokenizer.ggml.tokens')[2] = [9, [[8, ['a']]] * 300]"]),
    "no rotation": ("refused", "gguf", "llama", ["entry('llama.rope.dimension_count')[2] = 0"]),
    "keys of nothing": ("refused", "gguf", "gemma4", ["entry('gemma4.attention.key_length')[2] = 0"]),
    "no blocks": ("refused", "gguf", "gemma4", ["entry('gemma4.block_count')[2] = 0"]),
    "experts of one dimension": ("refused", "gguf", "gemma4", [
        "experts = [t for t in doc['model.gguf']['tensors'] if '_exps.weight' in t[0]];"
        "[t.__setitem__(1, [t[1][0] * t[1][1] * t[1][2]]) for t in experts]"]),
    "offsets that are not aligned": ("refused", "gguf", "llama", [
        "doc['model.gguf']['tensors'][-1][3] += 1; doc['model.gguf']['data'] += bytes(32)"]),
    "a token of 400,000 letters": ("", "gguf", "llama", [
        "entry('tokenizer.ggml.tokens')[2][1][40] = 'ab' * 200_000"]),
    "merges of a long token": ("", "gguf", "gemma4", [
        "entry('tokenizer.ggml.model')[2] = 'llama'",
        "entry('tokenizer.ggml.tokens')[2][1][299] = 'a' * 400_000"]),
    "many lists": ("refused", "gguf", "llama", [
        "entry('tokenizer.ggml.tokens')[2] = [9, [[9, []]] * 100_000]"]),
    # Saved memories.
    "a length beyond the entries": ("refused", "memory", "codes", [
        "doc['memory.safetensors']['memory']['length'] = 999"]),
    "a negative length": ("refused", "memory", "dense", ["doc['memory.safetensors']['memory']['length'] = -5"]),
    "half a token": ("refused", "memory", "dense", ["doc['memory.safetensors']['memory']['length'] = 1.5"]),
    "a length that is text": ("refused", "memory", "pruned", ["doc['memory.safetensors']['memory']['length'] = '14'"]),
    "one head for two": ("refused", "memory", "dense", [
        "first = [e for n, e in doc['memory.safetensors']['header'].items() if n[0] == '0'];"
        "[e.update(shape=[e['shape'][0], 1, 2 * e['shape'][2]]) for e in first]"]),
    "a missing tensor": ("refused", "memory", "dense", [
        "h = doc['memory.safetensors']['header']; h['0.other'] = h.pop('0.keys')"]),
    "a pruner that is a list": ("refused", "memory", "pruned", ["doc['memory.safetensors']['memory']['pruner'] = [1]"]),
    # Query statistics.
    "a head of a large number": ("refused", "statistics", "official", [
        "s = doc['statistics.pt']['stats']; s['layer00_head99999999'] = s.pop('layer00_head03')"]),
    "statistics of no layer": ("refused", "statistics", "own", [
        "h = doc['statistics.safetensors']['header'];"
        "h['other_index'] = h.pop('layer_index')"]),
    # Tokenizers.
    "a post-processor that panics": ("refused", "tokenizer", "byte-level", [
        "doc['tokenizer.json']['post_processor'] = {'type': 'TemplateProcessing', 'single': "
        "[{'SpecialToken': {'id': 'zz', 'type_id': 0}}], 'pair': [], 'special_tokens': {}}"]),
    # Runs.
    "a log without steps": ("", "training", "run", ["doc['run/log.jsonl'] = [{}]"]),
    "a log of numbers": ("", "training", "run", ["doc['run/log.jsonl'] = [3, 'x}', [1]]"]),
    "a state without settings": ("refused", "training", "run", ["del doc['run/state.safetensors']['run']['settings']"]),
    "a state that is a list": ("refused", "training", "run", ["doc['run/state.safetensors']['run'] = [1]"]),
    "a folder named like a part": ("", "quantise", "resumed", ["doc['out/.x.part/keep'] = ''"]),
    "errors that are a list": ("refused", "quantise", "resumed", ["doc['out/quantization.json']['errors'] = [1]"]),
    "shards that are a list": ("refused", "quantise", "resumed", ["doc['out/quantization.json']['shards'] = [1]"]),
    # Index files.
    "a name that leads out": ("refused", "index", "shards", [
        "m = doc['model.safetensors.index.json']['weight_map']; m[next(iter(m))] = '../' + m[next(iter(m))]"]),
    "a shard that is a number": ("refused", "index", "shards", [
        "m = doc['model.safetensors.index.json']['weight_map']; m[next(iter(m))] = 3"]),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_what_once_did_harm(worker, name):
    expected, kind, seed, lines = HOSTILE[name]
    outcome = worker.run(kind, None, seed, lines)
    assert outcome.fault is None, str(outcome)
    assert expected in ("", "refused" if outcome.refused else "used"), outcome.refused
