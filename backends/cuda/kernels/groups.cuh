// Products of warp groups, 4 warps together, as Hopper has them (wgmma): they run by themselves, on operands in shared memory,
// until somebody waits. A tile in shared memory is columns [64] x rows: 128 bytes a row, whose pieces of 16 bytes are permuted
// by row, so that no two of 8 rows lie in the same banks.
#pragma once
#include "device.cuh"

const int SWIZZLE_ROWS = 8, TILE_COLUMNS = 64;

// The place of columns [c, c + 8) of a row; `c` a multiple of 8. The tile begins at a multiple of 1,024 bytes.
__device__ __forceinline__ u32 swizzled(u32 row, u32 c) {
    return row * TILE_COLUMNS + (c ^ row % SWIZZLE_ROWS * 8);
}

// A tile in shared memory for the tensor cores. `leading`: bytes to the next 64 columns of an operand that is turned; others have
// their 16 inputs in one row, and it says nothing.
__device__ __forceinline__ u64 tile_address(const bf16* at, u32 leading = 16) {
    const u64 stride = SWIZZLE_ROWS * TILE_COLUMNS * 2, by_128_bytes = 1;
    return (u64)((shared_address(at) & 0x3ffff) >> 4) | (u64)(leading >> 4) << 16 | stride >> 4 << 32 | by_128_bytes << 62;
}

#ifndef BATON_EMULATED
// Whether this code is for Hopper, whose instructions these are.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define WARP_GROUPS 1
#define GROUP_ASM(...) asm volatile(__VA_ARGS__)
#else
#define WARP_GROUPS 0
#define GROUP_ASM(...) do { } while (0)
#endif

// What this thread has written to shared memory is there for products that begin behind the next barrier. Hopper and later.
__device__ __forceinline__ void shared_fence() {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Before products whose registers something else has touched.
__device__ __forceinline__ void group_fence() {
    GROUP_ASM("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void group_commit() {
    GROUP_ASM("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most `LEFT` groups of products are under way.
template <int LEFT>
__device__ __forceinline__ void group_wait() {
    GROUP_ASM("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

// The compiler knows nothing of products that run by themselves: what they take is ready before their fence, and what they
// gave is looked at behind the wait.
template <int NT>
__device__ __forceinline__ void settle(float (&d)[NT][4]) {
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(d[n][i])::"memory");
}

template <int NT>
__device__ __forceinline__ void settle(u32 (&x)[NT][4]) {
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(x[n][i])::"memory");
}

#define FOUR(d) "+f"((d)[0]), "+f"((d)[1]), "+f"((d)[2]), "+f"((d)[3])
#define EIGHT_FOURS(d, n) \
    FOUR(d[n]), FOUR(d[n + 1]), FOUR(d[n + 2]), FOUR(d[n + 3]), FOUR(d[n + 4]), FOUR(d[n + 5]), FOUR(d[n + 6]), FOUR(d[n + 7])
#define NUMBERS_32 \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define NUMBERS_64 \
    NUMBERS_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"

// d = x w (+ d where `adds`) for 64 rows of x and NT * 8 columns, 16 inputs; a thread has of d and x what it has in
// mma.m16n8k16, its warp being one of four. x is in shared memory, as is w with a row for each of its columns.
__device__ __forceinline__ void group_product(float (&d)[8][4], u64 x, u64 w, bool adds) {
    GROUP_ASM("{.reg .pred p; setp.ne.b32 p, %34, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" NUMBERS_32
              "}, %32, %33, p, 1, 1, 0, 0;}"
              : EIGHT_FOURS(d, 0)
              : "l"(x), "l"(w), "r"((u32)adds));
}

__device__ __forceinline__ void group_product(float (&d)[16][4], u64 x, u64 w, bool adds) {
    GROUP_ASM("{.reg .pred p; setp.ne.b32 p, %66, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" NUMBERS_64
              "}, %64, %65, p, 1, 1, 0, 0;}"
              : EIGHT_FOURS(d, 0), EIGHT_FOURS(d, 8)
              : "l"(x), "l"(w), "r"((u32)adds));
}

// d += x w, with x in registers, which nobody touches until the product is waited for. w has a row for each input (turned).
__device__ __forceinline__ void group_product_turned(float (&d)[8][4], const u32 (&x)[4], u64 w) {
    GROUP_ASM("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" NUMBERS_32 "}, {%32,%33,%34,%35}, %36, 1, 1, 1, 1;"
              : EIGHT_FOURS(d, 0)
              : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "l"(w));
}

__device__ __forceinline__ void group_product_turned(float (&d)[16][4], const u32 (&x)[4], u64 w) {
    GROUP_ASM("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" NUMBERS_64 "}, {%64,%65,%66,%67}, %68, 1, 1, 1, 1;"
              : EIGHT_FOURS(d, 0), EIGHT_FOURS(d, 8)
              : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "l"(w));
}
#else
#define WARP_GROUPS 1
#endif
