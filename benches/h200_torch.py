"""The same prompts through PyTorch on the same card: Hugging Face's Llama with SDPA, and flash SDPA alone.

h200_torch.py CONFIG.json OUT.json [PROMPT]: writes seconds by name, for `device --beside OUT.json`.
"""
import json
import statistics
import sys
import time

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

# As in benches/src/bin/device/measure.rs.
RAGGED = [64, 2048, 192, 320, 1536, 448, 96, 1024, 576, 704, 128, 832, 1280, 256, 960, 1792]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def timed(call, runs=5):
    times = []
    for _ in range(runs + 2):
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        begun = time.perf_counter()
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return statistics.median(times[2:])


def attention(tokens):
    q = torch.randn(1, 32, tokens, 128, device=DEVICE, dtype=torch.bfloat16)
    k, v = (torch.randn(1, 8, tokens, 128, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return timed(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))


def main():
    config_path, out = sys.argv[1:3]
    prompt = int(sys.argv[3]) if len(sys.argv) > 3 else 8192
    found = {"torch": torch.__version__}
    with torch.inference_mode():
        found["attention"] = attention(prompt)
        print(f"torch: flash attention {found['attention'] * 1e3:.3f} ms")
        with open(out, "w") as file:
            json.dump(found, file)
        try:
            from transformers import LlamaConfig, LlamaForCausalLM
        except ImportError as error:
            print(f"torch: no Hugging Face model: {error}")
            return
        with open(config_path) as file:
            config = LlamaConfig(**{k: v for k, v in json.load(file).items() if k not in ("architectures", "model_type", "torch_dtype")})
        config._attn_implementation = "sdpa"
        torch.set_default_dtype(torch.bfloat16)
        with torch.device(DEVICE):
            model = LlamaForCausalLM(config).eval()
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)

        def ids(*shape):
            return torch.randint(0, config.vocab_size, shape, device=DEVICE)

        one = ids(1, prompt)
        found["prompt"] = timed(lambda: model(one, use_cache=True, logits_to_keep=1))
        print(f"torch: prompt of {prompt} {found['prompt'] * 1e3:.1f} ms")
        lengths = [min(n, prompt) for n in RAGGED]
        apart = [ids(1, n) for n in lengths]
        longest = max(lengths)
        mask = torch.zeros(len(lengths), longest, dtype=torch.long, device=DEVICE)
        for row, n in enumerate(lengths):
            mask[row, longest - n:] = 1
        padded = ids(len(lengths), longest)
        both = {
            "one by one": timed(lambda: [model(x, use_cache=True, logits_to_keep=1) for x in apart], 3),
            "padded": timed(lambda: model(padded, attention_mask=mask, use_cache=True, logits_to_keep=1), 3),
        }
        print("torch: 16 prompts " + ", ".join(f"{k} {v * 1e3:.1f} ms" for k, v in both.items()))
        # The better of its two ways.
        found["ragged"] = min(both.values())
    with open(out, "w") as file:
        json.dump(found, file)


main()
