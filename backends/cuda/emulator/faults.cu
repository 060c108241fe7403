// Kernels that do what a GPU would punish or, worse, would not: the checks must see each of them. See src/emulator.rs.
#include "../kernels/groups.cuh"

struct FaultArgs {
    u64 at;  // [64] u32
    u32 wrong;
};

KERNEL(fault_race, FaultArgs, 64) {
    __shared__ u32 x[64];
    x[threadIdx.x] = 0;
    __syncthreads();
    x[threadIdx.x] = threadIdx.x;
    if (!a.wrong) __syncthreads();
    ((u32*)a.at)[threadIdx.x] = x[63 - threadIdx.x];
}

KERNEL(fault_race_back, FaultArgs, 64) {
    __shared__ u32 x[64];
    x[threadIdx.x] = threadIdx.x;
    __syncthreads();
    u32 other = x[63 - threadIdx.x];
    if (!a.wrong) __syncthreads();
    x[threadIdx.x] = other;
    ((u32*)a.at)[threadIdx.x] = other;
}

KERNEL(fault_warp, FaultArgs, 64) {
    __shared__ u32 x[64];
    x[threadIdx.x] = 0;
    __syncthreads();
    x[threadIdx.x] = threadIdx.x;
    if (!a.wrong) warp_sync();
    ((u32*)a.at)[threadIdx.x] = x[threadIdx.x ^ 1];
}

// Several lanes have read before the barrier, one (or several) after it.
KERNEL(fault_warp_back, FaultArgs, 64) {
    __shared__ u32 x[64];
    x[threadIdx.x] = threadIdx.x;
    warp_sync();
    u32 other = x[threadIdx.x ^ 1];
    warp_sync();
    x[threadIdx.x] = other;
    if (a.wrong) warp_sync();
    other = x[threadIdx.x ^ a.wrong];
    x[threadIdx.x] = other + 1;
    ((u32*)a.at)[threadIdx.x] = other;
}

KERNEL(fault_outside, FaultArgs, 64) {
    ((u32*)a.at)[threadIdx.x + a.wrong] = 0;
}

KERNEL(fault_misaligned, FaultArgs, 64) {
    if (threadIdx.x == 0) *(u32*)(a.at + 2 * a.wrong) = 0;
}

KERNEL(fault_unwritten, FaultArgs, 64) {
    __shared__ u32 x[64];
    if (!a.wrong) x[threadIdx.x] = 0;
    ((u32*)a.at)[threadIdx.x] = x[threadIdx.x];
}

KERNEL(fault_copy, FaultArgs, 64) {
    DYNAMIC_SHARED(u32, x);
    if (threadIdx.x % 4 == 0) copy_async(x + threadIdx.x, (u32*)a.at + threadIdx.x, true);
    copies_commit();
    if (a.wrong) copies_wait<1>();
    else copies_wait<0>();
    __syncthreads();
    ((u32*)a.at)[threadIdx.x] = x[threadIdx.x];
}

KERNEL(fault_blocks, FaultArgs, 64) {
    ((u32*)a.at)[a.wrong ? 0 : blockIdx.x] = 1;
}

KERNEL(fault_barrier, FaultArgs, 64) {
    if (a.wrong && threadIdx.x == 0) warp_sync();
    __syncthreads();
    ((u32*)a.at)[threadIdx.x] = 0;
}

// One tile of 64 x 64 by itself; each `wrong` leaves one thing out.
template <typename Wrong>
__device__ void products(const FaultArgs& a, Wrong wrong) {
    DYNAMIC_SHARED(bf16, x);
    for (u32 i = threadIdx.x; i < 64 * 64; i += 128) x[i].bits = 0;
    if (!wrong(0)) shared_fence();
    __syncthreads();
    float d[8][4];
    if (!wrong(1)) group_fence();
    group_product(d, tile_address(x), tile_address(x), false);
    group_commit();
    if (wrong(2) && threadIdx.x == 5) x[0].bits = 0;
    group_wait<0>();
    if (threadIdx.x < 64) ((u32*)a.at)[threadIdx.x] = float_bits(d[0][0]);
}

KERNEL(fault_unfenced, FaultArgs, 128) { products(a, [&](u32 what) { return a.wrong && what == 0; }); }
KERNEL(fault_registers, FaultArgs, 128) { products(a, [&](u32 what) { return a.wrong && what == 1; }); }
KERNEL(fault_operand, FaultArgs, 128) { products(a, [&](u32 what) { return a.wrong && what == 2; }); }

KERNEL(fault_add, FaultArgs, 64) {
    __shared__ u64 sum;
    if (threadIdx.x == 0) sum = 0;
    __syncthreads();
    shared_add(&sum, threadIdx.x);
    if (!a.wrong) __syncthreads();
    ((u32*)a.at)[threadIdx.x] = (u32)sum;
}
