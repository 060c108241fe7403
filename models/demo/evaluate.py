"""Scores the demo model on questions it was never trained on, by category, and writes score.json. Called by
reproduce.sh.

  python evaluate.py --model weights --score score.json     the table in README.md
  python evaluate.py --model weights --wrong 5              and some wrong answers of each category
  python evaluate.py --model weights --ask "What is 7 + 8?" one answer
  python evaluate.py --model weights --check                against Hugging Face transformers: template, logits, answers

Decoding is greedy. An answer is right when:
  baton, small talk, facts, out of scope, tool result, no tool needed, multi-turn
                  it equals an accepted answer after words.plain(): case, spaces and punctuation do not count
  arithmetic      the number after its last "=" is the result (its whole text when it has no "=")
  JSON            it parses as JSON (valid) and equals the expected value, key order aside (right)
  tool call       it is one <tool_call> block whose JSON has a name and an arguments object (valid), and name and
                  arguments equal the expected ones (right)
  story           40 to 200 words, ends in a full stop, names the hero that was asked for (and the name, helper or
                  trait, if asked for), and at most one sentence occurs twice
  by hand         the questions of probes.txt, written by hand and not by the generator: the answer matches the pattern
                  beside the question
"""
import argparse
import json
import re
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from corpus import Corpus
from model import Config, Qwen3
from tokenizer import render
from words import plain

HERE = Path(__file__).parent
TOKENS_MAX = 220  # the longest answer of the corpus, a story, has about 190


# ---- generation ----

def load(directory):
    model = Qwen3(Config.load(directory))
    state = {k: v.float() for k, v in load_file(str(Path(directory) / "model.safetensors")).items()}
    model.load_state_dict(state)
    return model.eval(), Tokenizer.from_file(str(Path(directory) / "tokenizer.json"))


def prompt(messages):
    return "".join(text for text, _ in render(messages)) + "<|im_start|>assistant\n"


@torch.inference_mode()
def answers(model, tok, texts, rows=48):
    """Greedy answers, in batches of prompts of like length, padded on the left."""
    ids = [tok.encode(t, add_special_tokens=False).ids for t in texts]
    order, out = sorted(range(len(ids)), key=lambda i: len(ids[i])), [None] * len(ids)
    ends = {tok.token_to_id("<|im_end|>"), tok.token_to_id("<|endoftext|>")}
    for start in range(0, len(order), rows):
        part = order[start:start + rows]
        width = max(len(ids[i]) for i in part)
        pads = torch.tensor([width - len(ids[i]) for i in part])
        x = torch.tensor([[0] * (width - len(ids[i])) + ids[i] for i in part])
        caches = [[] for _ in model.model.layers]
        said, open_rows, at = [[] for _ in part], set(range(len(part))), 0
        while open_rows and at < width + TOKENS_MAX:
            columns = torch.arange(at, at + x.shape[1])
            mask = (torch.arange(at + x.shape[1]) <= columns[:, None])[None] \
                & (torch.arange(at + x.shape[1])[None, None] >= pads[:, None, None])
            pos = (columns[None] - pads[:, None]).clamp(min=0)
            h = model(x, mask[:, None], pos, caches)
            at += x.shape[1]
            x = model.logits(h[:, -1]).argmax(-1, keepdim=True)
            for j in list(open_rows):
                t = int(x[j])
                if t in ends:
                    open_rows.remove(j)
                else:
                    said[j].append(t)
        for j, i in enumerate(part):
            out[i] = tok.decode(said[j], skip_special_tokens=False)
    return out


# ---- rules ----

def number(text):
    found = re.findall(r"-?\d+", text.rsplit("=", 1)[-1])
    return found[0] if len(found) == 1 else None


def parsed(text):
    try:
        return json.loads(text)
    except ValueError:
        return None


def call(text):
    """{"name", "arguments"} of a well-formed tool call, else None."""
    m = re.fullmatch(r"<tool_call>\n(.*)\n</tool_call>", text.strip(), re.S)
    c = parsed(m[1]) if m else None
    ok = isinstance(c, dict) and isinstance(c.get("name"), str) and isinstance(c.get("arguments"), dict)
    return c if ok else None


def sane_story(text, asked):
    words = [asked["noun"]] + [asked[k] for k in ("name", "helper", "trait") if k in asked]
    sentences = re.findall(r"[^.!?]+[.!?]", text)
    return (40 <= len(text.split()) <= 200 and text.rstrip()[-1:] in '."'
            and all(re.search(rf"\b{re.escape(w)}\b", text, re.I) for w in words)
            and len(sentences) - len(set(sentences)) <= 1)


def judge(group, answer, expected):
    """(right, valid); valid is None where the form is free."""
    if group == "story":
        return sane_story(answer, expected), None
    if group == "arithmetic":
        return number(answer) is not None and number(answer) == number(expected[0]), None
    if group == "JSON":
        value = parsed(answer)
        return value is not None and value == parsed(expected[0]), value is not None
    if group == "tool call":
        return call(answer) is not None and call(answer) == call(expected[0]), call(answer) is not None
    if group == "by hand":
        return re.search(expected, answer, re.I | re.S) is not None, None
    return plain(answer) in {plain(e) for e in expected}, None


def probes():
    """[("by hand", messages, pattern)] from probes.txt."""
    out = []
    for line in (HERE / "probes.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            question, pattern = line.split(" => ")
            out.append(("by hand", [{"role": "user", "content": question}], pattern))
    return out


# ---- commands ----

def score(model, tok, wrong):
    cases = Corpus().tests() + probes()
    begun = time.time()
    said = answers(model, tok, [prompt(m) for _, m, _ in cases])
    table, shown = {}, {}
    for (group, messages, expected), answer in zip(cases, said):
        row = table.setdefault(group, {"cases": 0, "right": 0})
        right, valid = judge(group, answer, expected)
        row["cases"] += 1
        row["right"] += right
        if valid is not None:
            row["valid"] = row.get("valid", 0) + valid
        if not right:
            shown.setdefault(group, []).append((messages[-1]["content"], answer, expected))
    held = [row for group, row in table.items() if group != "by hand"]
    table["all held-out"] = {k: sum(row[k] for row in held) for k in ("cases", "right")}
    print(f"| category | cases | right | valid form |\n|---|---|---|---|")
    for group, row in table.items():
        row["right_percent"] = round(100 * row["right"] / row["cases"], 1)
        valid = f"{100 * row['valid'] / row['cases']:.1f} %" if "valid" in row else ""
        print(f"| {group} | {row['cases']} | {row['right_percent']:.1f} % | {valid} |")
    print(f"{len(cases)} answers in {time.time() - begun:.0f} s")
    for group, found in shown.items():
        for question, answer, expected in found[:wrong]:
            print(f"WRONG {group}: {question!r}\n   said     {answer!r}\n   expected {expected!r}")
    return table


def check(directory, model, tok):
    """The Hugging Face stack must see the same prompts, logits and answers as ours."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    their_tok = AutoTokenizer.from_pretrained(directory)
    cases = Corpus().tests()
    cases = [c for g in sorted({c[0] for c in cases}) for c in [d for d in cases if d[0] == g][:6]]
    worst, same = 0.0, 0
    for _, messages, _ in cases:
        text = prompt([{k: v for k, v in m.items() if k != "compact"} for m in messages])
        tools = messages[0].get("tools")
        plain_messages = [{k: v for k, v in m.items() if k in ("role", "content")} for m in messages]
        got = their_tok.apply_chat_template(plain_messages, tools=tools, tokenize=False, add_generation_prompt=True)
        assert got == text, f"chat template differs:\n{got!r}\n{text!r}"
        ids = tok.encode(text, add_special_tokens=False).ids
        assert ids == their_tok(text, add_special_tokens=False)["input_ids"], text
        x = torch.tensor([ids])
        with torch.inference_mode():
            worst = max(worst, (theirs(x).logits - model.logits(model(x))).abs().max().item())
            out = theirs.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=TOKENS_MAX, do_sample=False)
        said = their_tok.decode(out[0, len(ids):], skip_special_tokens=False).split("<|im_end|>")[0]
        same += said == answers(model, tok, [text])[0]
    print(f"{len(cases)} prompts: templates and ids equal, logits within {worst:.1e}, {same} equal answers")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--model", default=str(HERE / "weights"))
    p.add_argument("--score", help="file to write the table to, as JSON")
    p.add_argument("--wrong", type=int, default=0)
    p.add_argument("--ask", action="append")
    p.add_argument("--check", action="store_true")
    p.add_argument("--threads", type=int, default=0)
    o = p.parse_args()
    if o.threads:
        torch.set_num_threads(o.threads)
    model, tok = load(o.model)
    if o.ask:
        for q, answer in zip(o.ask, answers(model, tok, [prompt([{"role": "user", "content": q}]) for q in o.ask])):
            print(f"{q} -> {answer}")
    elif o.check:
        check(o.model, model, tok)
    else:
        table = score(model, tok, o.wrong)
        if o.score:
            Path(o.score).write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()
