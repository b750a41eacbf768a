"""How byte-level vocabularies cut a text into words before any merge: the patterns, by the names GGUF files give them.

A text is cut by the patterns one after the other: what one matches becomes a word, what lies between goes to the next.
Sources: the tokenizer.json of the models; for the names and what goes with them, the table of llama.cpp's llama-vocab.
"""

__all__ = ["GPT2", "QWEN2", "WHOLE_WORDS", "WITH_BEGINNING", "WORDS"]

LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
OTHERS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
OTHERS_AND_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
# a word in small letters, or in capitals first
CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+ENDING"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*ENDING"
)

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{ENDING}|{LETTERS}|\p{{N}}{{1,3}}|{OTHERS}|{BLANKS}"
QWEN2 = rf"{ENDING}|{LETTERS}|\p{{N}}|{OTHERS}|{BLANKS}"
QWEN35 = rf"{ENDING}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{BLANKS}"
TEKKEN = rf"{CASED.replace('ENDING', '')}|\p{{N}}|{OTHERS_AND_SLASH}|{BLANKS}"
GPT4O = rf"{CASED.replace('ENDING', ENDING + '?')}|\p{{N}}{{1,3}}|{OTHERS_AND_SLASH}|{BLANKS}"
BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"

SIGN_AND_LETTERS = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
HAN_AND_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
DEEPSEEK3 = (r"\p{N}{1,3}", HAN_AND_KANA, rf"{SIGN_AND_LETTERS}| ?[\p{{P}}\p{{S}}]+[\r\n]*|{BLANKS}")
HAN_AND_HANGUL = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
CASED_LETTERS = (  # upper and lower case, as Unicode had them at the time
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb"
    "\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4"
    "\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf"
    "\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)

LLAMA3_WORDS = ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2")
# by name, or several names in one line
PATTERNS = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "gpt-2 phi-2 mpt olmo jais trillion mellum gigachat a.x-4.0 exaone4 granite-docling": (GPT2,),
    "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2": (r"\p{N}", GPT2),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", GPT2, r"[0-9][0-9][0-9]"),
    "qwen2 deepseek-r1-qwen kormo megrez stablelm2 hunyuan solar-open grok-2 f2llmv2": (QWEN2,),
    "qwen35": (QWEN35,),
    "ufakzeka": (rf"{LETTERS}|\p{{N}}|{OTHERS}|{BLANKS}",),
    "laguna": (r"[^\n]+|[\n]+", QWEN2),
    "seed-coder": (rf"{ENDING}|{LETTERS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{BLANKS}",),
    "bailingmoe bailingmoe2 llada-moe": (rf"'(?i:[sdmt]|ll|ve|re)|{LETTERS}|\p{{N}}|{OTHERS}|\s*[\r\n]|\s+(?!\S)|\s+",),
    " ".join(LLAMA3_WORDS): (LLAMA3,),
    "smaug-bpe dbrx chatglm-bpe glm4 glm5": (LLAMA3,),
    "minicpm5": (r"\p{N}{1,3}", LLAMA3.replace("{1,3}", "+")),
    "jais-2": (
        LLAMA3.removesuffix(r"\s+(?!\S)|\s+")
        + "".join(rf"\s{{{count}}}(?!\S)|" for count in (512, 256, 128, 64, 32, 16, 8, 4, "1,2"))
        + r"\s",
    ),
    "tekken": (TEKKEN,),
    "gpt-4o llama4 kanana2 talkie minimax-m2": (GPT4O,),
    "superbpe": (r"\p{N}+", r"(?=(\d{3})+(?!\d))"),
    "poro-chat bloom gpt3-finnish": (BLOOM,),
    "viking": (BLOOM, r"\p{N}"),
    "deepseek-llm": (
        r"[\r\n]",
        rf"\s?[{CASED_LETTERS}]+",
        "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
        r"\s+$",
        HAN_AND_HANGUL,
        r"\p{N}+",
    ),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", HAN_AND_HANGUL, r"\p{N}"),
    "deepseek-v3 hunyuan-dense joyai-llm hy_v4": DEEPSEEK3,
    "spark2_5": (
        *DEEPSEEK3[:2],
        rf"{SIGN_AND_LETTERS}| ?[\p{{P}}\p{{S}}]+|[\r\n]|\s+(?!\S)|\s+",
        r"\p{N}",
    ),
    "exaone-moe": (
        rf"{ENDING}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
    ),
}
WORDS = {name: patterns for names, patterns in PATTERNS.items() for name in names.split()}
# vocabularies in which a word that is a token as a whole is never built from merges
WHOLE_WORDS = {*LLAMA3_WORDS, "tekken", "minicpm5", "glm4", "glm5"}
# those that put the beginning token before a text unless the file says otherwise
WITH_BEGINNING = {*LLAMA3_WORDS, "tekken"}
