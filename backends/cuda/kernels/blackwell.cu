// Causal attention of prompts on data-centre Blackwell: flash attention as in attention.cu, whose products are those of tensor memory
// (tcgen05). A block has two tiles of 128 queries: while the scores of one become weights, tensor cores work for the other. Its warps
// have roles: four for each tile, a thread a query; three bring keys and values; a thread of the last asks for products.
#include "attention.cuh"
#include "tensor.cuh"

const u32 TENSOR_TILES = 2, TENSOR_QUERIES = TENSOR_TILES * TENSOR_LANES, TENSOR_THREADS = 384;
const u32 LOADERS_FIRST = TENSOR_QUERIES, LOADERS = 96, ASKER_WARP = TENSOR_THREADS / 32 - 1;
// Tiles of keys and values that lie in shared memory, by turns; loaders go on while the last of them are on their way. What is
// asked for at once has two, and so has to be there while loaders wait for a place.
const u32 SLOTS = 5, UNDER_WAY = SLOTS - 2;
// Earlier sums are scaled once weights would be larger than two to this: they have as many digits either way.
const float GROWTH_MAX = 8.0f;

// Where the warps of a block meet; outside of the template, where the emulator sees it.
struct Meeting {
    u64 full[SLOTS], empty[SLOTS];                    // places for keys and values
    u64 scored[TENSOR_TILES], weighed[TENSOR_TILES];  // scores; weights, with the sums so far
    u32 memory;                                       // where tensor memory begins
    u32 lost;                                         // whether somebody has waited in vain
};

__device__ __forceinline__ Meeting& meeting() {
    __shared__ Meeting place;
    return place;
}

template <int DK, int DV, int KEYS>
__device__ __forceinline__ void attend_tensor(const AttendArgs& a) {
#if TENSOR_MEMORY
    const int QUERY_TILE = TENSOR_QUERIES * TILE_COLUMNS, TILE = KEYS * TILE_COLUMNS, SLOT = KEYS * (DK > DV ? DK : DV);
    DYNAMIC_SHARED(bf16, shared);
    bf16 *sq = shared, *slots = sq + TENSOR_QUERIES * DK;
    Meeting& meet = meeting();
    const Part part = part_of<KEYS>(a);
    const u32 from = part.from, to = part.to, items = 2 * (to - from);  // K, V, K, V, ...
    const u32 warp = threadIdx.x / 32, own_tile = threadIdx.x / TENSOR_LANES;
    const u32 tiles = part.queries > TENSOR_LANES ? 2 : 1;

    // Whoever waits in vain goes on without waiting, and all answers are no numbers.
    bool patient = true;
    auto wait = [&](u64* barrier, u32 time) {
        if (patient && !barrier_wait(barrier, time % 2)) patient = false, meet.lost = 1;
    };
    u32 memory = 0;
    // [scores 0 | scores 1 | sums 0 | sums 1]; weights, two a column, take the place of their scores.
    auto scores_at = [&](u32 t) { return memory + t * KEYS; };
    auto sums_at = [&](u32 t) { return memory + TENSOR_TILES * KEYS + t * DV; };

    auto bring = [&] {
        auto place = [](u32 row, u32 c) { return c / TILE_COLUMNS * TILE + swizzled(row, c % TILE_COLUMNS); };
        const u32 thread = threadIdx.x - LOADERS_FIRST;
        for (u32 i = 0; i < items + UNDER_WAY; ++i) {
            const u32 at = (from + i / 2) * KEYS;
            bf16* slot = slots + i % SLOTS * SLOT;
            if (i >= SLOTS && i < items) wait(meet.empty + i % SLOTS, i / SLOTS - 1);
            if (i < items && i % 2 == 0)
                load_tile<DK, KEYS, LOADERS>(slot, part.k, a.k_token, a.key_dim, a, part.tile.run, at, part.end, place, thread);
            else if (i < items)
                load_tile<DV, KEYS, LOADERS>(slot, part.v, a.v_token, a.value_dim, a, part.tile.run, at, part.end, place, thread);
            copies_commit();
            if (i < UNDER_WAY) continue;
            copies_wait<UNDER_WAY>();
            shared_fence();
            barrier_arrive(meet.full + (i - UNDER_WAY) % SLOTS);
        }
    };

    auto ask = [&] {
        auto here = [&](u32 i) { wait(meet.full + i % SLOTS, i / SLOTS); };
        auto done_with = [&](u32 i) {
            if (i + SLOTS < items) tensor_commit(meet.empty + i % SLOTS);
        };
        auto scores = [&](u32 t, u32 i) {
            const bf16 *queries = sq + t * TENSOR_LANES * TILE_COLUMNS, *keys = slots + i % SLOTS * SLOT;
#pragma unroll
            for (int k = 0; k < DK; k += 16) {
                const int column = k / TILE_COLUMNS, c = k % TILE_COLUMNS;
                tensor_product(scores_at(t), tensor_tile(queries + column * QUERY_TILE + c), tensor_tile(keys + column * TILE + c),
                               tensor_kind(KEYS, false), k > 0);
            }
        };
        auto sums = [&](u32 t, u32 i) {
            const bf16* values = slots + i % SLOTS * SLOT;
#pragma unroll
            for (int k = 0; k < KEYS; k += 16)
                tensor_product_held(sums_at(t), scores_at(t) + k / 2, tensor_tile(values + k * TILE_COLUMNS, TILE * 2),
                                    tensor_kind(DV, true), i > 1 || k > 0);
        };
        here(0);
        for (u32 t = 0; t < tiles; ++t) {
            scores(t, 0);
            tensor_commit(meet.scored + t);
        }
        done_with(0);
        // These values, and the next keys: scores take the place of weights, which are behind them in line.
        for (u32 i = 1; i < items; i += 2) {
            here(i);
            if (i + 1 < items) here(i + 1);
            for (u32 t = 0; t < tiles; ++t) {
                wait(meet.weighed + t, i / 2);
                tensor_fence_after();
                sums(t, i);
                if (i + 1 < items) scores(t, i + 1);
                tensor_commit(meet.scored + t);
            }
            done_with(i);
            done_with(i + 1);
        }
    };

    const u32 m = threadIdx.x;  // a query, if this thread has one
    const bool has = own_tile < tiles;
    float base = MINUS_INFINITY, total = 0.0f;  // weights are two to the scaled score less `base`
    auto to_weights = [&] {
        const u32 at = part.tile.position + m / a.pack;
        const u32 own_scores = tensor_lanes(scores_at(own_tile)), own_sums = tensor_lanes(sums_at(own_tile));
        for (u32 j = from; j < to; ++j) {
            wait(meet.scored + own_tile, j - from);
            tensor_fence_after();
            const u32 first = j * KEYS;
            // Whether a mask passes through them, for any of the warp.
            const bool cut = lane_ballot(hidden(a, at, first) || hidden(a, at, first + KEYS - 1));
            // 64 at a time, since registers do not hold all of them: first for the largest.
            auto scores = [&](float (&s)[2][32], u32 c) {
                tensor_load(s, own_scores + c);
                tensor_loaded(s);
                if (!cut) return;
#pragma unroll
                for (int i = 0; i < 64; ++i)
                    if (hidden(a, at, first + c + i)) s[i / 32][i % 32] = MINUS_INFINITY;
            };
            float most[2] = {MINUS_INFINITY, MINUS_INFINITY}, sum = 0.0f;
#pragma unroll
            for (int c = 0; c < KEYS; c += 64) {
                float s[2][32];
                scores(s, c);
#pragma unroll
                for (int i = 0; i < 64; ++i) most[i % 2] = fmaxf(most[i % 2], s[i / 32][i % 32]);
            }
            const float peak = fmaxf(most[0], most[1]) * part.scale;
            const bool grows = peak > base + GROWTH_MAX;
            const float keep = grows ? power_of_two(base - peak) : 1.0f;
            if (grows) base = peak;
            // A row that has seen nothing yet has weights of zero.
            const float less = base == MINUS_INFINITY ? 0.0f : base;
#pragma unroll
            for (int c = 0; c < KEYS; c += 64) {
                float s[2][32], pairs[32];
                scores(s, c);
#pragma unroll
                for (int i = 0; i < 32; ++i) {
                    float low = s[i / 16][i % 16 * 2], high = s[i / 16][i % 16 * 2 + 1];
                    low = power_of_two(low * part.scale - less), high = power_of_two(high * part.scale - less);
                    sum += low + high;
                    pairs[i] = bits_float(pair_bits(low, high));
                }
                tensor_store(own_scores + c / 2, pairs);
            }
            total = total * keep + sum;
            // The first products set the sums.
            if (j > from && lane_ballot(grows)) {
#pragma unroll
                for (int d = 0; d < DV; d += 32) {
                    float o[1][32];
                    tensor_load(o, own_sums + d);
                    tensor_loaded(o);
#pragma unroll
                    for (int i = 0; i < 32; ++i) o[0][i] *= keep;
                    tensor_store(own_sums + d, o[0]);
                }
            }
            tensor_stored();
            tensor_fence_before();
            barrier_arrive(meet.weighed + own_tile);
        }
        wait(meet.scored + own_tile, to - from);
        tensor_fence_after();
    };

    auto answer = [&] {
        const float factor = meet.lost ? bits_float(0x7fffffffu) : 1.0f / with_sink(a, part, m, total, base);
        bf16* out = answer_of(a, part, m);
#pragma unroll
        for (int d = 0; d < DV; d += 32) {
            float o[1][32];
            tensor_load(o, tensor_lanes(sums_at(own_tile)) + d);
            tensor_loaded(o);
#pragma unroll
            for (int i = 0; i < 32; i += 8) {
                u32 pairs[4];
#pragma unroll
                for (int n = 0; n < 4; ++n) pairs[n] = pair_bits(o[0][i + n * 2] * factor, o[0][i + n * 2 + 1] * factor);
                if (m < part.queries && d + i < a.value_dim) store_four(out + d + i, pairs);
            }
        }
    };

    if (warp == ASKER_WARP) tensor_take(&meet.memory);
    if (threadIdx.x == 0) {
        for (u32 i = 0; i < SLOTS; ++i) barrier_make(meet.full + i, LOADERS), barrier_make(meet.empty + i, 1);
        for (u32 t = 0; t < TENSOR_TILES; ++t) barrier_make(meet.scored + t, 1), barrier_make(meet.weighed + t, TENSOR_LANES);
        barriers_made();
        meet.lost = 0;
    }
    auto query_place = [](u32 row, u32 c) { return c / TILE_COLUMNS * QUERY_TILE + swizzled(row, c % TILE_COLUMNS); };
    load_queries<DK, TENSOR_QUERIES, TENSOR_THREADS>(sq, a, part, query_place);
    copies_commit();
    copies_wait<0>();
    shared_fence();
    __syncthreads();  // queries, barriers and the address of tensor memory are there
    memory = meet.memory;

    if (has) to_weights();
    else if (warp == ASKER_WARP && elected()) ask();
    else if (threadIdx.x >= LOADERS_FIRST && warp < ASKER_WARP) bring();
    __syncthreads();  // nobody waits any more; all products are done
    if (has) answer();
    tensor_fence_before();
    __syncthreads();
    tensor_fence_after();
    if (warp == ASKER_WARP) tensor_give(memory);
#endif
}

KERNEL(attend_tensor_64, AttendArgs, 384) { attend_tensor<64, 64, 128>(a); }
KERNEL(attend_tensor_128, AttendArgs, 384) { attend_tensor<128, 128, 128>(a); }
KERNEL(attend_tensor_192, AttendArgs, 384) { attend_tensor<192, 128, 64>(a); }
