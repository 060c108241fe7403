"""Makes the tokenizer: byte-level BPE with ChatML tokens, trained on the corpus. Called by reproduce.sh.

  python tokenizer.py --out build

Writes tokenizer.json, tokenizer_config.json and chat_template.jinja. Also holds render(), which train.py and
evaluate.py use: it turns a document into (text, is_assistant) pieces exactly as the chat template does, which
evaluate.py checks.
"""
import argparse
import json
from itertools import islice
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VISIBLE = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
# Qwen's pattern: words, single digits, punctuation, white space
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
         r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
TOOLS_HEAD = ("# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
              "You are provided with function signatures within <tools></tools> XML tags:\n<tools>")
TOOLS_TAIL = ("\n</tools>\n\nFor each function call, return a json object with function name and "
              "arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n"
              '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n')


def _jinja(s):
    return "{{- " + json.dumps(s) + " }}"


CHAT_TEMPLATE = """\
{%- set ns = namespace(first=0) %}
{%- if messages and messages[0].role == 'system' %}{% set ns.first = 1 %}{% endif %}
{%- if tools %}
{{- '<|im_start|>system\\n' }}
{%- if ns.first %}{{- messages[0].content + '\\n\\n' }}{% endif %}
""" + _jinja(TOOLS_HEAD) + """
{%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{% endfor %}
""" + _jinja(TOOLS_TAIL) + """
{%- elif ns.first %}
{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for m in messages %}
{%- if m.role == 'system' and loop.first %}
{%- elif m.role == 'tool' %}
{%- if loop.first or loop.previtem.role != 'tool' %}{{- '<|im_start|>user' }}{% endif %}
{{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
{%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\\n' }}{% endif %}
{%- else %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.content %}{{- m.content }}{% endif %}
{%- for call in m.tool_calls or [] %}
{%- if not loop.first or m.content %}{{- '\\n' }}{% endif %}
{%- set f = call.function or call %}
{{- '<tool_call>\\n{"name": "' + f.name + '", "arguments": ' }}
{%- if f.arguments is string %}{{- f.arguments }}{% else %}{{- f.arguments | tojson }}{% endif %}
{{- '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""


def render(doc):
    """[(text, is_assistant_output)] for one document."""
    out, rest = [], doc
    if doc[0]["role"] == "system":
        system, rest = doc[0], doc[1:]
        if system.get("tools"):
            # some servers render tojson without spaces
            marks = (",", ":") if system.get("compact") else None
            tools = "".join("\n" + json.dumps(t, separators=marks) for t in system["tools"])
            out.append(("<|im_start|>system\n" + system["content"] + "\n\n" + TOOLS_HEAD
                        + tools + TOOLS_TAIL, False))
        else:
            out.append(("<|im_start|>system\n" + system["content"] + "<|im_end|>\n", False))
    for m in rest:
        if m["role"] == "tool":
            out.append(("<|im_start|>user\n<tool_response>\n" + m["content"]
                        + "\n</tool_response><|im_end|>\n", False))
        elif m["role"] == "assistant":
            out += [("<|im_start|>assistant\n", False), (m["content"] + "<|im_end|>", True),
                    ("\n", False)]
        else:
            out.append((f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n", False))
    return out


def build(texts, vocab):
    tok = Tokenizer(models.BPE(byte_fallback=False))
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=SPECIAL, min_frequency=2, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()), length=None)
    return tok


def main():
    from corpus import Corpus
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--out", default="build")
    p.add_argument("--vocab", type=int, default=4096)
    p.add_argument("--documents", type=int, default=25000)
    o = p.parse_args()
    docs = islice(Corpus().stream(99), o.documents)
    strip = lambda t: t.replace("<|im_start|>", "").replace("<|im_end|>", "")
    tok = build((strip("".join(t for t, _ in render(d))) for d in docs), o.vocab - len(VISIBLE))
    tok.add_tokens([AddedToken(t, special=False, normalized=False) for t in VISIBLE])
    out = Path(o.out)
    out.mkdir(parents=True, exist_ok=True)
    tok.save(str(out / "tokenizer.json"))
    added = {str(tok.token_to_id(t)): {"content": t, "lstrip": False, "normalized": False,
                                       "rstrip": False, "single_word": False, "special": t in SPECIAL}
             for t in SPECIAL + VISIBLE}
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (out / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 4096,
        "add_bos_token": False, "bos_token": None, "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>", "unk_token": None, "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": added, "chat_template": CHAT_TEMPLATE}, indent=2))
    print("vocab", tok.get_vocab_size())


if __name__ == "__main__":
    main()
