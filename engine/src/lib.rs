//! What prefill and decode nodes share: KV, caches, sampling, scheduling, the runner.
