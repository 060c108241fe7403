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
// One argument, a struct: the host passes bytes.
#define KERNEL(name, Args) extern "C" __global__ void name(const Args a)
#define DYNAMIC_SHARED(type, name)                       \
    extern __shared__ __align__(128) u8 dynamic_shared[]; \
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

__device__ __forceinline__ void warp_sync() {
    __syncwarp();
}

// d += a b for a tile of 16 x 8 outputs and 16 inputs; fragments as PTX defines them for mma.m16n8k16.
__device__ __forceinline__ void tile_product(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8 x 8 matrices of 16-bit elements; lane l names row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(u32 (&r)[4], const bf16* row) {
    u32 at = (u32)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at));
}

// The same, each matrix turned.
__device__ __forceinline__ void load_matrices_turned(u32 (&r)[4], const bf16* row) {
    u32 at = (u32)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3},[%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at));
}

// 16 bytes from global to shared memory; zeros when `there` is false.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool there) {
    u32 at = (u32)__cvta_generic_to_shared(to);
    int bytes = there ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(bytes));
}

__device__ __forceinline__ void copies_commit() {
    asm volatile("cp.async.commit_group;");
}

// Waits until at most `LEFT` groups of copies are under way.
template <int LEFT>
__device__ __forceinline__ void copies_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT));
}

__device__ __forceinline__ u32 float_bits(float x) {
    return __float_as_uint(x);
}

__device__ __forceinline__ float bits_float(u32 x) {
    return __uint_as_float(x);
}
#endif

#define MINUS_INFINITY bits_float(0xff800000u)

__device__ __forceinline__ float up(float x) {
    return x;
}

__device__ __forceinline__ float up(bf16 x) {
    return bits_float((u32)x.bits << 16);
}

__device__ __forceinline__ u16 bf16_bits(float x) {
    u32 bits = float_bits(x);
    // To nearest even; not-a-number stays one.
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (u16)(bits >> 16 | 64);
    return (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

template <typename T>
__device__ __forceinline__ T down(float x);

template <>
__device__ __forceinline__ float down<float>(float x) {
    return x;
}

template <>
__device__ __forceinline__ bf16 down<bf16>(float x) {
    bf16 y;
    y.bits = bf16_bits(x);
    return y;
}

__device__ __forceinline__ u32 pair_bits(float low, float high) {
    return (u32)bf16_bits(low) | (u32)bf16_bits(high) << 16;
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
