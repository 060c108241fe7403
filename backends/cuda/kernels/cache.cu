// Between pages of the cache and dense rows: what leaves, what lands, and keys and values made from latents.
#include "device.cuh"

struct MoveArgs {
    u64 pages, dense, table;  // [tokens, width] bytes; [count, width] bytes; [blocks] u32 page
    u32 width;                // bytes of a token's row, a multiple of 2
    u32 first, count, block_tokens, out;  // positions [first, first + count); out: pages to dense
};

// One block a token.
KERNEL(move_rows, MoveArgs) {
    u32 position = a.first + blockIdx.x;
    u64 token = (u64)((const u32*)a.table)[position / a.block_tokens] * a.block_tokens + position % a.block_tokens;
    u16 *page = (u16*)(a.pages + token * a.width), *dense = (u16*)(a.dense + (u64)blockIdx.x * a.width);
    for (u32 i = threadIdx.x; i < a.width / 2; i += blockDim.x)
        if (a.out) dense[i] = page[i];
        else page[i] = dense[i];
}

struct ExpandArgs {
    u64 nope, rope, out;  // [tokens, heads, nope] T, [tokens, rope] T, [tokens, heads, nope | rope] T
    u32 heads, nope_dim, rope_dim;
};

// Keys of all heads; one block a token.
template <typename T>
__device__ void expand_keys(const ExpandArgs& a) {
    u32 width = a.nope_dim + a.rope_dim;
    const T* nope = (const T*)a.nope + (u64)blockIdx.x * a.heads * a.nope_dim;
    const T* rope = (const T*)a.rope + (u64)blockIdx.x * a.rope_dim;
    T* out = (T*)a.out + (u64)blockIdx.x * a.heads * width;
    for (u32 i = threadIdx.x; i < a.heads * width; i += blockDim.x) {
        u32 head = i / width, d = i % width;
        out[i] = d < a.nope_dim ? nope[head * a.nope_dim + d] : rope[d - a.nope_dim];
    }
}

KERNEL(expand_keys_f32, ExpandArgs) { expand_keys<float>(a); }
KERNEL(expand_keys_bf16, ExpandArgs) { expand_keys<bf16>(a); }
