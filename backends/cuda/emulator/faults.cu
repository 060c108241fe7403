// Kernels that do what a GPU would punish or, worse, would not: the checks must see each of them. See src/emulator.rs.
#include "../kernels/tensor.cuh"

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

// A product of tensor memory, and one of what it gave; `wrong`, beginning with 1, says what is left out.
KERNEL(fault_tensor, FaultArgs, 128) {
    auto right = [&](u32 what) { return a.wrong != what; };
    DYNAMIC_SHARED(bf16, x);
    __shared__ u64 done, ready;
    __shared__ u32 memory;
    const bool first = threadIdx.x < 32;
    if (first) tensor_take(&memory);
    if (threadIdx.x == 0) {
        barrier_make(&done, 1), barrier_make(&ready, 128);
        if (right(1)) barriers_made();
    }
    for (u32 i = threadIdx.x; i < 128 * 64; i += 128) x[i].bits = 0;
    if (right(2)) shared_fence();
    __syncthreads();
    const u32 own = right(3) ? tensor_lanes(memory) : memory;
    const bool asks = first && elected();
    if (asks) {
        const u32 kind = tensor_kind(right(4) ? 32 : 24, false);
        tensor_product(memory, tensor_tile(x), right(5) ? tensor_tile(x) : tile_address(x), right(6) ? kind : kind ^ 1 << 7, false);
        tensor_commit(&done);
    }
    if (right(7)) barrier_wait(&done, 0);
    if (right(8)) tensor_fence_after();
    float r[1][32];
    tensor_load(r, own);
    if (right(9)) tensor_loaded(r);
    tensor_store(own + 32, r[0]);
    if (right(10)) tensor_stored();
    if (right(11)) tensor_fence_before();
    barrier_arrive(&ready);
    if (asks) {
        if (right(12)) barrier_wait(&ready, 0);
        if (right(13)) tensor_fence_after();
        tensor_product_held(memory, memory + 32, tensor_tile(x), tensor_kind(32, false), false);
        tensor_commit(&done);
    }
    barrier_wait(&done, right(14) ? 1 : 0);
    tensor_fence_after();
    tensor_load(r, own);
    tensor_loaded(r);
    if (threadIdx.x < 64) ((u32*)a.at)[threadIdx.x] = float_bits(r[0][0]);
    if (right(15)) tensor_fence_before();
    __syncthreads();
    if (right(16)) tensor_fence_after();
    if (first && right(17)) tensor_give(memory);
    if (!right(18)) barrier_wait(&ready, 1);
}
