// q, k and v before they meet: angles, norms of heads, rope, K and V into the cache's pages.
#include "device.cuh"

struct AnglesArgs {
    u64 positions, inv_freq, cosines, sines;  // [rows] u32, [n] f32, [rows, n] f32 each
    u32 rows, n;
    float factor;
};

KERNEL(angles, AnglesArgs, 256) {
    u64 step = (u64)gridDim.x * blockDim.x;
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < (u64)a.rows * a.n; i += step) {
        float angle = ((const float*)a.inv_freq)[i % a.n] * (float)((const u32*)a.positions)[i / a.n];
        ((float*)a.cosines)[i] = cosf(angle) * a.factor;
        ((float*)a.sines)[i] = sinf(angle) * a.factor;
    }
}

// Where a row of the batch lies in the cache: pages of its sequence.
struct Pages {
    u64 positions, runs, tables;  // [rows] u32 position; [rows] u32 run; [runs, blocks_max] u32 page
    u32 blocks_max, block_shift;
};

__device__ __forceinline__ u64 token_of(const Pages& p, u32 run, u32 position) {
    return token_in((const u32*)p.tables + (u64)run * p.blocks_max, position, p.block_shift);
}

struct PrepareArgs {
    Pages pages;
    u64 qkv;                   // [rows, heads + 2 kv_heads, dim] T, q in place
    u64 q_norm, k_norm;        // [dim] T or 0; with `projection` [heads, dim] and [kv_heads, dim]
    u64 squares;               // [rows, heads_total + kv_heads_total] f32 where `projection`
    u64 cosines, sines;        // [rows, n] f32
    u64 k_plane, v_plane;      // [tokens, kv_heads, dim] T of this layer
    u32 heads, kv_heads, dim, n, interleaved, projection, heads_total, kv_heads_total;
    float eps;
};

// One warp a head. A head is held in shared memory as floats.
template <typename T>
__device__ void prepare(const PrepareArgs& a) {
    DYNAMIC_SHARED(float, held);
    u32 row = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    u32 all = a.heads + 2 * a.kv_heads, run = ((const u32*)a.pages.runs)[row];
    u64 token = token_of(a.pages, run, ((const u32*)a.pages.positions)[row]);
    float *x = held + warp * 2 * a.dim, *turned = x + a.dim;
    const float *cosines = (const float*)a.cosines + (u64)row * a.n, *sines = (const float*)a.sines + (u64)row * a.n;
    for (u32 head = warp; head < all; head += warps) {
        T* at = (T*)a.qkv + ((u64)row * all + head) * a.dim;
        bool is_v = head >= a.heads + a.kv_heads, is_k = !is_v && head >= a.heads;
        u32 kv_head = is_v ? head - a.heads - a.kv_heads : head - a.heads;
        if (is_v) {
            T* to = (T*)a.v_plane + (token * a.kv_heads + kv_head) * a.dim;
            for (u32 i = lane; i < a.dim; i += 32) to[i] = at[i];
            continue;
        }
        const T* weight = (const T*)(is_k ? a.k_norm : a.q_norm);
        float squares = 0.0f;
        for (u32 i = lane; i < a.dim; i += 32) {
            x[i] = up(at[i]);
            squares += x[i] * x[i];
        }
        if (weight) {
            float mean;
            if (a.projection) {
                // All heads of the projection, in order.
                const float* sums = (const float*)a.squares + (u64)row * (a.heads_total + a.kv_heads_total);
                u32 first = is_k ? a.heads_total : 0, count = is_k ? a.kv_heads_total : a.heads_total;
                mean = 0.0f;
                for (u32 i = 0; i < count; ++i) mean += sums[first + i];
                mean /= (float)(count * a.dim);
                weight += (is_k ? kv_head : head) * a.dim;
            } else {
                mean = warp_sum(squares) / (float)a.dim;
            }
            float factor = 1.0f / sqrtf(mean + a.eps);
            for (u32 i = lane; i < a.dim; i += 32)
                x[i] = up(down<T>(up(down<T>(x[i] * factor)) * up(weight[i])));
        }
        warp_sync();
        for (u32 i = lane; i < a.n; i += 32) {
            float first = a.interleaved ? x[2 * i] : x[i], second = a.interleaved ? x[2 * i + 1] : x[i + a.n];
            turned[i] = first * cosines[i] - second * sines[i];
            turned[i + a.n] = second * cosines[i] + first * sines[i];
        }
        warp_sync();
        T* to = is_k ? (T*)a.k_plane + (token * a.kv_heads + kv_head) * a.dim : at;
        for (u32 i = lane; i < a.dim; i += 32) to[i] = down<T>(i < 2 * a.n ? turned[i] : x[i]);
        warp_sync();
    }
}

KERNEL(prepare_f32, PrepareArgs, 256) { prepare<float>(a); }
KERNEL(prepare_bf16, PrepareArgs, 256) { prepare<bf16>(a); }

struct SquaresArgs {
    u64 qkv, squares;  // as in PrepareArgs
    u32 heads, kv_heads, dim, heads_total, kv_heads_total, head_first, kv_head_first, kv_own_from, kv_own_to;
};

// Square sums of this rank's heads of q and k at their places among those of the model; zeros elsewhere.
template <typename T>
__device__ void squares_by_head(const SquaresArgs& a) {
    u32 row = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    u32 places = a.heads_total + a.kv_heads_total;
    float* out = (float*)a.squares + (u64)row * places;
    for (u32 i = threadIdx.x; i < places; i += blockDim.x) out[i] = 0.0f;
    __syncthreads();
    for (u32 head = warp; head < a.heads + a.kv_heads; head += warps) {
        const T* x = (const T*)a.qkv + ((u64)row * (a.heads + 2 * a.kv_heads) + head) * a.dim;
        float sum = 0.0f;
        for (u32 i = lane; i < a.dim; i += 32) sum += up(x[i]) * up(x[i]);
        sum = warp_sum(sum);
        u32 kv = head - a.heads;
        bool mine = head < a.heads || (kv >= a.kv_own_from && kv < a.kv_own_to);
        u32 place = head < a.heads ? a.head_first + head : a.heads_total + a.kv_head_first + kv;
        if (lane == 0 && mine) out[place] = sum;
    }
}

KERNEL(squares_f32, SquaresArgs, 256) { squares_by_head<float>(a); }
KERNEL(squares_bf16, SquaresArgs, 256) { squares_by_head<bf16>(a); }

struct PrepareLatentArgs {
    Pages pages;
    u64 q, kv;                    // [rows, heads, nope | rope] T in place; [rows, latent | rope] T
    u64 norm;                     // [latent] T
    u64 cosines, sines;           // [rows, rope / 2] f32
    u64 latent_plane, rope_plane; // [tokens, latent] T, [tokens, rope] T of this layer
    u32 heads, nope, rope, latent, interleaved;
    float eps;
};

// The latent's norm, rope of key and queries, latent and rope key into the cache. One block a row.
template <typename T>
__device__ void prepare_latent(const PrepareLatentArgs& a) {
    DYNAMIC_SHARED(float, held);
    u32 row = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    u64 token = token_of(a.pages, ((const u32*)a.pages.runs)[row], ((const u32*)a.pages.positions)[row]);
    const T* kv = (const T*)a.kv + (u64)row * (a.latent + a.rope);
    const T* weight = (const T*)a.norm;
    float squares = 0.0f;
    for (u32 i = threadIdx.x; i < a.latent; i += blockDim.x) squares += up(kv[i]) * up(kv[i]);
    float factor = 1.0f / sqrtf(block_sum(squares) / (float)a.latent + a.eps);
    T* to = (T*)a.latent_plane + token * a.latent;
    for (u32 i = threadIdx.x; i < a.latent; i += blockDim.x)
        to[i] = down<T>(up(down<T>(up(kv[i]) * factor)) * up(weight[i]));
    u32 n = a.rope / 2;
    const float *cosines = (const float*)a.cosines + (u64)row * n, *sines = (const float*)a.sines + (u64)row * n;
    float* x = held + warp * a.rope;
    // Part 0 is the key, the others are the heads of q.
    for (u32 part = warp; part < a.heads + 1; part += warps) {
        T* q = (T*)a.q + ((u64)row * a.heads + part - 1) * (a.nope + a.rope) + a.nope;
        const T* from = part == 0 ? kv + a.latent : q;
        T* out = part == 0 ? (T*)a.rope_plane + token * a.rope : q;
        for (u32 i = lane; i < a.rope; i += 32) x[i] = up(from[i]);
        warp_sync();
        for (u32 i = lane; i < n; i += 32) {
            float first = a.interleaved ? x[2 * i] : x[i], second = a.interleaved ? x[2 * i + 1] : x[i + n];
            out[i] = down<T>(first * cosines[i] - second * sines[i]);
            out[i + n] = down<T>(second * cosines[i] + first * sines[i]);
        }
        warp_sync();
    }
}

KERNEL(prepare_latent_f32, PrepareLatentArgs, 256) { prepare_latent<float>(a); }
KERNEL(prepare_latent_bf16, PrepareLatentArgs, 256) { prepare_latent<bf16>(a); }
