// x W^T by the products of warp groups, on Hopper: what `product_many` (product.cu) is for GPUs of every generation. For experts
// with many rows each, quantised weights, and biases; other products are cuBLASLt's.
#include "product.cuh"
#include "groups.cuh"

// How weights lie: as numbers, as words of codes (`in_words` in src/product.rs), as codes of any format.
enum Weights { PLAIN, WORDS, CODES };

template <Weights KIND>
__device__ __forceinline__ void product_group(const ProductArgs& a) {
#if WARP_GROUPS
    // A block: 128 x 128 outputs by two warp groups of 64 rows, three stages of 64 inputs; two blocks fit a processor.
    const int ROWS = 128, OUTPUTS = 128, INPUTS = TILE_COLUMNS, STAGES = 3, THREADS = 256;
    const int X_TILE = ROWS * INPUTS, STAGE = X_TILE + OUTPUTS * INPUTS;
    // 16 bytes of a stage's operand that a thread brings, in lines so far apart.
    const int LINES = THREADS / (INPUTS / 8), PIECES = ROWS / LINES;
    DYNAMIC_SHARED(bf16, shared);
    const RowTile tile = tile_of(a, ROWS);
    if (tile.count == 0) return;  // the same for all threads
    const u32 n_first = blockIdx.x * OUTPUTS, line = threadIdx.x / (INPUTS / 8), c = threadIdx.x % (INPUTS / 8) * 8;
    const u32 steps = (a.k + INPUTS - 1) / INPUTS;
    const Quant quant = quant_of(a, tile.expert);
    const bf16* w = (const bf16*)a.w + (u64)tile.expert * a.n * a.k;
    u32 rows[PIECES];
#pragma unroll
    for (int i = 0; i < PIECES; ++i) {
        const u32 m = line + i * LINES;
        rows[i] = row_of(a, tile.first + (m < tile.count ? m : 0));
    }
    // Codes are read a step before they become numbers, so that nobody waits for memory in between.
    Eight ahead[PIECES];
    auto fetch = [&](u32 step) {
        const u32 k = step * INPUTS + c;
#pragma unroll
        for (int i = 0; i < PIECES; ++i) {
            const u32 n = n_first + line + i * LINES;
            const Eight none = {{0, 0}, 0.0f, 0.0f};
            ahead[i] = k < a.k && n < a.n ? fetch8(quant, n, k) : none;
        }
    };
    auto load = [&](u32 step) {
        bf16 *sx = shared + step % STAGES * STAGE, *sw = sx + X_TILE;
        const u32 k = step * INPUTS + c;
        const bool inside = k < a.k;
#pragma unroll
        for (int i = 0; i < PIECES; ++i) {
            const u32 m = line + i * LINES;
            copy_async(sx + swizzled(m, c), (const bf16*)a.x + (u64)rows[i] * a.k + (inside ? k : 0), inside && m < tile.count);
        }
        auto put_eight = [&](bf16* to, const float(&y)[8]) {
            u32 pairs[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) pairs[j] = pair_bits(y[2 * j], y[2 * j + 1]);
            store_four_shared(to, pairs);
        };
        if constexpr (KIND == CODES) {
            // One after the other: there are many ways to decode.
#pragma unroll 1
            for (int i = 0; i < PIECES; ++i) {
                const u32 n = line + i * LINES;
                float y[8] = {0, 0, 0, 0, 0, 0, 0, 0};
                if (inside && n_first + n < a.n) decode8(quant, n_first + n, only_here(k), y);
                put_eight(sw + swizzled(n, c), y);
            }
        } else {
#pragma unroll
            for (int i = 0; i < PIECES; ++i) {
                const u32 n = line + i * LINES;
                const bool there = inside && n_first + n < a.n;
                bf16* to = sw + swizzled(n, c);
                if constexpr (KIND == PLAIN) {
                    copy_async(to, w + (u64)(there ? n_first + n : 0) * a.k + (there ? k : 0), there);
                } else {
                    float y[8];
                    expand8(quant, ahead[i], y);
                    put_eight(to, y);
                }
            }
        }
    };

    float acc[1][OUTPUTS / 8][4];
    clear(acc);
    if (KIND == WORDS) fetch(0);
    for (u32 step = 0; step < STAGES - 1; ++step) {
        if (step < steps) load(step);
        copies_commit();
        if (KIND == WORDS) fetch(step + 1);
    }
    for (u32 step = 0; step < steps; ++step) {
        copies_wait<STAGES - 2>();
        shared_fence();
        __syncthreads();  // this stage is there, and that of the last products is no longer read
        const bf16 *sx = shared + step % STAGES * STAGE, *sw = sx + X_TILE, *own = sx + threadIdx.x / 128 * 64 * INPUTS;
        settle(acc[0]);
        group_fence();
#pragma unroll
        for (int k = 0; k < INPUTS; k += 16) group_product(acc[0], tile_address(own + k), tile_address(sw + k), true);
        group_commit();
        // Meanwhile what comes after the next.
        if (step + STAGES - 1 < steps) load(step + STAGES - 1);
        copies_commit();
        if (KIND == WORDS) fetch(step + STAGES);
        group_wait<0>();
        settle(acc[0]);
    }
    copies_wait<0>();
    put_tiles(a, tile, threadIdx.x / 32 * 16, n_first, acc);
#endif
}

KERNEL(product_group_plain, ProductArgs, 256, 2) { product_group<PLAIN>(a); }
KERNEL(product_group_words, ProductArgs, 256, 2) { product_group<WORDS>(a); }
KERNEL(product_group_codes, ProductArgs, 256, 2) { product_group<CODES>(a); }
