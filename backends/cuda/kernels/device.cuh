// What all kernels share: number types, warp sums, the tensor-core tile, asynchronous copies. No header of the CUDA
// toolkit is included, so a machine needs NVRTC alone. With BATON_EMULATED the same kernels are compiled as C++ for the
// host (emulator/emulated.h), which is how they are tested where there is no GPU.
#pragma once

typedef unsigned char u8;
typedef signed char i8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct bf16 {
    u16 bits;
};

#ifdef BATON_EMULATED
#include "emulated.h"
#else
// One argument, a struct: the host passes bytes. Then the most threads of a block, and blocks that a processor is to hold, so that
// registers suffice for them.
#define KERNEL(name, Args, ...) extern "C" __global__ void __launch_bounds__(__VA_ARGS__) name(const __grid_constant__ Args a)
#define DYNAMIC_SHARED(type, name)                       \
    extern __shared__ __align__(1024) u8 dynamic_shared[]; \
    type* name = (type*)dynamic_shared

__device__ __forceinline__ float half_to_float(u16 bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}

template <typename T>
__device__ __forceinline__ T lane_xor(T x, int mask) {
    return __shfl_xor_sync(0xffffffffu, x, mask);
}

template <typename T>
__device__ __forceinline__ T lane_get(T x, int lane) {
    return __shfl_sync(0xffffffffu, x, lane);
}

__device__ __forceinline__ u32 lane_ballot(bool x) {
    return __ballot_sync(0xffffffffu, x);
}

// The lanes whose `x` is this lane's.
__device__ __forceinline__ u32 lane_same(u32 x) {
    return __match_any_sync(0xffffffffu, x);
}

__device__ __forceinline__ void warp_sync() {
    __syncwarp();
}

// To a word of shared memory that several threads add to between two barriers of the block.
__device__ __forceinline__ void shared_add(u64* at, u64 x) {
    atomicAdd(at, x);
}

// A place in shared memory as the processor numbers it.
__device__ __forceinline__ u32 shared_address(const void* at) {
    return (u32)__cvta_generic_to_shared(at);
}

// d += a b for a tile of 16 x 8 outputs and 16 inputs; fragments as PTX defines them for mma.m16n8k16.
__device__ __forceinline__ void tile_product(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The same for 32 inputs of 8 bits (E4M3); a fragment has the bytes where that of mma.m16n8k16 has them. Ada and later.
__device__ __forceinline__ void tile_product_fp8(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
#if __CUDA_ARCH__ >= 890
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// Two E4M3 codes in the low half of a word, each rounded to nearest even, at most 448. Ada and later.
__device__ __forceinline__ u32 pair_fp8(float low, float high) {
    u16 pair = 0;
#if __CUDA_ARCH__ >= 890
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
#endif
    return pair;
}

// Four 8 x 8 matrices of 16-bit elements; lane l names row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(u32 (&r)[4], const bf16* row) {
    u32 at = shared_address(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
}

// The same, each matrix turned.
__device__ __forceinline__ void load_matrices_turned(u32 (&r)[4], const bf16* row) {
    u32 at = shared_address(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3},[%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
}

// 16 bytes from global to shared memory; zeros when `there` is false.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool there) {
    u32 at = shared_address(to);
    int bytes = there ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void copies_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most `LEFT` groups of copies are under way.
template <int LEFT>
__device__ __forceinline__ void copies_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

// `x`, from which the compiler computes nothing ahead of this place: that would hold registers.
__device__ __forceinline__ u32 only_here(u32 x) {
    asm volatile("" : "+r"(x));
    return x;
}

// 2^x without subnormals: weights of a softmax.
__device__ __forceinline__ float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 16 bytes that no block of this launch writes; `at` is a multiple of 16.
__device__ __forceinline__ void load_four(u32 (&r)[4], const void* at) {
    asm("ld.global.nc.v4.u32 {%0,%1,%2,%3},[%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "l"(at));
}

__device__ __forceinline__ void store_four(void* at, const u32 (&r)[4]) {
    asm volatile("st.global.v4.u32 [%4],{%0,%1,%2,%3};" ::"r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]), "l"(at) : "memory");
}

// The same to shared memory.
__device__ __forceinline__ void store_four_shared(void* at, const u32 (&r)[4]) {
    asm volatile("st.shared.v4.u32 [%4],{%0,%1,%2,%3};" ::"r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]), "r"(shared_address(at)) : "memory");
}

// Two bf16 in a word, each rounded to nearest even.
__device__ __forceinline__ u32 pair_bits(float low, float high) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

__device__ __forceinline__ u32 float_bits(float x) {
    return __float_as_uint(x);
}

__device__ __forceinline__ float bits_float(u32 x) {
    return __uint_as_float(x);
}
#endif

#define MINUS_INFINITY bits_float(0xff800000u)

// Rows of one sequence.
struct Tile {
    u32 run, row, rows, position;  // row: the first in the batch; position: of that row
};

// The token of a position, by the pages [blocks] of its sequence.
__device__ __forceinline__ u64 token_in(const u32* pages, u32 position, u32 block_shift) {
    return ((u64)pages[position >> block_shift] << block_shift) + (position & ((1u << block_shift) - 1));
}

template <int MT, int NT>
__device__ __forceinline__ void clear(float (&d)[MT][NT][4]) {
#pragma unroll
    for (int t = 0; t < MT; ++t)
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) d[t][n][i] = 0.0f;
}

// Two tiles of 8 outputs beside each other, for MT tiles of 16 rows: d[t][n] += a[t] b[0..2], d[t][n + 1] += a[t] b[2..4].
template <int MT, int NT>
__device__ __forceinline__ void tile_products(float (&d)[MT][NT][4], int n, const u32 (&a)[MT][4], const u32 (&b)[4]) {
    u32 low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
#pragma unroll
    for (int t = 0; t < MT; ++t) {
        tile_product(d[t][n], a[t], low);
        tile_product(d[t][n + 1], a[t], high);
    }
}

__device__ __forceinline__ float up(float x) {
    return x;
}

__device__ __forceinline__ float up(bf16 x) {
    return bits_float((u32)x.bits << 16);
}

__device__ __forceinline__ void round_to(float& y, float x) {
    y = x;
}

__device__ __forceinline__ void round_to(bf16& y, float x) {
    y.bits = (u16)pair_bits(x, 0.0f);
}

template <typename T>
__device__ __forceinline__ T down(float x) {
    T y;
    round_to(y, x);
    return y;
}

// Eight elements at a multiple of 16 bytes.
__device__ __forceinline__ void load8(float (&x)[8], const float* at) {
    u32 low[4], high[4];
    load_four(low, at);
    load_four(high, at + 4);
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = bits_float(low[i]), x[i + 4] = bits_float(high[i]);
}

__device__ __forceinline__ void load8(float (&x)[8], const bf16* at) {
    u32 pairs[4];
    load_four(pairs, at);
#pragma unroll
    for (int i = 0; i < 4; ++i) x[2 * i] = bits_float(pairs[i] << 16), x[2 * i + 1] = bits_float(pairs[i] & 0xffff0000u);
}

__device__ __forceinline__ void store8(float* at, const float (&x)[8]) {
    u32 low[4], high[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) low[i] = float_bits(x[i]), high[i] = float_bits(x[i + 4]);
    store_four(at, low);
    store_four(at + 4, high);
}

__device__ __forceinline__ void store8(bf16* at, const float (&x)[8]) {
    u32 pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = pair_bits(x[2 * i], x[2 * i + 1]);
    store_four(at, pairs);
}

__device__ __forceinline__ float warp_sum(float x) {
    for (int mask = 16; mask > 0; mask /= 2) x += lane_xor(x, mask);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
    for (int mask = 16; mask > 0; mask /= 2) x = fmaxf(x, lane_xor(x, mask));
    return x;
}

// The sum over all threads of a block of at most 1,024, in every thread.
__device__ __forceinline__ float block_sum(float x) {
    __shared__ float sums[32];
    x = warp_sum(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
    __syncthreads();
    float total = threadIdx.x % 32 < blockDim.x / 32 ? sums[threadIdx.x % 32] : 0.0f;
    return warp_sum(total);
}
