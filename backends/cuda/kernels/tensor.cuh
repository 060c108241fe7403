// Products of the tensor cores of data-centre Blackwell (tcgen05). One thread asks for them, and they run by themselves, one after
// the other, on tiles in shared memory as Hopper has them (groups.cuh) and on tensor memory: 128 lanes x 512 columns of 32 bits
// beside the registers, of which warp w reaches lanes [32 (w % 4), + 32). Who needs what they gave waits at a barrier in shared memory.
#pragma once
#include "groups.cuh"

const u32 TENSOR_LANES = 128, TENSOR_COLUMNS = 512;

// The tensor memory of the warp's lanes, where `memory` begins at lane 0.
__device__ __forceinline__ u32 tensor_lanes(u32 memory) {
    return memory + (threadIdx.x / 32 % 4 * 32 << 16);
}

// A tile in shared memory for the tensor cores: Hopper's, and the number of this version.
__device__ __forceinline__ u64 tensor_tile(const bf16* at, u32 leading = 16) {
    return tile_address(at, leading) | 1ull << 46;
}

// Which products: sums in f32 of 128 rows of bf16 and `columns` of bf16. `turned`: these have a row for each input.
__device__ __forceinline__ constexpr u32 tensor_kind(u32 columns, bool turned) {
    return 1 << 4 | 1 << 7 | 1 << 10 | (u32)turned << 16 | columns / 8 << 17 | TENSOR_LANES / 16 << 24;
}

#ifndef BATON_EMULATED
// Whether this code is for Blackwell of data centres (sm_100f), whose instructions these are.
#if defined(__CUDA_ARCH_FAMILY_SPECIFIC__) && __CUDA_ARCH_FAMILY_SPECIFIC__ == 1000
#define TENSOR_MEMORY 1
#define TENSOR_ASM(...) asm volatile(__VA_ARGS__)
#else
#define TENSOR_MEMORY 0
#define TENSOR_ASM(...) do { } while (0)
#endif

// Whether this is the one thread of its warp, all of which asks, that asks for products.
__device__ __forceinline__ bool elected() {
    u32 is = 0;
    TENSOR_ASM("{.reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p;}" : "=r"(is));
    return is;
}

// All tensor memory, for a block of which a processor holds one; a warp asks. Its address is at `at` behind the next barrier.
__device__ __forceinline__ void tensor_take(u32* at) {
    TENSOR_ASM("tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%0], %1;" ::"r"(shared_address(at)), "n"(TENSOR_COLUMNS) : "memory");
    TENSOR_ASM("tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;");
}

// Gives it back, before the block ends; the same warp.
__device__ __forceinline__ void tensor_give(u32 memory) {
    TENSOR_ASM("tcgen05.dealloc.cta_group::1.sync.aligned.b32 %0, %1;" ::"r"(memory), "n"(TENSOR_COLUMNS));
}

// d = x w (+ d where `adds`), 16 inputs; d in tensor memory, a row a lane, and x and w in shared memory, a row for each of d's rows
// and columns.
__device__ __forceinline__ void tensor_product(u32 d, u64 x, u64 w, u32 kind, bool adds) {
    TENSOR_ASM("{.reg .pred p; setp.ne.b32 p, %4, 0; tcgen05.mma.cta_group::1.kind::f16 [%0], %1, %2, %3, p;}" ::"r"(d), "l"(x), "l"(w),
               "r"(kind), "r"((u32)adds)
               : "memory");
}

// The same with x in tensor memory: two inputs a column.
__device__ __forceinline__ void tensor_product_held(u32 d, u32 x, u64 w, u32 kind, bool adds) {
    TENSOR_ASM("{.reg .pred p; setp.ne.b32 p, %4, 0; tcgen05.mma.cta_group::1.kind::f16 [%0], [%1], %2, %3, p;}" ::"r"(d), "r"(x), "l"(w),
               "r"(kind), "r"((u32)adds)
               : "memory");
}

// Arrives at a barrier once all products that this thread has asked for are done.
__device__ __forceinline__ void tensor_commit(u64* barrier) {
    TENSOR_ASM("tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// What this thread has done to tensor memory is done before what follows the barrier it arrives at next, or waits for with its block.
__device__ __forceinline__ void tensor_fence_before() {
    TENSOR_ASM("tcgen05.fence::before_thread_sync;" ::: "memory");
}

// What was done to tensor memory before a barrier that this thread has passed is done before what it does to it next.
__device__ __forceinline__ void tensor_fence_after() {
    TENSOR_ASM("tcgen05.fence::after_thread_sync;" ::: "memory");
}

#define EIGHT(c, r, n) c(r[n]), c(r[n + 1]), c(r[n + 2]), c(r[n + 3]), c(r[n + 4]), c(r[n + 5]), c(r[n + 6]), c(r[n + 7])
#define ALL_32(c, r) EIGHT(c, r, 0), EIGHT(c, r, 8), EIGHT(c, r, 16), EIGHT(c, r, 24)

// Begins to read the columns from `at` on of the warp's lanes, a lane a thread; `tensor_loaded` ends it.
template <int N>
__device__ __forceinline__ void tensor_load(float (&r)[N][32], u32 at) {
#pragma unroll
    for (int n = 0; n < N; ++n)
        TENSOR_ASM("tcgen05.ld.sync.aligned.32x32b.x32.b32 {" NUMBERS_32 "}, [%32];" : ALL_32("=f", r[n]) : "r"(at + n * 32));
}

// The compiler knows nothing of loads that run by themselves: their registers are looked at behind the wait.
template <int N>
__device__ __forceinline__ void tensor_loaded(float (&r)[N][32]) {
    TENSOR_ASM("tcgen05.wait::ld.sync.aligned;" ::: "memory");
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
        for (int i = 0; i < 32; ++i) TENSOR_ASM("" : "+f"(r[n][i])::"memory");
}

// Begins to write 32 columns; `tensor_stored` waits for all that were begun.
__device__ __forceinline__ void tensor_store(u32 at, const float (&r)[32]) {
    TENSOR_ASM("tcgen05.st.sync.aligned.32x32b.x32.b32 [%32], {" NUMBERS_32 "};" ::ALL_32("f", r), "r"(at) : "memory");
}

__device__ __forceinline__ void tensor_stored() {
    TENSOR_ASM("tcgen05.wait::st.sync.aligned;" ::: "memory");
}

// A barrier for so many arrivals a phase; one thread makes all of them, and `barriers_made` shows them to the others and to products
// behind the next barrier of the block.
__device__ __forceinline__ void barrier_make(u64* at, u32 arrivals) {
    TENSOR_ASM("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(at)), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void barriers_made() {
    TENSOR_ASM("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(u64* at) {
    TENSOR_ASM("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(shared_address(at)) : "memory");
}

const u64 PATIENCE_NS = 2000000000;

// Waits for the end of a phase: the first has parity 0, the next 1, and so on. False after PATIENCE_NS: whoever waits for what never
// comes must not hold the GPU for ever.
__device__ __forceinline__ bool barrier_wait(u64* at, u32 parity) {
    u64 began = 0;
    for (;;) {
        u32 passed = 1;
        TENSOR_ASM("{.reg .pred p; mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                   : "=r"(passed)
                   : "r"(shared_address(at)), "r"(parity)
                   : "memory");
        if (passed) return true;
        u64 now = 0;
        TENSOR_ASM("mov.u64 %0, %%globaltimer;" : "=l"(now));
        if (!began) began = now;
        else if (now - began > PATIENCE_NS) return false;
    }
}
#else
#define TENSOR_MEMORY 1
#endif
