"""Trains the demo model on CPU (or CUDA, if there is one). Called by reproduce.sh.

  python train.py --out build --million 16              a number of tokens; resumes from checkpoint.pt
  python train.py --out build --minutes 100             the same, on the clock
  python train.py --out build --init weights --lr 1.5e-3   from finished weights instead of from scratch
  python train.py --out build --bench                   tokens per second only

Rows hold several documents; attention never crosses documents. The loss is on what the assistant says, plus a little
on everything else. The learning rate: warm-up, then cosine to zero when the tokens (--million) or the clock (--minutes)
run out, whichever is first. Interrupting it saves; the same command goes on.
"""
import argparse
import json
import math
import random
import signal
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from corpus import Corpus
from model import Config, Qwen3
from tokenizer import render

SHORT, LONG = 256, 512  # tokens in a row; what is longer is cut


def encode(tok, doc):
    ids, weight = [], []
    for text, said in render(doc):
        piece = tok.encode(text, add_special_tokens=False).ids
        ids += piece
        weight += [1.0 if said else 0.0] * len(piece)
    ids.append(0)  # <|endoftext|> closes the document; never asked for
    weight.append(0.0)
    return np.array(ids), np.array(weight, dtype=np.float32)


def pack(pool, rows, length):
    """Take documents from pool into rows, largest that fits first."""
    ids = np.zeros((rows, length), np.int64)
    weight = np.zeros((rows, length), np.float32)
    doc = np.full((rows, length), -1, np.int64)
    pool.sort(key=lambda d: len(d[0]))
    sizes = [len(d[0]) for d in pool]
    for i in range(rows):
        used, n = 0, 0
        # start each row with a random document, so that short ones are used too
        j = random.Random(len(pool) * 31 + i).randrange(len(pool)) if pool else -1
        while j >= 0:
            d, w = pool.pop(j)
            sizes.pop(j)
            ids[i, used:used + len(d)], weight[i, used:used + len(d)] = d, w
            doc[i, used:used + len(d)] = n
            used, n = used + len(d), n + 1
            j = int(np.searchsorted(sizes, length - used, side="right")) - 1
    return ids, weight, doc


def batches(corpus, tok, seed, tokens):
    """(ids, weight, doc, positions) numpy arrays for ever."""
    short, long = SHORT, LONG
    pools = {short: [], long: []}
    rng = np.random.default_rng(seed)
    for document in corpus.stream(seed):
        ids, w = encode(tok, document)
        ids, w = ids[:long], w[:long]
        length = short if len(ids) <= short else long
        pools[length].append((ids, w))
        if sum(len(d[0]) for d in pools[length]) < 2.5 * tokens:
            continue
        ids, w, doc = pack(pools[length], tokens // length, length)
        pos = np.broadcast_to(np.arange(length), ids.shape).copy()
        if length == long and rng.random() < 0.5:
            # skip positions between turns, to see distances up to the full context
            for i in range(len(ids)):
                starts = np.flatnonzero(ids[i] == tok.token_to_id("<|im_start|>"))
                for s in rng.choice(starts, 2):
                    pos[i, s:] += rng.integers(0, 1500)
        yield ids, w, doc, pos


def train_loss(hidden, logits, batch, rng, other=0.25):
    ids, w, doc, pos = (torch.from_numpy(x) for x in batch)
    device = next(logits.__self__.parameters()).device
    same = (doc[:, :, None] == doc[:, None, :])
    mask = (same & torch.ones(same.shape[1:], dtype=torch.bool).tril())[:, None]
    # the target of position t is token t+1 of the same document
    target, tw = ids.roll(-1, 1), w.roll(-1, 1)
    valid = (doc == doc.roll(-1, 1)) & (doc >= 0)
    valid[:, -1] = False
    extra = torch.from_numpy(rng.random(w.shape) < 0.15)
    pick = valid & ((tw > 0) | extra)
    weight = torch.where(tw[pick] > 0, 1.0, other)
    move = lambda t: t.to(device, non_blocking=True)
    ids, mask, pos, pick, target, weight = map(move, (ids, mask, pos, pick, target[pick], weight))
    with torch.autocast(device.type, torch.bfloat16):
        h = hidden(ids, mask, pos)
        out = logits(h[pick])
    each = F.cross_entropy(out.float(), target, reduction="none")
    said = each.detach()[weight == 1].mean()
    return (each * weight).sum() / weight.sum(), said


def export(model, out, tok):
    state = {k: v.detach().to(torch.bfloat16).cpu().contiguous() for k, v in model.state_dict().items()}
    save_file(state, str(out / "model.safetensors"), {"format": "pt"})
    (out / "model.safetensors").chmod(0o644)
    end, pad = tok.token_to_id("<|im_end|>"), tok.token_to_id("<|endoftext|>")
    # nearly greedy: facts stay as learned, stories differ
    generation = {"do_sample": True, "temperature": 0.2, "top_p": 0.9, "eos_token_id": [end, pad], "pad_token_id": pad}
    (out / "config.json").write_text(json.dumps(model.c.hf(None, end, pad), indent=2) + "\n")
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--out", default="build")
    p.add_argument("--million", type=float, default=0, help="stop after so many million tokens")
    p.add_argument("--minutes", type=float, default=0, help="stop after so many minutes of training")
    p.add_argument("--until", type=float, default=0, help="stop at this Unix time")
    p.add_argument("--init", help="folder with model.safetensors to start from")
    p.add_argument("--threads", type=int, default=0)
    p.add_argument("--tokens", type=int, default=6144, help="tokens per step")
    p.add_argument("--lr", type=float, default=2.5e-3)
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--no-compile", action="store_true")
    p.add_argument("--bench", action="store_true")
    o = p.parse_args()
    torch.manual_seed(o.seed)
    if o.threads:
        torch.set_num_threads(o.threads)
    out = Path(o.out)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tok = Tokenizer.from_file(str(out / "tokenizer.json"))
    vocab = -(-tok.get_vocab_size() // 64) * 64
    model = Qwen3(Config(vocab_size=vocab))
    if o.init:
        model.load_state_dict(load_file(str(Path(o.init) / "model.safetensors")))
    model = model.to(device)
    count = sum(q.numel() for q in model.parameters())
    print(f"parameters {count / 1e6:.2f} M  vocab {vocab}  device {device}", flush=True)
    corpus = Corpus(f"{count / 1e6:.0f}")
    matrices = [q for n, q in model.named_parameters() if q.dim() == 2 and "embed" not in n]
    rest = [q for n, q in model.named_parameters() if q.dim() != 2 or "embed" in n]
    opts = [torch.optim.Muon(matrices, lr=o.lr, weight_decay=0.05, momentum=0.95,
                             adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=o.lr, betas=(0.9, 0.98), weight_decay=0.0)]
    step, spent, seen = 0, 0.0, 0
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists() and not o.bench:
        s = torch.load(checkpoint, map_location=device)
        model.load_state_dict(s["model"])
        for opt, q in zip(opts, s["opts"]):
            opt.load_state_dict(q)
        step, spent, seen = s["step"], s["spent"], s["seen"]
        print(f"resumed at step {step}, {spent / 60:.1f} min", flush=True)

    def save():
        torch.save({"model": model.state_dict(), "opts": [q.state_dict() for q in opts],
                    "step": step, "spent": spent, "seen": seen}, str(checkpoint) + ".new")
        Path(str(checkpoint) + ".new").replace(checkpoint)
        export(model, out, tok)

    hidden = model if o.no_compile else torch.compile(model, dynamic=False)
    rng = np.random.default_rng(o.seed + step)
    log = open(out / "train.log", "a")
    base = spent
    start = last = saved = time.time()
    seconds = o.minutes * 60 or (base + o.until - start if o.until else math.inf)
    tokens = o.million * 1e6 or math.inf
    if not o.bench and seconds == tokens:
        p.error("say how long: --million, --minutes or --until")
    ema, stopped = None, []
    for s in (signal.SIGINT, signal.SIGTERM):
        signal.signal(s, lambda *_: stopped.append(1))
    for batch in batches(corpus, tok, o.seed * 100003 + step, o.tokens):
        progress = max(spent / seconds, seen / tokens)
        if progress >= 1 or stopped:
            break
        lr = o.lr * min(1, (step + 1) / 60) * (0.5 + 0.5 * math.cos(math.pi * progress))
        for opt in opts:
            for g in opt.param_groups:
                g["lr"] = lr
        loss, said = train_loss(hidden, model.logits, batch, rng)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        step += 1
        seen += int((batch[2] >= 0).sum())
        said = said.item()
        ema = said if ema is None else 0.95 * ema + 0.05 * said
        now = time.time()
        spent = base + now - start
        if o.bench:
            print(f"rows {batch[0].shape}: {batch[0].size / (now - last):.0f} tok/s, "
                  f"filled {np.mean(batch[2] >= 0):.2f}, assistant {np.mean(batch[1] > 0):.2f}", flush=True)
            if step >= 14:
                return
        elif step % 20 == 0:
            line = (f"step {step} min {spent / 60:.1f} loss {loss.item():.3f} assistant {ema:.4f} "
                    f"lr {lr:.5f} tok/s {seen / spent:.0f} seen {seen / 1e6:.2f}M")
            print(line, flush=True)
            print(line, file=log, flush=True)
        last = now
        if now - saved > 240 and not o.bench:
            save()
            saved = time.time()
    save()
    print(f"{'stopped' if stopped else 'done'}: {step} steps, {seen / 1e6:.2f} M tokens, {spent / 60:.1f} min")


if __name__ == "__main__":
    main()
