// Between pages of the cache and dense rows: what leaves, what lands, and keys and values made from latents.
#include "device.cuh"

struct MoveArgs {
    u64 pages, dense, table;  // [tokens, pitch] bytes; [count, width] bytes; [blocks] u32 page
    u32 pitch, width;         // bytes of a token's row and of what is moved of it, multiples of 2
    u32 first, count, block_shift, out;  // positions [first, first + count); out: pages to dense
};

// One block a token. `dense` may be memory of the host.
KERNEL(move_rows, MoveArgs, 256) {
    u32 position = a.first + blockIdx.x;
    u64 token = token_in((const u32*)a.table, position, a.block_shift);
    u64 here = a.pages + token * a.pitch, there = a.dense + (u64)blockIdx.x * a.width;
    u64 from = a.out ? here : there, to = a.out ? there : here;
    if ((from | to | a.width) % 16 == 0) {
        for (u32 i = threadIdx.x * 16; i < a.width; i += blockDim.x * 16) {
            u32 words[4];
            load_four(words, (const void*)(from + i));
            store_four((void*)(to + i), words);
        }
        return;
    }
    for (u32 i = threadIdx.x; i < a.width / 2; i += blockDim.x) ((u16*)to)[i] = ((const u16*)from)[i];
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

KERNEL(expand_keys_f32, ExpandArgs, 256) { expand_keys<float>(a); }
KERNEL(expand_keys_bf16, ExpandArgs, 256) { expand_keys<bf16>(a); }
